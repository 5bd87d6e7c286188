"""A run: the parts that a config names, built and checked before anything compiles; its directory."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import jax
import optax
import yaml

from grpo_jax.actor import Actor
from grpo_jax.adapters import check_base, make_lora
from grpo_jax.categories import rows_by_category
from grpo_jax.checkpoints import Checkpoints
from grpo_jax.cli import parse_record
from grpo_jax.config import Config, RewardConfig
from grpo_jax.data import Task, load_data
from grpo_jax.learner import TrainState, init_train_state, policy_params
from grpo_jax.lora import Lora, init_adapters
from grpo_jax.models import Model, load_model
from grpo_jax.optimizers import make_optimizer, make_schedule
from grpo_jax.prompt_lengths import fit_prompts, prompt_limit
from grpo_jax.recipes import CLIP_KEYWORDS, Recipe, make_recipe
from grpo_jax.rewards import Reward, check_columns, load_rewards
from grpo_jax.stored_leaves import fingerprint
from grpo_jax.types import Params

# What may differ when a run is continued: it changes nothing of the steps already made.
_MAY_DIFFER = (
    "run_dir",
    "training.num_steps",
    "training.num_epochs",
    "evaluation",
    "checkpoints",
    "tracking",
)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a run is made of, built from its config and checked."""

    config: Config
    model: Model
    lora: Lora | None  # None: the whole model is trained
    task: Task  # prompts over the limit are gone
    num_dropped: int  # training prompts over the limit
    num_truncated: int  # training prompts that lost their beginning to it
    rewards: tuple[Reward, ...]
    recipe: Recipe
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    num_steps: int  # optimizer steps of the whole run
    prompt_lengths: frozenset[int]  # token counts that occur among the training prompts
    eval_prompt_length: int
    eval_rewards: tuple[Reward, ...] = ()  # logged in evaluation, never trained on
    categories: Mapping[str, Sequence[int]] = field(default_factory=dict)  # category -> held-out rows

    @property
    def prompt_length(self) -> int:
        """S of every Experience: the longest training prompt."""
        return max(self.prompt_lengths)

    @property
    def num_prompts(self) -> int:
        """N, prompts per rollout (and per round of one)."""
        return self.config.num_prompts

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps made from one rollout."""
        return self.config.updates_per_rollout

    @property
    def sampling(self) -> dict[str, float]:
        """The traced sampling settings of `generate`."""
        s = self.config.sampling
        return {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "min_p": s.min_p}

    @property
    def needs_reference(self) -> bool:
        """Whether the reference takes part at all."""
        return self.recipe.kl_coef > 0

    @property
    def scores_reference(self) -> bool:
        """Whether rollouts are scored under the reference; an exact KL reads it in the update instead."""
        return self.needs_reference and not self.recipe.exact_kl

    @property
    def scores_policy(self) -> bool:
        """Whether the policy scores its own rollouts before the update: for more than one update from each,
        or for what the recipe makes of those scores before it.
        """
        return self.updates_per_rollout > 1 or self.recipe.needs_old_log_probs

    def actor(self) -> Actor:
        """Makes the actor of this run."""
        return Actor(
            model=self.model,
            recipe=self.recipe,
            rewards=self.rewards,
            group_size=self.config.algorithm.group_size,
            prompt_length=self.prompt_length,
            max_new_tokens=self.config.sampling.max_new_tokens,
            sampling=self.sampling,
            num_microbatches=self.config.training.num_microbatches,
            num_minibatches=self.config.algorithm.num_minibatches,
            max_rounds=self.config.algorithm.max_sampling_rounds,
            scores_policy=self.scores_policy,
        )

    def init_state(self) -> TrainState:
        """Makes the state of step 0."""
        return _init_state(self.config, self.model, self.lora, self.optimizer)


def build(config: Config, *, model: Model | None = None) -> Parts:
    """Loads and checks everything a config names. Compiles nothing.

    Args:
        config: of the run.
        model: used instead of loading the one the config names.

    Raises:
        ValueError, OSError, ImportError: something the user gave is wrong; the message names it.
    """
    training = config.training
    task = load_data(config.data)
    rewards, eval_rewards = _load_rewards(config, task)
    for examples in filter(None, (task.train, task.evaluation)):
        check_columns(rewards, examples[0].columns)
    if task.evaluation:
        check_columns(eval_rewards, task.evaluation[0].columns)
    model = _load_named_model(config) if model is None else model
    lora = _make_lora(config, model)
    limit = prompt_limit(model, config.data.max_prompt_length, config.sampling.max_new_tokens)
    over_length = config.data.over_length
    train = fit_prompts(task.train, model, limit, over_length, "training")
    if not train.examples:
        raise ValueError(
            f"all {train.num_dropped} training prompts have more than {limit} tokens; nothing is left"
        )
    held_out = task.evaluation[: config.evaluation.num_prompts]
    held_out = fit_prompts(held_out, model, limit, over_length, "evaluation")

    recipe = _make_recipe(config)
    rollouts = max(1, math.ceil(training.num_epochs * len(train.examples) / config.num_prompts - 1e-9))
    num_steps = training.num_steps or rollouts * config.updates_per_rollout
    schedule = make_schedule(
        training.learning_rate,
        lr_schedule=training.lr_schedule,
        warmup_steps=training.warmup_steps,
        num_steps=num_steps,
    )
    return Parts(
        config=config,
        model=model,
        lora=lora,
        task=replace(task, train=train.examples, evaluation=held_out.examples),
        num_dropped=train.num_dropped,
        num_truncated=train.num_truncated,
        rewards=rewards,
        recipe=recipe,
        schedule=schedule,
        optimizer=_make_optimizer(config, schedule),
        num_steps=num_steps,
        prompt_lengths=train.lengths,
        eval_prompt_length=max(held_out.lengths, default=0),
        eval_rewards=eval_rewards,
        categories=rows_by_category(held_out.examples, config.evaluation.category),
    )


def _make_recipe(config: Config) -> Recipe:
    """Returns the recipe that the config names and changes.

    Raises:
        ValueError: choices that contradict each other or the rest of the config.
    """
    algorithm, limit = config.algorithm, config.sampling.max_new_tokens
    choices = {field.name for field in fields(Recipe)} | CLIP_KEYWORDS
    given = {key: value for key, value in asdict(algorithm).items() if key in choices - {"name"}}
    try:
        recipe = make_recipe(algorithm.name, **given)
    except ValueError as error:
        raise ValueError(f"algorithm: {error}") from None
    if recipe.overlong_tokens(limit) > limit:
        raise ValueError(
            f"algorithm.overlong_buffer {algorithm.overlong_buffer} is more than the {limit} tokens of "
            "sampling.max_new_tokens; it counts the last tokens before that limit"
        )
    needs_kl = {"kl_target": algorithm.kl_target, "ref_sync_every": algorithm.ref_sync_every}
    for name, value in needs_kl.items():
        if value and recipe.kl_coef == 0:
            raise ValueError(
                f"algorithm.{name}: {value} needs a KL term, but {recipe.name} has kl_coef 0; set "
                "algorithm.kl_coef above 0"
            )
    return recipe


def _load_named_model(config: Config) -> Model:
    named = config.model
    return load_model(
        named.hf_model_name,
        revision=named.revision,
        dtype=named.dtype,
        implementation=named.implementation,
        remat=named.remat,
        attention=named.attention,
        chat_template=named.chat_template,
    )


def _make_lora(config: Config, model: Model) -> Lora | None:
    lora = config.lora
    if not lora.rank:
        return None
    return make_lora(
        model, rank=lora.rank, alpha=lora.resolved_alpha, targets=tuple(lora.targets), dropout=lora.dropout
    )


def _init_state(
    config: Config, model: Model, lora: Lora | None, optimizer: optax.GradientTransformation
) -> TrainState:
    if lora is None:
        return init_train_state(model.policy, model.params, optimizer)
    adapters = init_adapters(lora, jax.random.key(config.training.seed))
    return init_train_state(model.policy, adapters, optimizer, lora=lora)


def _make_optimizer(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    training = config.training
    return make_optimizer(
        schedule,
        weight_decay=training.weight_decay,
        adam_b1=training.adam_b1,
        adam_b2=training.adam_b2,
        max_grad_norm=training.max_grad_norm,
    )


def _load_rewards(config: Config, task: Task) -> tuple[tuple[Reward, ...], tuple[Reward, ...]]:
    """Returns (the rewards that train, those of evaluation only), all of different names."""
    specs = config.rewards or [
        RewardConfig(function=name, arguments=dict(task.reward_arguments.get(name, {})))
        for name in task.rewards
    ]
    if not specs:
        raise ValueError(
            "rewards: none are given, and prompts from a file have none of their own; "
            "name at least one, such as rewards: [{function: exact_match}]"
        )
    only_logged = config.evaluation.rewards
    for spec in only_logged:
        if spec.weight != 1:
            raise ValueError(
                f"evaluation.rewards: {spec.function} has the weight {spec.weight}, but they are logged one "
                "by one and never added up; leave it out"
            )
    loaded = load_rewards([*specs, *only_logged])
    return loaded[: len(specs)], loaded[len(specs) :]


def config_dict(config: Config) -> dict[str, Any]:
    """Returns the resolved config as plain nested dicts."""
    return asdict(config)


def read_config(run_dir: str | Path) -> Config:
    """Reads the resolved config of a run.

    Raises:
        ValueError: the directory holds no run, or its config is not one of this version.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run_dir} is not a run directory: it has no config.yaml")
    return parse_record(Config, ["--config", str(path)], command="grpo_jax", description="")


