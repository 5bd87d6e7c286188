"""The README.md of an exported model: where it comes from, how it was trained, and with what result."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from grpo_jax.config.run import Config
from grpo_jax.config.sampling import as_list
from grpo_jax.objective.recipes import RECIPES
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
    rows = _read_rows(Path(run_dir or config.run_dir) / "metrics.jsonl")
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
    run = run_dir or config.run_dir
    name = Path(run).resolve().name
    algorithm = config.algorithm
    recipe = RECIPES[algorithm.name]
    front = {
        "base_model": _base_model(config.model.hf_model_name),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": _TAGS,
    }
    source = f"`{config.model.hf_model_name}`"
    if config.model.revision is not None:
        source += f" at revision `{config.model.revision}`"
    updates = "update" if step == 1 else "updates"
    moved = "" if Path(run) == Path(config.run_dir) else f" --run_dir {run}"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        f"{source}, trained for {step} {updates} with grpo_jax: recipe `{recipe.name}` ({recipe.paper}), "
        f"groups of {algorithm.group_size} completions, {config.training.batch_size} completions per update.",
        "## Evaluation",
        _evaluation(rows, step),
        "## Training",
        "Reward functions: " + (_rewards(config) or f"those of the task `{config.data.task}`") + ".",
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
    return "\n\n".join(parts) + "\n"


def _read_rows(path: Path) -> list[LogRow]:
    """Reads metrics.jsonl, without a last line that a kill has truncated. There may be no such file."""
    if not path.is_file():
        return []
    rows = []
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
    local = name.startswith(("packaged:", ".", "/", "~")) or name.count("/") > 1 or Path(name).is_dir()
    return Path(name.removeprefix("packaged:")).resolve().name if local else name


def _evaluation(rows: Sequence[LogRow], step: int) -> str:
    """Returns a table of the first and the last evaluation up to a step."""
    evaluated = [
        (row["step"], {key: value for key, value in row.items() if key.startswith("eval/")})
        for row in rows
        if row["step"] <= step
    ]
    evaluated = [(at, values) for at, values in evaluated if values]
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
    return ", ".join(f"`{reward.function}` (weight {reward.weight:g})" for reward in config.rewards)


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
    mine = asdict(config)
    default = asdict(Config())
    changed = {
        section: {key: value for key, value in mine[section].items() if value != default[section][key]}
        for section in _SECTIONS
    }
    changed["algorithm"] = {"name": config.algorithm.name} | changed["algorithm"]
    return yaml.safe_dump({key: value for key, value in changed.items() if value}, sort_keys=False)
