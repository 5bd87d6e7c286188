"""Held-out evaluation of a model or a run, or a comparison of two: greedy accuracy, mean@k and pass@k.

python -m grpo_jax.evaluate --model runs/arithmetic
python -m grpo_jax.evaluate --model packaged:arithmetic --config configs/grpo_config.yaml
python -m grpo_jax.evaluate --model runs/arithmetic --baseline packaged:arithmetic
"""

import sys

from grpo_jax.screen.start import begin, clear, enter, say_more

if __name__ == "__main__":
    begin("evaluate", sys.argv[1:])  # before the imports that take seconds

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from grpo_jax.cli import enable_compilation_cache, json_alone, run_command
from grpo_jax.config.output import OutputArguments
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.evaluation.outcomes import compare
from grpo_jax.run.build import Run, build
from grpo_jax.run.directory import load_model_or_run, read_config, run_of
from grpo_jax.run.evaluation import evaluate_run, observe_run, remarks_on_run, summarize_run


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(OutputArguments):
    """Arguments of the command.

    Args:
        model: a local directory, a hub id, `packaged:<name>`, or a run directory.
        baseline: a second model or run. Both see the same prompts and the same noise, and the differences are
            printed with 95 % intervals. `null` means that nothing is compared.
        config: a YAML config that names data and rewards, or a run directory. `null` means the config of the
            run, also for its `hf` and `best`, or else the defaults.
        num_prompts: number of held-out prompts. `null` means that of the config.
        num_samples: k, the number of sampled completions per prompt. `null` means that of the config.
        max_new_tokens: largest number of completion tokens. `null` means that of the config.
        temperature: temperature of the sampled completions. `null` means that of the config.
        seed: seed of the sampling noise. `null` means that of the config.
    """

    model: str
    baseline: str | None = None
    config: str | None = None
    num_prompts: int | None = None
    num_samples: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None


def _resolve(arguments: EvaluateArguments) -> Config:
    """Returns the config that says what to evaluate on."""
    if arguments.config is not None:
        config = parse_record(Config, ["--config", arguments.config], command="", description="")
    elif (run := run_of(arguments.model)) is not None:
        config = read_config(run)
    else:
        config = Config()
    evaluation = {"num_prompts": arguments.num_prompts, "num_samples": arguments.num_samples}
    changed = {name: value for name, value in evaluation.items() if value is not None}
    config = replace(config, evaluation=replace(config.evaluation, **changed))
    sampling = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    drawn = {name: value for name, value in sampling.items() if value is not None}
    config = replace(config, sampling=replace(config.sampling, **drawn))
    if arguments.temperature is not None:
        config = replace(config, evaluation=replace(config.evaluation, temperature=None))
    if arguments.seed is not None:
        config = replace(config, training=replace(config.training, seed=arguments.seed))
    return config


def _build_run(name: str, config: Config) -> Run:
    named = config.model
    model = load_model_or_run(
        name,
        dtype=named.dtype,
        chat_template=named.chat_template,
        chat_template_arguments=named.chat_template_arguments,
        chat_template_date=named.chat_template_date,
        **config.sampling.endings,
    )
    run = build(config, model=model)
    if not run.task.evaluation:
        raise ValueError("there are no held-out prompts; give data.eval_file, and num_prompts above 0")
    return run


def _print_results(arguments: EvaluateArguments, run: Run, show: Callable[[Any], None]) -> None:
    notes: list[str] = []
    count = len(run.task.evaluation)
    enter("evaluating", f"{arguments.model} on {count} held-out prompts")
    results = evaluate_run(run, run.model.params, notes.append)
    clear()
    if arguments.json:
        found = {"notes": notes} if notes else {}
        show({"model": arguments.model, "num_prompts": count, **results, **found})
        return
    print(f"{arguments.model} on {count} held-out prompts")
    for name, value in results.items():
        print(f"  {name.removeprefix('eval/'):<28} {value:.4f}")
    for note in [] if arguments.quiet else notes:
        print(f"note: {note}")


def _print_comparison(
    arguments: EvaluateArguments, run: Run, base_run: Run, show: Callable[[Any], None]
) -> None:
    if base_run.task.evaluation != run.task.evaluation:
        raise ValueError(
            f"{arguments.model} and {arguments.baseline} drop different prompts as too long, so they "
            "cannot be compared; set data.max_prompt_length to what both take"
        )
    enter("evaluating", arguments.model)
    outcome = observe_run(run, run.model.params)
    enter("evaluating", f"{arguments.baseline}")
    baseline = observe_run(base_run, base_run.model.params)
    clear()
    mine = summarize_run(run, outcome)
    theirs = summarize_run(base_run, baseline)
    notes = [f"{arguments.model}: {line}" for line in remarks_on_run(run, outcome)]
    notes += [f"{arguments.baseline}: {line}" for line in remarks_on_run(base_run, baseline)]
    differences = compare(outcome, baseline, seed=run.config.training.seed)
    count = len(outcome.greedy)
    if arguments.json:
        keys = ("value", "low", "high")
        document = {
            "model": arguments.model,
            "num_prompts": count,
            **mine,
            "baseline": {"model": arguments.baseline, **theirs},
            "difference": {
                name: dict(zip(keys, figures, strict=True)) for name, figures in differences.items()
            },
            **({"notes": notes} if notes else {}),
        }
        show(document)
        return
    print(f"{arguments.model} minus {arguments.baseline} on {count} held-out prompts, with 95 % intervals")
    for name, (value, low, high) in differences.items():
        print(
            f"  {name.removeprefix('eval/'):<18} {value:+.4f}  [{low:+.4f}, {high:+.4f}]  "
            f"{mine[name]:.4f} against {theirs[name]:.4f}"
        )
    for note in [] if arguments.quiet else notes:
        print(f"note: {note}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    arguments = parse_record(
        EvaluateArguments,
        argv,
        command="python -m grpo_jax.evaluate",
        description="Evaluate a model or a run on held-out prompts, or compare two.",
        config_option=False,
    )
    say_more(f"compilation cache: {enable_compilation_cache()}")
    config = _resolve(arguments)
    with json_alone(arguments.json) as show:
        run = _build_run(arguments.model, config)
        if arguments.baseline is None:
            _print_results(arguments, run, show)
        else:
            _print_comparison(arguments, run, _build_run(arguments.baseline, config), show)
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