def write_config(config: Config) -> None:
    """Writes the resolved config into the run directory."""
    directory = Path(config.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config_dict(config), sort_keys=False)
    unfinished = directory / "config.yaml.unfinished"
    unfinished.write_text("# the resolved configuration of this run\n" + text)
    os.replace(unfinished, directory / "config.yaml")  # a kill leaves the old one or the new one


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= _flat(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat


def check_same_run(config: Config, other: Config) -> None:
    """Raises unless both configs describe the same training, apart from its length and its logging.

    Raises:
        ValueError: names every setting that differs.
    """
    mine, theirs = _flat(config_dict(config)), _flat(config_dict(other))
    different = [
        f"{key} is {theirs.get(key)!r} there and {mine.get(key)!r} here"
        for key in {**mine, **theirs}
        if mine.get(key) != theirs.get(key) and not key.startswith(_MAY_DIFFER)
    ]
    if different:
        raise ValueError(
            f"run_dir {config.run_dir} holds a run with other settings: {'; '.join(different)}. Give another "
            "run_dir, or the same settings to continue it"
        )


def load_model_or_run(name: str, *, dtype: str = "float32", chat_template: str = "auto") -> Model:
    """Loads a model, or the newest checkpoint of a run.

    Args:
        name: a model as in `load_model`, or a run directory.
        dtype: compute dtype of a model; a run has its own.
        chat_template: of a model, as in `load_model`; a run has its own.
    """
    if not (Path(name) / "config.yaml").is_file():
        return load_model(name, dtype=dtype, chat_template=chat_template)
    return load_run(name)[0]


def load_run(run_dir: str | Path, *, step: int | None = None) -> tuple[Model, int]:
    """Loads the model of a run with the parameters of one of its checkpoints.

    Args:
        run_dir: its directory.
        step: of the checkpoint; None: the newest that is whole.

    Returns:
        (the model, the checkpoint's step).

    Raises:
        ValueError: it is no run, or has no such checkpoint.
    """
    model, state, found = _restore_run(run_dir, step)
    params = policy_params(state, model.params if state.lora else None)
    return replace(model, params=params, source=str(run_dir)), found


def load_adapters(run_dir: str | Path, *, step: int | None = None) -> tuple[Model, Lora, Params, int]:
    """Loads the adapters of a run's checkpoint, apart from their base.

    Args:
        run_dir: its directory.
        step: of the checkpoint; None: the newest that is whole.

    Returns:
        (the base, what is adapted, the adapters, the checkpoint's step).

    Raises:
        ValueError: it is no run, has no such checkpoint, or trained the whole model.
    """
    if not read_config(run_dir).lora.rank:
        raise ValueError(f"the run {run_dir} trained the whole model (lora.rank is 0): it has no adapters")
    model, state, found = _restore_run(run_dir, step)
    return model, state.lora, state.params, found


def _restore_run(run_dir: str | Path, step: int | None) -> tuple[Model, TrainState, int]:
    """Returns (the model that a run started from, the state of a checkpoint, its step)."""
    config = read_config(run_dir)
    directory = Path(run_dir) / "checkpoints"
    if not directory.is_dir():
        raise ValueError(f"the run {run_dir} has no checkpoint yet")
    model = _load_named_model(config)
    lora = _make_lora(config, model)
    # Any schedule makes an optimizer state of the same shape; the run's data and rewards are not needed.
    optimizer = _make_optimizer(config, make_schedule(config.training.learning_rate))
    template = jax.eval_shape(lambda: _init_state(config, model, lora, optimizer))
    found, state, extra = restore_checkpoint(directory, template, step=step)
    if lora is not None:
        check_base(extra.get("base"), fingerprint(model.params), directory)
    return model, state, found


def restore_checkpoint(
    directory: Path, template: TrainState, *, step: int | None = None
) -> tuple[int, TrainState, dict[str, Any]]:
    """Returns a checkpoint's (step, state, JSON) without touching the directory; step None is the newest."""
    checkpoints = Checkpoints(directory, read_only=True)
    try:
        if step is None:
            step, state, extra, _ = checkpoints.restore_latest(template)
        else:
            state, extra, _ = checkpoints.restore(step, template)
    finally:
        checkpoints.close()
    return step, state, extra
