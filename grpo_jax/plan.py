"""What a config will do, before it does it.

python -m grpo_jax.plan --config configs/grpo_config.yaml
"""

import sys

from grpo_jax.cli import run_command
from grpo_jax.config.default import or_default
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.run.best_model import check_best_metric
from grpo_jax.run.build import build
from grpo_jax.run.planning import make_plan


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    config = parse_record(
        Config,
        or_default(argv),
        command="python -m grpo_jax.plan",
        description="Show what a config will do, without doing it.",
        from_trl=True,
    )
    run = build(config)
    check_best_metric(run)
    print(make_plan(run).text())
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
