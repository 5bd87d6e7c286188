"""A run: everything that its config names, built and checked before anything compiles."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import jax
import optax

from grpo_jax.config.inert_settings import check_settings, setting_notes
from grpo_jax.config.run import Config, RewardConfig
from grpo_jax.data.bad_rows import BadRow, settle
from grpo_jax.data.encoded_examples import tokens_of
from grpo_jax.data.held_out import note_on_overlap, sample_held_out
from grpo_jax.data.loading import Task, load_data
from grpo_jax.data.prompt_lengths import fit_prompts, prompt_limit
from grpo_jax.evaluation.categories import rows_by_category
from grpo_jax.evaluation.verdicts import Correct, choose_correct, note_on_choice
from grpo_jax.models.chat_templates import asks_for_time
from grpo_jax.models.endings import end_arguments, stop_notes, turn_end_note
from grpo_jax.models.loading import Model, decode, load_model, set_endings
from grpo_jax.models.peft import make_lora
from grpo_jax.models.start_adapters import base_note, read_adapters, settings_of_adapter
from grpo_jax.objective.recipes import CLIP_KEYWORDS, Recipe, make_recipe
from grpo_jax.policy.lora import Lora, init_adapters, merge_adapters
from grpo_jax.rewards.judging import reach_verdict
from grpo_jax.rewards.loading import Reward, check_columns, check_rows, load_rewards
from grpo_jax.run.first_look import notes_about_prompts, show_first_prompt
from grpo_jax.training.actor import Actor
from grpo_jax.training.learner import TrainState, init_train_state
from grpo_jax.training.optimizers import make_optimizer, make_schedule
from grpo_jax.types import Example, Params


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run is made of, built from its config and checked."""

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
    held_out: Sequence[Example]  # all that there are; task.evaluation is the sample in use
    eval_prompt_length: int
    correct: Correct  # what counts as correct
    eval_rewards: tuple[Reward, ...] = ()  # logged in evaluation, never trained on
    categories: Mapping[str, Sequence[int]] = field(default_factory=dict)  # category -> held-out rows
    first_prompt: tuple[str, ...] = ()  # lines that show it as tokens
    start_adapters: Params | None = None  # what lora.start_from holds; None: fresh ones
    notes: tuple[str, ...] = ()  # what the user should know before the first step, a line each

    @property
    def prompt_length(self) -> int:
        """S of every Experience: the longest training prompt."""
        return max(self.prompt_lengths)

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
    def needs_ref_log_probs(self) -> bool:
        """Whether a rollout needs log-probs of the reference. An exact KL reads its parameters instead."""
        return self.needs_reference and not self.recipe.exact_kl

    @property
    def rescores_rollout(self) -> bool:
        """Whether the policy scores its own rollouts before the update: for more than one update from each,
        or for what the recipe makes of those scores before it.
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
        return _init_state(self.config, self.model, self.lora, self.optimizer, self.start_adapters)

    def start_params(self) -> Params:
        """Returns the policy's parameters before the first update: the model with its start adapters."""
        if self.start_adapters is None:
            return self.model.params
        return merge_adapters(self.lora, self.model.params, self.start_adapters)


def actor_inputs(model: Model, rewards: Sequence[Reward]) -> dict[str, Any]:
    """Returns what an `Actor` is handed of a model and its rewards: functions, and what ends a completion."""
    return {
        "policy": model.policy,
        "encode": functools.partial(tokens_of, model),
        "decode": functools.partial(decode, model),
        "judge": functools.partial(reach_verdict, rewards),
        "reward_weights": {reward.name: reward.weight for reward in rewards},
        **end_arguments(model),
    }


