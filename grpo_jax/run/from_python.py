"""Trains from Python: models, prompts, reward functions and optimizers are objects, settings are dicts.

The arguments become the config that a file would have given, and everything after that is the code of the
command.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from grpo_jax.config.data import DEFAULT_TASK, IN_MEMORY
from grpo_jax.config.in_memory import is_section, is_setting, label_of
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.data.given_rows import PromptRows, rows_of
from grpo_jax.models.from_objects import model_of
from grpo_jax.models.loading import Model
from grpo_jax.named_objects import IN_PYTHON
from grpo_jax.objective.recipes import Recipe
from grpo_jax.run.from_config import Result, run_config
from grpo_jax.run.loop import OnStep
from grpo_jax.types import Params

Section = Any  # a dict of keys and values, or a record of grpo_jax.config
Path = tuple[str | int, ...]
# Where an object may stand for a name. An argument of a reward may be any object.
_PLACES = (
    ("algorithm", "name"),
    ("data", "task"),
    ("training", "optimizer"),
    ("tracking", "trackers", int),
    ("rewards", int, "function"),
    ("rewards", int, "arguments"),
    ("evaluation", "rewards", int, "function"),
    ("evaluation", "rewards", int, "arguments"),
)
_TRACKERS = ("tensorboard", "wandb")  # trackers that have a key of their own


def run(
    model: Any,
    prompts: Any = None,
    rewards: Any = (),
    *,
    tokenizer: Any = None,
    params: Params | None = None,
    eval_prompts: Any = None,
    algorithm: str | Recipe | Section = None,
    lora: Section = None,
    data: Section = None,
    sampling: Section = None,
    training: Section = None,
    evaluation: Section = None,
    checkpoints: Section = None,
    tracking: Section = None,
    optimizer: Any = None,
    trackers: Sequence[Any] = (),
    on_step: OnStep | None = None,
    run_dir: str | os.PathLike | None = None,
    quiet: bool = False,
) -> Result:
    """Trains a model with reward functions, and returns the final state and the history of the metrics.

    It works in a notebook, in a thread, and several times in one process. Ctrl-C ends it after the step, if
    it runs in the main thread.

    Args:
        model: a name or directory, a section such as `{"hf_model_name": ..., "dtype": "bfloat16"}`, a `Model`
            of `load_model`, a `FlaxAutoModelForCausalLM`, or anything else that `grpo_jax.policy_of` takes.
        prompts: a list of texts, of lists of messages, of dicts with a `prompt` and columns, or of `Example`,
            or a split of a data set. `None` means that the section `data` says where they come from.
        rewards: reward functions `f(prompts, completions, **columns)`, one or a list. Each is the function,
            its name as in a config, a pair (function, weight), or a dict with the keys of `RewardConfig`.
        tokenizer: fast tokenizer of a model that is an object, or the name or directory of one.
        params: parameters of a model that does not hold them itself.
        eval_prompts: held-out prompts, as `prompts`.
        algorithm: name of a recipe, a `Recipe`, or a dict of keys: `{"name": "dapo", "group_size": 4}`.
        lora: settings of adapters, a dict of keys.
        data: settings of the prompts, a dict of keys.
        sampling: settings of sampling, a dict of keys.
        training: length of the run and learning rate, a dict of keys.
        evaluation: settings of evaluation, a dict of keys.
        checkpoints: settings of saving and resuming, a dict of keys.
        tracking: settings of logging, a dict of keys.
        optimizer: an optax optimizer, or a function of the learning rate that returns one, such as
            `optax.lion`. `None` means AdamW.
        trackers: objects with a method `log(step, metrics)`, or names: `tensorboard`, `wandb`, or that of a
            tracker as in a config.
        on_step: function of (step, metrics) that is called after every optimizer step. If it returns True or
            `"stop"`, the run ends there as it would after its last step: it evaluates, saves and exports.
        run_dir: directory of the run, which a later call with the same arguments continues. `None` means
            that nothing is written.
        quiet: whether nothing is printed.

    Raises:
        ValueError, OSError, ImportError: before anything is compiled, about something that was given.
        RewardError: a reward function failed. RuntimeError: training broke down.

    See the README for an example.
    """
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step is {on_step!r:.60}; give a function of (step, metrics)")
    given_model, model_section = _split_model(model, tokenizer, params)
    sections = {
        "algorithm": _algorithm(algorithm),
        "model": model_section,
        "lora": lora,
        "data": _data(data, prompts, eval_prompts),
        "sampling": sampling,
        "training": _with(training, "training", "optimizer", optimizer),
        "evaluation": evaluation,
        "checkpoints": checkpoints,
        "tracking": _tracking(tracking, trackers),
    }
    config = make_config({**sections, "rewards": _rewards(rewards)}, run_dir)
    rows = None
    if prompts is not None:
        held_out = None if eval_prompts is None else rows_of(eval_prompts, "eval_prompts")
        rows = PromptRows(rows_of(prompts, "prompts"), held_out)
        if not config.rewards and config.data.task == IN_MEMORY:
            raise ValueError("rewards: none are given; give at least one function, such as rewards=[f]")
    if given_model and config.lora.start_from is not None:
        raise ValueError("lora.start_from is for a model that is given by its name; name the model")
    made: Model | None = None
    if given_model:
        made = model_of(model, tokenizer, params, eos_token_ids=config.sampling.endings["eos_token_ids"])
    return run_config(config, model=made, prompts=rows, on_step=on_step, quiet=quiet)


def make_config(sections: Mapping[str, Any], run_dir: str | os.PathLike | None = None) -> Config:
    """Makes a config of dicts, with the checks and messages of a config file.

    Args:
        sections: name of a section -> its keys and values, or a record of grpo_jax.config, or None. Objects
            may be where a file has the name of a function, a task, a recipe, an optimizer or a tracker.
        run_dir: directory of the run. `None` means that nothing is written.

    Raises:
        ValueError: a key is unknown, or a value is wrong. The message is one line.
    """
    objects: dict[Path, Any] = {}
    argv = []
    for name, section in sections.items():
        if section is None or (isinstance(section, (list, tuple)) and not section):
            continue
        if name != "rewards" and not isinstance(section, Mapping) and not is_section(section):
            keys = next(f for f in fields(Config) if f.name == name).type
            raise ValueError(f"{name} is {section!r:.60}; give a dict of its keys, see {_record_name(keys)}")
        plain = _without_objects(section, (name,), objects)
        if name == "rewards":
            argv.append(f"--rewards={json.dumps(plain)}")
        else:
            if name == "sampling" and isinstance(plain.get("stop"), str):
                plain = {**plain, "stop": [plain["stop"]]}  # as an option, `[END]` would be a list
            argv += [f"--{name}.{key}={_text(value)}" for key, value in plain.items()]
    argv.append(f"--run_dir={'null' if run_dir is None else os.fspath(run_dir)}")
    config = parse_record(Config, argv, command="grpo_jax.run.run", description="", config_option=False)
    for path, value in objects.items():
        config = _with_object(config, path, value)
    return config


def _text(value: Any) -> str:
    """Returns a value as an option's text."""
    return value if isinstance(value, str) else json.dumps(value)


