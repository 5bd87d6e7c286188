"""A run: everything that its config names, built and checked before anything compiles."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optax

from grpo_jax.config.inert_settings import check_settings, setting_notes
from grpo_jax.config.run import Config
from grpo_jax.data.encoded_examples import tokens_of
from grpo_jax.data.given_rows import PromptRows
from grpo_jax.data.held_out import note_on_overlap, sample_held_out
from grpo_jax.data.loading import Task, load_data
from grpo_jax.data.prompt_lengths import Fitted, fit_prompts, prompt_limit
from grpo_jax.evaluation.categories import rows_by_category
from grpo_jax.evaluation.verdicts import Correct
from grpo_jax.models.endings import end_arguments, stop_notes, turn_end_note
from grpo_jax.models.loading import Model, decode
from grpo_jax.objective.recipes import Recipe
from grpo_jax.policy.lora import Lora, merge_adapters
from grpo_jax.rewards.judging import reach_verdict
from grpo_jax.rewards.loading import Reward
from grpo_jax.run.effective_config import named_recipe
from grpo_jax.run.first_look import notes_about_prompts, show_first_prompt
from grpo_jax.run.named_rewards import check_data_columns, choose_rule, drop_bad_rows, load_named_rewards
from grpo_jax.run.own_optimizer import takes_schedule
from grpo_jax.run.trained_model import init_state, make_run_optimizer, make_run_schedule, prepare_model
from grpo_jax.training.actor import Actor
from grpo_jax.training.train_state import TrainState
from grpo_jax.types import Example, Params


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run is made of, built from its config and checked.

    Args:
        config: config of the run.
        model: the model that is trained or carries the adapters.
        lora: what is adapted. `None` means that the whole model is trained.
        task: prompts and held-out prompts that are used, without those over the limit.
        num_dropped: number of training prompts over the limit that were dropped.
        num_truncated: number of training prompts over the limit that lost their beginning.
        rewards: reward functions that train.
        recipe: the objective.
        schedule: learning rate of each step.
        optimizer: the optimizer.
        num_steps: number of optimizer steps of the whole run.
        prompt_lengths: token counts that occur among the training prompts.
        held_out: all held-out prompts, of which `task.evaluation` is the sample in use.
        eval_prompt_length: length of the longest held-out prompt in use, in tokens.
        correct: rule of what counts as correct.
        eval_rewards: reward functions that are logged in evaluation and never trained on.
        categories: category -> rows of `task.evaluation`.
        first_prompt: lines that show the first prompt as tokens.
        start_adapters: adapters that lora.start_from holds. `None` means fresh ones.
        notes: what the user should know before the first step, a line each.
    """

    config: Config
    model: Model
    lora: Lora | None
    task: Task
    num_dropped: int
    num_truncated: int
    rewards: tuple[Reward, ...]
    recipe: Recipe
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    num_steps: int
    prompt_lengths: frozenset[int]
    held_out: Sequence[Example]
    eval_prompt_length: int
    correct: Correct
    eval_rewards: tuple[Reward, ...] = ()
    categories: Mapping[str, Sequence[int]] = field(default_factory=dict)
    first_prompt: tuple[str, ...] = ()
    start_adapters: Params | None = None
    notes: tuple[str, ...] = ()

    @property
    def takes_schedule(self) -> bool:
        """Whether the learning rate of the config has a part in the optimizer."""
        return takes_schedule(self.config.training.optimizer)

    @property
    def prompt_length(self) -> int:
        """S of every Experience, the length of the longest training prompt."""
        return max(self.prompt_lengths)

    @property
    def sampling(self) -> dict[str, float]:
        """The traced sampling settings of `generate`."""
        sampling = self.config.sampling
        return {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
        }

    @property
    def needs_reference(self) -> bool:
        """Whether the reference takes part at all."""
        return self.recipe.kl_coef > 0

    @property
    def needs_ref_log_probs(self) -> bool:
        """Whether a rollout needs log-probs of the reference. An exact KL reads its parameters instead."""
        return self.needs_reference and not self.recipe.exact_kl

    @property
    def rescores_rollout(self) -> bool:
        """Whether the policy computes the log-probs of its rollouts before the update.

        More than one update from a rollout needs them, and so do some recipes.
        """
        return self.config.updates_per_rollout > 1 or self.recipe.needs_old_log_probs

    def actor(self) -> Actor:
        """Makes the actor of this run."""
        return Actor(
            **actor_inputs(self.model, self.rewards),
            recipe=self.recipe,
            group_size=self.config.algorithm.group_size,
            prompt_length=self.prompt_length,
            max_new_tokens=self.config.sampling.max_new_tokens,
            sampling=self.sampling,
            num_microbatches=self.config.training.num_microbatches,
            num_minibatches=self.config.algorithm.num_minibatches,
            max_rounds=self.config.algorithm.max_sampling_rounds,
            rescores_rollout=self.rescores_rollout,
        )

    def init_state(self) -> TrainState:
        """Makes the state of step 0."""
        return init_state(self.config, self.model, self.lora, self.optimizer, self.start_adapters)

    def start_params(self) -> Params:
        """Returns the policy's parameters before the first update: the model with its start adapters."""
        if self.start_adapters is None:
            return self.model.params
        return merge_adapters(self.lora, self.model.params, self.start_adapters)


