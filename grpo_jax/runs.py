"""A run: the parts that a config names, built and checked before anything compiles; its directory."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import optax
import yaml

from grpo_jax.actor import Actor
from grpo_jax.adapters import check_base, make_lora
from grpo_jax.checkpoints import Checkpoints
from grpo_jax.cli import parse_record
from grpo_jax.config import Config, RewardConfig
from grpo_jax.data import Example, Task, load_data
from grpo_jax.learner import TrainState, init_train_state, policy_params
from grpo_jax.lora import Lora, init_adapters
from grpo_jax.models import Model, encode, load_model
from grpo_jax.optimizers import make_optimizer, make_schedule
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
    rewards: tuple[Reward, ...]
    recipe: Recipe
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    num_steps: int  # optimizer steps of the whole run
    prompt_lengths: frozenset[int]  # token counts that occur among the training prompts
    eval_prompt_length: int

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
    rewards = _load_rewards(config, task)
    for examples in filter(None, (task.train, task.evaluation)):
        check_columns(rewards, examples[0].columns)
    model = _load_named_model(config) if model is None else model
    lora = _make_lora(config, model)
    limit = _prompt_limit(config, model)
    train, lengths, num_dropped = _fit(task.train, model, limit, config.data.over_length, "training")
    if not train:
        raise ValueError(f"all {num_dropped} training prompts have more than {limit} tokens; nothing is left")
    evaluation = task.evaluation[: config.evaluation.num_prompts]
    evaluation, eval_lengths, _ = _fit(evaluation, model, limit, config.data.over_length, "evaluation")

    recipe = _make_recipe(config)
    rollouts = max(1, math.ceil(training.num_epochs * len(train) / config.num_prompts - 1e-9))
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
        task=replace(task, train=train, evaluation=evaluation),
        num_dropped=num_dropped,
        rewards=rewards,
        recipe=recipe,
        schedule=schedule,
        optimizer=_make_optimizer(config, schedule),
        num_steps=num_steps,
        prompt_lengths=lengths,
        eval_prompt_length=max(eval_lengths, default=0),
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
    )


def _make_lora(config: Config, model: Model) -> Lora | None:
    lora = config.lora
    if not lora.rank:
        return None
    return make_lora(model, rank=lora.rank, alpha=lora.resolved_alpha, targets=tuple(lora.targets))


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


def _load_rewards(config: Config, task: Task) -> tuple[Reward, ...]:
    specs = config.rewards or [RewardConfig(function=name) for name in task.rewards]
    if not specs:
        raise ValueError(
            "rewards: none are given, and prompts from a file have none of their own; "
            "name at least one, such as rewards: [{function: exact_match}]"
        )
    return load_rewards(specs)


def _prompt_limit(config: Config, model: Model) -> int | None:
    """Returns the largest number of prompt tokens, None if nothing limits it."""
    limit, new_tokens = config.data.max_prompt_length, config.sampling.max_new_tokens
    if model.max_positions is None:
        return limit
    room = model.max_positions - new_tokens
    if room < (limit or 1):
        raise ValueError(
            f"data.max_prompt_length {limit or 1} + sampling.max_new_tokens {new_tokens} exceed the "
            f"{model.max_positions} positions of {model.source}; lower one of them"
        )
    return room if limit is None else limit


def _fit(
    examples: Sequence[Example], model: Model, limit: int | None, over_length: str, what: str
) -> tuple[Sequence[Example], frozenset[int], int]:
    """Returns (examples within the limit, their prompts' lengths in tokens, number dropped)."""
    lengths = [len(tokens) for tokens in encode(model, [example.prompt for example in examples])]
    if 0 in lengths:
        raise ValueError(f"{what} prompt {lengths.index(0)} has no tokens; every prompt needs at least one")
    if limit is None or not lengths or max(lengths) <= limit:
        return examples, frozenset(lengths), 0
    over = [i for i, length in enumerate(lengths) if length > limit]
    if over_length == "error":
        raise ValueError(
            f"{len(over)} of {len(lengths)} {what} prompts have more than {limit} tokens (the first is "
            f"number {over[0]} with {lengths[over[0]]}); shorten them, raise data.max_prompt_length "
            "if the model's positions allow, or set data.over_length: drop"
        )
    kept = [example for example, length in zip(examples, lengths, strict=True) if length <= limit]
    return kept, frozenset(n for n in lengths if n <= limit), len(over)


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


def load_model_or_run(name: str, *, dtype: str = "float32") -> Model:
    """Loads a model, or the newest checkpoint of a run.

    Args:
        name: a model as in `load_model`, or a run directory.
        dtype: compute dtype of a model; a run has its own.
    """
    if not (Path(name) / "config.yaml").is_file():
        return load_model(name, dtype=dtype)
    config = read_config(name)
    directory = Path(name) / "checkpoints"
    if not directory.is_dir():
        raise ValueError(f"the run {name} has no checkpoint yet")
    model = _load_named_model(config)
    lora = _make_lora(config, model)
    # Any schedule makes an optimizer state of the same shape; the run's data and rewards are not needed.
    optimizer = _make_optimizer(config, make_schedule(config.training.learning_rate))
    template = jax.eval_shape(lambda: _init_state(config, model, lora, optimizer))
    state, extra = _newest_state(directory, template)
    if lora is not None:
        check_base(extra.get("base"), fingerprint(model.params), directory)
    return replace(model, params=policy_params(state, model.params if lora else None), source=name)


def _newest_state(directory: Path, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state of the newest checkpoint, and its JSON, without touching the directory."""
    checkpoints = Checkpoints(directory, read_only=True)
    try:
        _, state, extra, _ = checkpoints.restore_latest(template)
    finally:
        checkpoints.close()
    return state, extra


def restore_params(directory: Path, template: TrainState) -> Params:
    """Returns the parameters of the newest checkpoint, without touching the directory."""
    return _newest_state(directory, template)[0].params
