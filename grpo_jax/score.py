"""A rehearsal before training: what the base model and the rewards make of training prompts.

python -m grpo_jax.score --config configs/grpo_config.yaml
"""

import sys

from grpo_jax.screen.start import begin, clear, enter, say_aside, say_more

if __name__ == "__main__":
    begin("score", sys.argv[1:])  # before the imports that take seconds

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from grpo_jax.cli import enable_compilation_cache, json_alone, run_command
from grpo_jax.config.checks import check_ranges
from grpo_jax.config.default import or_default
from grpo_jax.config.output import OutputArguments, without_output
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.evaluation.verdicts import Correct
from grpo_jax.run.build import build
from grpo_jax.run.rehearsal import QUANTILES, advice, rehearse, report, shown_samples
from grpo_jax.trackers.console import ConsoleTracker, bars, samples_table


@dataclass(frozen=True, kw_only=True)
class ScoreArguments(Config, OutputArguments):
    """A run's config, and how much of it is rehearsed.

    Args:
        num_prompts: number of training prompts. They are the first that the run will use.
        num_samples: number of completions of each prompt, which is the largest group size that the rehearsal
            can judge.
        num_shown: number of samples in the table.
    """

    num_prompts: int = 32
    num_samples: int = 16
    num_shown: int = 8

    def __post_init__(self):
        Config.__post_init__(self)
        OutputArguments.__post_init__(self)
        check_ranges("", vars(self), _RANGES)

    def config(self) -> Config:
        """Returns the config of the run alone."""
        return without_output(self, Config)


_RANGES = (
    ("num_prompts", lambda x: x >= 1, "at least 1"),
    ("num_samples", lambda x: x >= 2, "at least 2"),
    ("num_shown", lambda x: x >= 0, "0 or more"),
)


def _print(figures: dict[str, Any], samples: list[dict[str, Any]], lines: list[str]) -> None:
    def cells(figures: dict[str, Any], names: Sequence[str]) -> list[str]:
        return ["-" if figures.get(name) is None else f"{figures[name]:.4g}" for name in names]

    console = ConsoleTracker(0, stream=sys.stdout)  # results, unlike what moves while it works
    prompts = f"{figures['num_prompts']} training prompts"
    console.message(f"{figures['model']}: {prompts} × {figures['num_samples']} completions")
    names = ["weight", "mean", "std", *QUANTILES, "missing", "seconds_per_call"]
    rows = [
        [name, *cells(reward, names), bars(reward["histogram"] or ())]
        for name, reward in [*figures["rewards"].items(), ("total", figures["total"])]
    ]
    headings = ["reward", *names[:-1], f"s / {figures['rows_per_call']} rows", "min … max"]
    console.show_figures("rewards", headings, rows)
    sizes = figures["dead_groups"]
    dead = [f"{share:.1%}" for share in sizes.values()]
    console.show_figures("groups without a signal", ["G", *sizes], [["expected share", *dead]])
    chances = figures["pass@k"]
    passes = [f"{chance:.1%}" for chance in chances.values()]
    correct = Correct(name=figures["correct"]["reward"], threshold=figures["correct"]["threshold"])
    console.show_figures(f"correct: {correct}", ["k", *chances], [["pass@k", *passes]])
    if samples:
        console.show(samples_table("completions", samples, width=console.width))
    console.message(
        f"mean length {figures['mean_length']:.1f} tokens, {figures['clipped_ratio']:.1%} cut off at the "
        f"limit, {figures['tokens_per_second']:.0f} tokens/s"
    )
    for line in lines:
        console.message(f"note: {line}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    own = {f.name for f in fields(ScoreArguments)} - {f.name for f in fields(Config)}
    arguments = parse_record(
        ScoreArguments,
        or_default(argv, own=own, say=say_aside),
        command="python -m grpo_jax.score",
        description="Rehearse a run: sample from the base model and call the rewards, without training.",
        from_trl=True,
    )
    say_more(f"compilation cache: {enable_compilation_cache()}")
    config = arguments.config()
    with json_alone(arguments.json) as show:
        run = build(config)
        enter("sampling", f"{arguments.num_prompts} prompts × {arguments.num_samples} completions")
        rehearsal = rehearse(run, num_prompts=arguments.num_prompts, num_samples=arguments.num_samples)
        figures = report(run, rehearsal)
        lines = advice(figures, group_size=config.algorithm.group_size, silences=rehearsal.silences)
        lines = [*run.notes, *lines]
        num_shown = 0 if arguments.quiet and not arguments.json else arguments.num_shown
        samples = shown_samples(run, rehearsal, num_shown)
        clear()
        if arguments.json:
            show({**figures, "advice": lines, "samples": samples})
        else:
            _print(figures, samples, lines)
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
