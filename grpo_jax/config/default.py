"""The config of the main job, which ships with the package: what a command runs when it is told nothing."""

import sys
from collections.abc import Callable, Collection
from importlib.resources import files
from pathlib import Path

# A test holds it equal to configs/grpo_config.yaml of a clone.
DEFAULT = Path(str(files("grpo_jax"))) / "packaged" / "default.yaml"


def or_default(
    argv: list[str] | None,
    *,
    own: Collection[str] = (),
    say: Callable[[str], None] | None = None,
) -> list[str]:
    """Returns the arguments of a command, with the packaged config before them if none describes a run.

    Args:
        argv: arguments of the command. None means those of the process.
        own: names of the command's own options, which do not describe a run.
        say: function that prints a line. None means that standard error gets it.

    >>> or_default(["--training.num_steps", "3"])
    ['--training.num_steps', '3']
    >>> [Path(word).name for word in or_default(["--json"], own=["json"])]
    ['--config', 'default.yaml', '--json']
    """
    argv = sys.argv[1:] if argv is None else argv
    waiting = list(argv)
    while waiting:
        option, equals, _ = waiting.pop(0).partition("=")
        if not option.startswith("--") or option.removeprefix("--") not in own:
            return argv
        if not equals and waiting and not waiting[0].startswith("--"):
            waiting.pop(0)  # its value
    note = f"note: nothing describes a run, so it is the one that ships with grpo_jax: {DEFAULT}"
    if say is None:
        print(note, file=sys.stderr)
    else:
        say(note)
    return ["--config", str(DEFAULT), *argv]