def actor_inputs(model: Model, rewards: Sequence[Reward]) -> dict[str, Any]:
    """Returns what an `Actor` needs of a model and its rewards: functions, and what ends a completion."""
    return {
        "policy": model.policy,
        "encode": functools.partial(tokens_of, model),
        "decode": functools.partial(decode, model),
        "judge": functools.partial(reach_verdict, rewards),
        "reward_weights": {reward.name: reward.weight for reward in rewards},
        **end_arguments(model),
    }


def build(config: Config, *, model: Model | None = None, prompts: PromptRows | None = None) -> Run:
    """Loads and checks everything that a config names. It compiles nothing.

    Args:
        config: config of the run.
        model: a model that is used instead of the one that the config names.
        prompts: rows that are used instead of those that the config names.

    Raises:
        ValueError, OSError, ImportError: something that the user gave is wrong, and the message names it.
    """
    task = load_data(config.data, prompts)
    notes = list(task.notes)
    rewards, eval_rewards = load_named_rewards(config, task)
    check_data_columns(task, rewards, eval_rewards)
    recipe = _make_recipe(config)
    check_settings(config, recipe, num_rewards=len(rewards))
    task = drop_bad_rows(config, task, rewards, eval_rewards, notes)
    correct = choose_rule(config, task, rewards, eval_rewards, notes)
    trained = prepare_model(config, model)
    config = trained.config
    model = trained.model
    notes += trained.notes
    train, held_out = _fit_prompts(config, model, task, notes)
    num_steps = _num_steps(config, len(train.examples))
    notes += setting_notes(config, recipe, num_held_out=len(held_out.examples), num_steps=num_steps)
    schedule = make_run_schedule(config, num_steps)
    return Run(
        config=config,
        model=model,
        lora=trained.lora,
        start_adapters=trained.start_adapters,
        task=replace(task, train=train.examples, evaluation=held_out.examples),
        num_dropped=train.num_dropped,
        num_truncated=train.num_truncated,
        rewards=rewards,
        recipe=recipe,
        schedule=schedule,
        optimizer=make_run_optimizer(config, schedule),
        num_steps=num_steps,
        prompt_lengths=train.lengths,
        held_out=task.evaluation,
        eval_prompt_length=max(held_out.lengths, default=0),
        correct=correct,
        eval_rewards=eval_rewards,
        categories=rows_by_category(held_out.examples, config.evaluation.category),
        first_prompt=tuple(show_first_prompt(model, train.examples)),
        notes=tuple(notes),
    )


def _num_steps(config: Config, num_prompts: int) -> int:
    """Returns the number of optimizer steps of the whole run."""
    if config.training.num_steps is not None:
        return config.training.num_steps
    # The small number keeps a whole number of rollouts whole, in spite of rounding.
    rollouts = math.ceil(config.training.num_epochs * num_prompts / config.num_prompts - 1e-9)
    return max(1, rollouts) * config.updates_per_rollout


def _fit_prompts(config: Config, model: Model, task: Task, notes: list[str]) -> tuple[Fitted, Fitted]:
    """Applies the limit on prompts, and notes what is odd about them.

    Returns:
        (training prompts, the held-out prompts that are used).

    Raises:
        ValueError: no training prompt is left, or one is over the limit and data.over_length is `error`.
    """
    limit = prompt_limit(model, config.data.max_prompt_length, config.sampling.max_new_tokens)
    fit = functools.partial(
        fit_prompts,
        model=model,
        limit=limit,
        over_length=config.data.over_length,
        on_bad_row=config.data.on_bad_row,
    )
    train = fit(task.train, what="training")
    if not train.examples:
        raise ValueError(
            f"all {train.num_dropped} training prompts have more than {limit} tokens; nothing is left"
        )
    if any(not isinstance(example.prompt, str) for example in train.examples):
        notes += filter(None, [turn_end_note(model)])
    notes += stop_notes(model)
    formats = [spec.arguments for spec in config.rewards if spec.function == "think_format"]
    template_is_given = config.model.chat_template != "auto"
    notes += notes_about_prompts(model, train.examples, formats, template_is_given=template_is_given)
    sample = sample_held_out(task.evaluation, config.evaluation.num_prompts)
    notes += filter(None, [note_on_overlap(task.train, task.evaluation, sample)])
    held_out = fit(sample, what="evaluation")
    notes += filter(None, [train.note, held_out.note])
    return train, held_out


def _make_recipe(config: Config) -> Recipe:
    """Returns the recipe that the config names and changes.

    Raises:
        ValueError: choices that contradict each other or the rest of the config.
    """
    algorithm = config.algorithm
    limit = config.sampling.max_new_tokens
    try:
        recipe = named_recipe(config)
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
