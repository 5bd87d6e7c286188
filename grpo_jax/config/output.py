"""What a command prints: the options that all commands have."""

from dataclasses import dataclass, fields
from typing import Any

from grpo_jax.config.checks import require


@dataclass(frozen=True, kw_only=True)
class OutputArguments:
    """What a command prints.

    Args:
        quiet: whether only errors and the last lines, which say the result, are printed.
        verbose: whether every phase, the seconds of each compilation and the names of files are printed too.
            For the traceback of an error set GRPO_JAX_TRACEBACK=1 in the environment.
        json: whether JSON is printed instead of text, and nothing else on standard output.
    """

    quiet: bool = False
    verbose: bool = False
    json: bool = False

    def __post_init__(self):
        require(not (self.quiet and self.verbose), "quiet, verbose: give one of them, not both")


OUTPUT_OPTIONS = frozenset(field.name for field in fields(OutputArguments))


def without_output(arguments: Any, record: type) -> Any:
    """Returns the part of a command's arguments that is another record, such as the config of a run."""
    return record(**{field.name: getattr(arguments, field.name) for field in fields(record)})
