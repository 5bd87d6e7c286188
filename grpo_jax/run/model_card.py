"""The README.md of an exported model: where it comes from, how it was trained, and with what result."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from grpo_jax.config.in_memory import label_of, plain_settings
from grpo_jax.config.run import Config
from grpo_jax.config.sampling import as_list
from grpo_jax.models.directories import local_directory
from grpo_jax.run.effective_config import effective_config, recipe_settings
from grpo_jax.trackers.jsonl import LogRow

_SECTIONS = ("algorithm", "model", "lora", "data", "sampling", "training", "evaluation")
_TAGS = ["grpo", "reinforcement-learning", "grpo_jax"]


def write_card(config: Config, directory: str | Path, *, step: int, run_dir: str | None = None) -> None:
    """Writes the card of an exported model into its directory.

    Args:
        config: config of the run.
        directory: directory of the exported model.
        step: number of optimizer steps so far.
        run_dir: the directory in which the run is now. `None` means the one that its config names.
    """
    rows = _read_rows(Path(run_dir or config.directory) / "metrics.jsonl")
    card = model_card(config, rows, step=step, directory=str(directory), run_dir=run_dir)
    (Path(directory) / "README.md").write_text(card, encoding="utf-8")


def model_card(
    config: Config, rows: Sequence[LogRow], *, step: int, directory: str, run_dir: str | None = None
) -> str:
    """Returns the Markdown of a card, with the front matter that the Hugging Face hub reads.

    Args:
        config: config of the run.
        rows: rows of its metrics.jsonl.
        step: number of optimizer steps so far.
        directory: directory of the exported model.
        run_dir: the directory in which the run is now. `None` means the one that its config names.
    """
    run = run_dir or str(config.directory)
    name = Path(run).resolve().name
    algorithm = config.algorithm
    recipe = algorithm.recipe
    results = _eval_results(config, rows, step)
    front = ModelCardData(
        base_model=_base_model(config.model.hf_model_name),
        datasets=_datasets(config),
        eval_results=results or None,
        library_name="transformers",
        model_name=name if results else None,
        pipeline_tag="text-generation",
        tags=_TAGS,
        **_license(config),
    )
    source = f"`{config.model.hf_model_name}`"
    if config.model.revision is not None:
        source += f" at revision `{config.model.revision}`"
    updates = "update" if step == 1 else "updates"
    moved = "" if Path(run) == config.directory else f" --run_dir {run}"
    parts = [
        f"# {name}",
        f"{source}, trained for {step} {updates} with grpo_jax: recipe `{recipe.name}` ({recipe.paper}), "
        f"groups of {algorithm.group_size} completions, {config.training.batch_size} completions per update.",
        "## Evaluation",
        _evaluation(rows, step),
        "## Training",
        "Reward functions: "
        + (_rewards(config) or f"those of the task `{label_of(config.data.task)}`")
        + ".",
        "Settings that differ from the defaults of grpo_jax:",
        f"```yaml\n{_settings(config)}```",
        *_stops(config),
        "## Commands",
        "They evaluate the model as in training, complete a prompt, and continue the training if the run "
        "directory exists (`--training.num_steps` makes it longer):",
        "```bash\n"
        f"python -m grpo_jax.evaluate --model {directory} --config {run}/config.yaml\n"
        f'python -m grpo_jax.generate --model {directory} --prompt "..."\n'
        f"python -m grpo_jax.train --config {run}/config.yaml{moved}\n"
        "```",
    ]
    text = "\n\n".join(parts) + "\n"
    return ModelCard(f"---\n{front.to_yaml()}\n---\n\n{text}").content


def _read_rows(path: Path) -> list[LogRow]:
    """Reads metrics.jsonl, without a last line that a kill has truncated. There may be no such file."""
    if not path.is_file():
        return []
    rows: list[LogRow] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _base_model(name: str) -> str:
    """Returns a name that the hub accepts: that of a model on the hub, or the last part of a local path."""
    path = local_directory(name)
    return name if path is None else path.resolve().name


def _license(config: Config) -> dict[str, Any]:
    """Returns what the card of the base model says of its license, which holds for this model as well.

    Nothing is downloaded: the card of a model of the hub came with the model.
    """
    name = config.model.hf_model_name
    path = local_directory(name)
    if path is not None:
        file = path / "README.md"
    else:
        cached = huggingface_hub.try_to_load_from_cache(name, "README.md", revision=config.model.revision)
        if not isinstance(cached, str):
            return {}
        file = Path(cached)
    try:
        text = file.read_text(encoding="utf-8")
        if not text.startswith("---"):  # huggingface_hub would warn that there is no front matter
            return {}
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # no card, or one that is not as the hub wants it
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def _datasets(config: Config) -> list[str] | None:
    """Returns the data set of the hub that was trained on, if it was one."""
    name = config.data.dataset
    return [name] if name and not Path(name).expanduser().exists() else None


def _evaluations(rows: Sequence[LogRow], step: int) -> list[tuple[int, LogRow]]:
    """Returns (step, figures) of each evaluation up to a step."""
    evaluated: list[tuple[int, LogRow]] = [
        (row["step"], {key: value for key, value in row.items() if key.startswith("eval/")})
        for row in rows
        if row["step"] <= step
    ]
    return [(at, values) for at, values in evaluated if values]


def _eval_results(config: Config, rows: Sequence[LogRow], step: int) -> list[EvalResult]:
    """Returns the figures of the last evaluation up to a step, as the hub lists them (`model-index`)."""
    evaluated = _evaluations(rows, step)
    if not evaluated:
        return []
    data = config.data
    datasets = _datasets(config)
    name = data.dataset or (Path(data.eval_file).name if isinstance(data.eval_file, str) else data.task)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=datasets[0] if datasets else Path(name).name,
            dataset_name=f"{name}, held-out prompts",
            dataset_config=data.dataset_config,
            dataset_split=data.eval_split if data.dataset else None,
            metric_type=key.removeprefix("eval/"),
            metric_name=key.removeprefix("eval/"),
            metric_value=round(float(value), 4),
        )
        for key, value in evaluated[-1][1].items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def _evaluation(rows: Sequence[LogRow], step: int) -> str:
    """Returns a table of the first and the last evaluation up to a step."""
    evaluated = _evaluations(rows, step)
    if not evaluated:
        return "There was none."
    columns = [evaluated[0]] + ([evaluated[-1]] if len(evaluated) > 1 else [])
    names = dict.fromkeys(name for _, values in columns for name in values)
    lines = [
        "| held-out prompts | " + " | ".join(f"step {at}" for at, _ in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in names:
        cells = (_number(values.get(name)) for _, values in columns)
        lines.append(f"| {name.removeprefix('eval/')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "–"


def _rewards(config: Config) -> str:
    # Their arguments are left out, because they may be private, such as the address of a server.
    return ", ".join(f"`{label_of(reward.function)}` (weight {reward.weight:g})" for reward in config.rewards)


def _stops(config: Config) -> list[str]:
    """Returns what users of the model have to know about its stop strings, or [] if there are none."""
    strings = as_list(config.sampling.stop)
    if not strings:
        return []
    return [
        "## Stop strings",
        "In training a completion ended where its text first contained one of these. The files of the model "
        "have no place for them, so give them to whatever samples from it (`stop` in vLLM, `stop_strings` in "
        "transformers):",
        f"```python\nstop = {strings!r}\n```",
    ]


def _settings(config: Config) -> str:
    # config.yaml holds the recipe's own values, and a config that was given may leave them to the recipe.
    mine = plain_settings(effective_config(config))
    default = plain_settings(Config())
    default["algorithm"] |= recipe_settings(config)
    changed = {
        section: {key: value for key, value in mine[section].items() if value != default[section][key]}
        for section in _SECTIONS
    }
    changed["algorithm"] = {"name": label_of(config.algorithm.name)} | changed["algorithm"]
    return yaml.safe_dump({key: value for key, value in changed.items() if value}, sort_keys=False)
