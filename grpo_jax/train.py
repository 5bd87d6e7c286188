"""The training command: it parses the config and runs it.

python -m grpo_jax.train --config configs/grpo_config.yaml --algorithm.kl_coef 0.05
"""

import sys

from grpo_jax.screen.start import begin

if __name__ == "__main__":
    begin("train", sys.argv[1:])  # before the imports that take seconds

from dataclasses import dataclass

from grpo_jax.cli import enable_compilation_cache, json_alone, run_command
from grpo_jax.config.default import or_default
from grpo_jax.config.output import OUTPUT_OPTIONS, OutputArguments, without_output
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.run.from_config import run_config
from grpo_jax.screen.start import rows_printed_by, say_aside, say_more


def train(config: Config) -> int:
    """Trains, evaluates and exports as the config says, and continues an interrupted run.

    `grpo_jax.run.run` does the same from Python, and returns the state and the metrics.

    Returns:
        0, or 128 + the signal's number when the run was interrupted (and saved).

    Raises:
        ValueError, OSError, ImportError: before anything is compiled, about something in the config.
        RewardError: a reward function failed. RuntimeError: training broke down.
    """
    return run_config(config).exit_code


@dataclass(frozen=True, kw_only=True)
class TrainArguments(Config, OutputArguments):
    """The config of a run, and what is printed.

    With `json` each row of metrics.jsonl is a line of standard output as well.
    """

    def __post_init__(self):
        Config.__post_init__(self)
        OutputArguments.__post_init__(self)


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    from grpo_jax.run.run_record import recording

    arguments = parse_record(
        TrainArguments,
        or_default(argv, own=OUTPUT_OPTIONS, say=say_aside),
        command="python -m grpo_jax.train",
        description="Train a causal language model with GRPO.",
        from_trl=True,
    )
    say_more(f"compilation cache: {enable_compilation_cache()}")
    config = without_output(arguments, Config)
    with json_alone(arguments.json, at_once=True) as print_row, rows_printed_by(print_row, arguments.json):
        with recording() as record:
            record.exit_code = train(config)
        return record.exit_code


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
