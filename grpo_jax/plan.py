"""What a config will do, before it does it.

python -m grpo_jax.plan --config configs/grpo_config.yaml
"""

import sys

from grpo_jax.screen.start import begin, clear, say_aside

if __name__ == "__main__":
    begin("plan", sys.argv[1:])  # before the imports that take seconds


from dataclasses import asdict, dataclass

from grpo_jax.cli import json_alone, run_command
from grpo_jax.config.default import or_default
from grpo_jax.config.output import OUTPUT_OPTIONS, OutputArguments, without_output
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.run.best_model import check_best_metric
from grpo_jax.run.build import build
from grpo_jax.run.planning import make_plan


@dataclass(frozen=True, kw_only=True)
class PlanArguments(Config, OutputArguments):
    """The config of a run, and what is printed.

    With `json` the numbers of the plan are one object.
    """

    def __post_init__(self):
        Config.__post_init__(self)
        OutputArguments.__post_init__(self)


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    arguments = parse_record(
        PlanArguments,
        or_default(argv, own=OUTPUT_OPTIONS, say=say_aside),
        command="python -m grpo_jax.plan",
        description="Show what a config will do, without doing it.",
        from_trl=True,
    )
    with json_alone(arguments.json) as show:
        run = build(without_output(arguments, Config))
        check_best_metric(run)
        plan = make_plan(run)
        clear()
        if arguments.json:
            show(asdict(plan))
        else:
            print(plan.text())
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