def build(config: Config, *, model: Model | None = None) -> Run:
    """Loads and checks everything a config names. Compiles nothing.

    Args:
        config: of the run.
        model: used instead of loading the one the config names.

    Raises:
        ValueError, OSError, ImportError: something the user gave is wrong; the message names it.
    """
    training = config.training
    task = load_data(config.data)
    notes = list(task.notes)
    rewards, eval_rewards = _load_rewards(config, task)
    for examples in filter(None, (task.train, task.evaluation)):
        check_columns(rewards, examples[0].columns)
    recipe = _make_recipe(config)
    check_settings(config, recipe, num_rewards=len(rewards))
    if task.evaluation:
        check_columns(eval_rewards, task.evaluation[0].columns)
    task, about_rows = _without_bad_rows(config, task, rewards, eval_rewards)
    notes += about_rows
    correct = _choose_correct(config, task, rewards, eval_rewards, notes)
    if model is None:  # the run itself: what it starts from has to be there
        config = resolve_adapter(config)
        model = _load_named_model(config)
        lora = _make_lora(config, model)
        start_adapters = _read_start(config, lora)
        notes += filter(None, [base_note(config.lora.start_from, model.source)] if start_adapters else [])
    else:
        model = set_endings(model, **config.sampling.endings)
        lora, start_adapters = _make_lora(config, model), None
    config, about_date = _with_date(config, model)
    notes += about_date
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
    given = config.model.chat_template != "auto"
    notes += notes_about_prompts(model, train.examples, formats, template_is_given=given)
    sample = sample_held_out(task.evaluation, config.evaluation.num_prompts)
    notes += filter(None, [note_on_overlap(task.train, task.evaluation, sample)])
    held_out = fit(sample, what="evaluation")
    notes += filter(None, [train.note, held_out.note])

    rollouts = max(1, math.ceil(training.num_epochs * len(train.examples) / config.num_prompts - 1e-9))
    num_steps = training.num_steps or rollouts * config.updates_per_rollout
    notes += setting_notes(config, recipe, num_held_out=len(held_out.examples), num_steps=num_steps)
    schedule = make_schedule(
        training.learning_rate,
        lr_schedule=training.lr_schedule,
        warmup_steps=training.warmup_steps,
        num_steps=num_steps,
    )
    return Run(
        config=config,
        model=model,
        lora=lora,
        start_adapters=start_adapters,
        task=replace(task, train=train.examples, evaluation=held_out.examples),
        num_dropped=train.num_dropped,
        num_truncated=train.num_truncated,
        rewards=rewards,
        recipe=recipe,
        schedule=schedule,
        optimizer=_make_optimizer(config, schedule),
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


def _without_bad_rows(
    config: Config, task: Task, rewards: Sequence[Reward], eval_rewards: Sequence[Reward]
) -> tuple[Task, list[str]]:
    """Checks every row with the rewards that will judge it: (task of the rows that are left, notes).

    Raises:
        ValueError: a reward cannot judge a row, and data.on_bad_row is `error`.
    """
    sides = {
        "training": (task.train, rewards),
        "evaluation": (task.evaluation, (*rewards, *eval_rewards)),
    }
    kept: list[Sequence[Example]] = []
    notes: list[str] = []
    for what, (examples, judges) in sides.items():
        reasons = dict(check_rows(judges, examples))
        bad = [
            BadRow(examples[index].place or f"{what} prompt {index}", reason)
            for index, reason in reasons.items()
        ]
        note = settle(bad, len(examples), on_bad_row=config.data.on_bad_row, what=what)
        notes += [note] if note else []
        kept.append([e for i, e in enumerate(examples) if i not in reasons] if bad else examples)
    return replace(task, train=kept[0], evaluation=kept[1]), notes


def build_model(config: Config) -> tuple[Model, TrainState]:
    """Loads the model that a config names; its data and rewards need not be there.

    Returns:
        (the model, the shapes of the run's state).
    """
    model = _load_named_model(config)
    lora = _make_lora(config, model)
    # Any schedule makes an optimizer state of the same shape.
    optimizer = _make_optimizer(config, make_schedule(config.training.learning_rate))
    return model, jax.eval_shape(lambda: _init_state(config, model, lora, optimizer))


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
        chat_template_arguments=named.chat_template_arguments or None,
        chat_template_date=named.chat_template_date,
        **config.sampling.endings,
    )


def _with_date(config: Config, model: Model) -> tuple[Config, list[str]]:
    """Returns the config with the date that the chat template may print, if it asks for one, and notes."""
    given = config.model.chat_template_date
    if asks_for_time(model.tokenizer, model.chat):
        date = model.chat.now.isoformat()
        return replace(config, model=replace(config.model, chat_template_date=date)), []
    unused = "model.chat_template_date changes nothing: the chat template does not print a date"
    return config, [] if given is None else [unused]


def resolve_adapter(config: Config) -> Config:
    """Returns a config whose LoRA settings are those of the adapter that `lora.start_from` names, if any.

    Raises:
        ValueError, OSError: see `settings_of_adapter`.
    """
    return replace(config, lora=settings_of_adapter(config.lora))


def _read_start(config: Config, lora: Lora | None) -> Params | None:
    return None if config.lora.start_from is None else read_adapters(lora, config.lora.start_from)


def _make_lora(config: Config, model: Model) -> Lora | None:
    lora = config.lora
    if not lora.rank:
        return None
    return make_lora(
        model, rank=lora.rank, alpha=lora.resolved_alpha, targets=tuple(lora.targets), dropout=lora.dropout
    )


def _init_state(
    config: Config,
    model: Model,
    lora: Lora | None,
    optimizer: optax.GradientTransformation,
    adapters: Params | None = None,
) -> TrainState:
    if lora is None:
        return init_train_state(model.policy, model.params, optimizer)
    if adapters is None:
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
    if not any(spec.weight for spec in specs):
        raise ValueError("rewards: every weight is 0, so nothing would be learned; give one another weight")
    only_logged = config.evaluation.rewards
    for spec in only_logged:
        if spec.weight != 1:
            raise ValueError(
                f"evaluation.rewards: {spec.function} has the weight {spec.weight}, but they are logged one "
                "by one and never added up; leave it out"
            )
    loaded = load_rewards([*specs, *only_logged])
    return loaded[: len(specs)], loaded[len(specs) :]


def _choose_correct(
    config: Config, task: Task, rewards: Sequence[Reward], eval_rewards: Sequence[Reward], notes: list[str]
) -> Correct:
    """Returns what counts as correct; a choice between several rewards is noted."""
    wanted = config.evaluation.correct
    correct = choose_correct(
        rewards,
        eval_rewards,
        columns=task.train[0].columns,
        name=wanted.reward,
        threshold=wanted.threshold,
    )
    evaluates = bool(task.evaluation) and config.evaluation.num_prompts > 0
    note = note_on_choice(correct, rewards, eval_rewards)
    if evaluates and wanted.reward is None and note is not None:
        notes.append(note)
    return correct