def _record_name(kind: Any) -> str:
    return f"grpo_jax.config.{getattr(kind, '__name__', kind)}"


def _without_objects(value: Any, path: Path, objects: dict[Path, Any]) -> Any:
    """Returns a value with a text in the place of each object, which is noted under its path."""
    if is_section(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping) and path[-1] != "arguments":
        return {str(key): _without_objects(each, (*path, str(key)), objects) for key, each in value.items()}
    if type(value) in (list, tuple):
        return [_without_objects(each, (*path, index), objects) for index, each in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a scalar of NumPy
        return value.item()
    if is_setting(value):
        return value
    if not any(_fits(path, place) for place in _PLACES):
        where = ".".join(map(str, path))
        raise ValueError(f"{where} is of type {type(value).__name__}, which is no setting: {value!r:.60}")
    objects[path] = value
    return {} if path[-1] == "arguments" else label_of(value)


def _fits(path: Path, place: tuple[Any, ...]) -> bool:
    pairs = zip(path, place, strict=False)
    return len(path) == len(place) and all(a == b or (b is int and isinstance(a, int)) for a, b in pairs)


def _with_object(holder: Any, path: Path, value: Any) -> Any:
    """Returns a record, a list or a dict with a value put in at a path."""
    if not path:
        return value
    first, *rest = path
    if isinstance(first, int):  # of a list
        return [*holder[:first], _with_object(holder[first], tuple(rest), value), *holder[first + 1 :]]
    return replace(holder, **{first: _with_object(getattr(holder, first), tuple(rest), value)})


def _split_model(model: Any, tokenizer: Any, params: Any) -> tuple[bool, dict[str, Any]]:
    """Returns (whether the model is an object, the section of the config)."""
    if is_section(model) or isinstance(model, Mapping):
        section = dict(model) if isinstance(model, Mapping) else vars(model)
    elif isinstance(model, (str, os.PathLike)):
        section = {"hf_model_name": os.fspath(model)}
    else:
        name = model.source if isinstance(model, Model) else f"{IN_PYTHON}:{type(model).__name__}"
        return True, {"hf_model_name": name}
    for argument, value in (("tokenizer", tokenizer), ("params", params)):
        if value is not None:
            raise ValueError(f"{argument} is for a model that is an object; a model's name brings its own")
    return False, section


def _algorithm(algorithm: Any) -> Any:
    return {"name": algorithm} if isinstance(algorithm, (str, Recipe)) else algorithm


def _with(section: Any, name: str, key: str, value: Any) -> Any:
    """Returns a section with one more key, unless the value is None."""
    if value is None:
        return section
    keys = {} if section is None else dict(section) if isinstance(section, Mapping) else vars(section)
    if keys.get(key) not in (None, [], ""):
        raise ValueError(f"{key} and {name}.{key} are both given; leave one of them out")
    return {**keys, key: value}


def _data(data: Any, prompts: Any, eval_prompts: Any) -> Any:
    if prompts is None:
        if eval_prompts is not None:
            raise ValueError("eval_prompts are given without prompts; give both, or data={'eval_file': ...}")
        return data
    keys = {} if data is None else dict(data) if isinstance(data, Mapping) else vars(data)
    for key in ("train_file", "dataset", *(["eval_fraction"] if eval_prompts is not None else [])):
        if keys.get(key):
            other = "eval_prompts" if key == "eval_fraction" else "prompts"
            raise ValueError(f"{other} and data.{key} are both given; leave one of them out")
    is_default = keys.get("task", DEFAULT_TASK) == DEFAULT_TASK
    return {**keys, "task": IN_MEMORY} if is_default else keys


def _tracking(tracking: Any, trackers: Any) -> Any:
    if isinstance(trackers, str) or not isinstance(trackers, Iterable):
        trackers = [trackers]
    for name in (t for t in trackers if isinstance(t, str) and t in _TRACKERS):
        tracking = _with(tracking, "tracking", name, True)
    own = [t for t in trackers if not (isinstance(t, str) and t in _TRACKERS)]
    return _with(tracking, "tracking", "trackers", own or None)


def _rewards(rewards: Any) -> list[Any]:
    """Returns rewards as dicts with a `function`."""
    if rewards is None:
        return []
    if callable(rewards) or isinstance(rewards, (str, Mapping)) or is_section(rewards):
        rewards = [rewards]
    if not isinstance(rewards, Iterable):
        raise ValueError(f"rewards is {rewards!r:.60}; give a function, or a list of functions")
    return [_reward(reward) for reward in rewards]


def _reward(reward: Any) -> Any:
    if isinstance(reward, Mapping) or is_section(reward):
        return reward
    if isinstance(reward, tuple) and len(reward) == 2:
        return {"function": reward[0], "weight": reward[1]}
    if isinstance(reward, str) or callable(reward):
        return {"function": reward}
    raise ValueError(f"rewards: {reward!r:.60} is no function, pair (function, weight), dict or name")
