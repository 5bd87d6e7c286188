"""The directory of a run: its config, what may differ when it is continued, the model of a checkpoint."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from grpo_jax.checkpoints.format import fingerprint
from grpo_jax.checkpoints.manager import Checkpoints
from grpo_jax.config.in_memory import plain_settings
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.models.loading import Model, load_model, set_endings
from grpo_jax.models.peft import check_base
from grpo_jax.policy.lora import Lora
from grpo_jax.run.effective_config import effective_config
from grpo_jax.run.run_record import start_record
from grpo_jax.run.trained_model import build_model
from grpo_jax.run.whole_files import write_whole
from grpo_jax.training.train_state import TrainState, policy_params
from grpo_jax.types import Params

# What may differ when a run is continued, because it changes nothing about the steps already made.
_MAY_DIFFER = (
    "run_dir",
    "training.num_steps",
    "training.num_epochs",
    "evaluation",
    "checkpoints",
    "tracking",
)
_DATE = "model.chat_template_date"  # stored at the first start, and kept unless another one is given


def config_dict(config: Config) -> dict[str, Any]:
    """Returns the config as plain nested dicts, with the values of its recipe that take effect."""
    return plain_settings(effective_config(config))


def read_config(run_dir: str | Path) -> Config:
    """Reads the resolved config of a run.

    Raises:
        ValueError: the directory holds no run, or its config is not one of this version.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run_dir} is not a run directory: it has no config.yaml")
    return parse_record(Config, ["--config", str(path)], command="grpo_jax", description="")


def run_of(name: str) -> Path | None:
    """Returns the run directory that a name means: itself, or the one of which it is the `hf` or `best`."""
    path = Path(name)
    holders = (path, path.parent) if path.name in ("hf", "best") else (path,)
    return next((holder for holder in holders if (holder / "config.yaml").is_file()), None)


def write_config(config: Config) -> None:
    """Writes the resolved config into the run directory, and starts the record run.json beside it."""
    directory = Path(config.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config_dict(config), sort_keys=False)
    write_whole(directory / "config.yaml", "# the resolved configuration of this run\n" + text)
    start_record(directory)


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= _flat(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat


def check_same_run(config: Config, other: Config) -> None:
    """Checks that both configs describe the same training, apart from its length and its logging.

    Raises:
        ValueError: they do not. The message names every setting that differs.
    """
    mine = _flat(config_dict(config))
    theirs = _flat(config_dict(other))
    different = [
        f"{key} is {theirs.get(key)!r} there and {mine.get(key)!r} here"
        for key in {**mine, **theirs}
        if mine.get(key) != theirs.get(key)
        and not key.startswith(_MAY_DIFFER)
        and not (key == _DATE and mine.get(key) is None)
    ]
    if different:
        raise ValueError(
            f"run_dir {config.run_dir} holds a run with other settings: {'; '.join(different)}. Give another "
            "run_dir, or the same settings to continue it"
        )


def keep_first_date(config: Config, run_dirs: Iterable[Path]) -> Config:
    """Returns the config with the date that a chat template printed when the run was first started.

    Args:
        config: config of the run.
        run_dirs: directories of the runs that it continues, the first choice first.
    """
    if config.model.chat_template_date is not None:
        return config
    dates = (
        read_config(path).model.chat_template_date for path in run_dirs if (path / "config.yaml").is_file()
    )
    date = next((date for date in dates if date is not None), None)
    return replace(config, model=replace(config.model, chat_template_date=date))


def load_model_or_run(
    name: str,
    *,
    dtype: str = "float32",
    chat_template: str = "auto",
    chat_template_arguments: Mapping[str, Any] | None = None,
    chat_template_date: str | None = None,
    **endings: Any,
) -> Model:
    """Loads a model, or the newest checkpoint of a run.

    Args:
        name: a model as in `load_model`, or a run directory.
        dtype: compute dtype of a model. A run has its own, and its own chat template as well.
        chat_template: chat template of a model, as in `load_model`.
        chat_template_arguments: arguments of that template.
        chat_template_date: date that the template prints.
        **endings: what ends a completion, as in `set_endings`. None keeps the endings of the model or run.
    """
    if not (Path(name) / "config.yaml").is_file():
        return load_model(
            name,
            dtype=dtype,
            chat_template=chat_template,
            chat_template_arguments=chat_template_arguments,
            chat_template_date=chat_template_date,
            **endings,
        )
    return set_endings(load_run(name)[0], **endings)


def load_run(run_dir: str | Path, *, step: int | None = None) -> tuple[Model, int]:
    """Loads the model of a run with the parameters of one of its checkpoints.

    Args:
        run_dir: directory of the run.
        step: step of the checkpoint. None takes the newest that is whole.

    Returns:
        (the model, the checkpoint's step).

    Raises:
        ValueError: the directory is no run, or has no such checkpoint.
    """
    model, state, found = _restore_run(run_dir, step)
    params = policy_params(state, model.params if state.lora else None)
    return replace(model, params=params, source=str(run_dir)), found


def load_adapters(run_dir: str | Path, *, step: int | None = None) -> tuple[Model, Lora, Params, int]:
    """Loads the adapters of a run's checkpoint and, apart from them, their base.

    Args:
        run_dir: directory of the run.
        step: step of the checkpoint. None takes the newest that is whole.

    Returns:
        (the base, what is adapted, the adapters, the checkpoint's step).

    Raises:
        ValueError: the directory is no run, has no such checkpoint, or the run trained the whole model.
    """
    if not read_config(run_dir).lora.rank:
        raise ValueError(f"the run {run_dir} trained the whole model (lora.rank is 0), so it has no adapters")
    model, state, found = _restore_run(run_dir, step)
    return model, state.lora, state.params, found


def _restore_run(run_dir: str | Path, step: int | None) -> tuple[Model, TrainState, int]:
    """Returns (the model that a run started from, the state of a checkpoint, its step)."""
    config = read_config(run_dir)
    directory = Path(run_dir) / "checkpoints"
    if not directory.is_dir():
        raise ValueError(f"the run {run_dir} has no checkpoint yet")
    model, template = build_model(config)
    found, state, extra = restore_checkpoint(directory, template, step=step)
    if state.lora is not None:
        check_base(extra.get("base"), fingerprint(model.params), directory)
    return model, state, found


def restore_checkpoint(
    directory: Path, template: TrainState, *, step: int | None = None
) -> tuple[int, TrainState, dict[str, Any]]:
    """Reads a checkpoint without changing the directory.

    Args:
        directory: directory of the checkpoints.
        template: shapes of the state.
        step: step of the checkpoint. None takes the newest that is whole.

    Returns:
        (step, state, what is stored as JSON).
    """
    checkpoints = Checkpoints(directory, read_only=True)
    try:
        if step is None:
            step, state, extra, _ = checkpoints.restore_latest(template)
        else:
            state, extra, _ = checkpoints.restore(step, template)
    finally:
        checkpoints.close()
    return step, state, extra
