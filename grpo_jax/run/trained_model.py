"""The model of a run, what of it is trained, and the state in which its training starts."""

from dataclasses import dataclass, field, replace

import jax
import optax

from grpo_jax.config.run import Config
from grpo_jax.models.chat_templates import asks_for_time
from grpo_jax.models.loading import Model, load_model, set_endings
from grpo_jax.models.peft import make_lora
from grpo_jax.models.start_adapters import base_note, read_adapters, settings_of_adapter
from grpo_jax.policy.lora import Lora, init_adapters
from grpo_jax.run.own_optimizer import own_optimizer
from grpo_jax.training.optimizers import make_optimizer, make_schedule
from grpo_jax.training.train_state import TrainState, init_train_state
from grpo_jax.types import Params


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model and what of it is trained.

    Args:
        config: config of the run, with what the model and its adapter decide.
        model: the model.
        lora: what is adapted. `None` means that the whole model is trained.
        start_adapters: adapters that lora.start_from holds. `None` means fresh ones.
        notes: lines for the user.
    """

    config: Config
    model: Model
    lora: Lora | None
    start_adapters: Params | None = None
    notes: list[str] = field(default_factory=list)


def prepare_model(config: Config, model: Model | None) -> TrainedModel:
    """Loads the model that a config names, with the adapters to start from.

    Args:
        config: config of the run.
        model: a model that is used instead. Adapters to start from are then not read.

    Raises:
        ValueError, OSError: the model or the adapter cannot be loaded, or they do not fit.
    """
    notes: list[str] = []
    start_adapters = None
    if model is None:
        config = resolve_adapter(config)
        model = _load_named_model(config)
        lora = _make_lora(config, model)
        if config.lora.start_from is not None:
            start_adapters = read_adapters(lora, config.lora.start_from)
            notes += filter(None, [base_note(config.lora.start_from, model.source)])
    else:
        model = set_endings(model, **config.sampling.endings)
        lora = _make_lora(config, model)
    config, about_date = _with_date(config, model)
    return TrainedModel(
        config=config, model=model, lora=lora, start_adapters=start_adapters, notes=notes + about_date
    )


def build_model(config: Config) -> tuple[Model, TrainState]:
    """Loads the model that a config names. Its data and rewards need not exist.

    Returns:
        (the model, the shapes of the run's state).
    """
    model = _load_named_model(config)
    lora = _make_lora(config, model)
    # Any schedule makes an optimizer state of the same shape.
    optimizer = make_run_optimizer(config, make_schedule(config.training.learning_rate))
    return model, jax.eval_shape(lambda: init_state(config, model, lora, optimizer))


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


def _make_lora(config: Config, model: Model) -> Lora | None:
    lora = config.lora
    if not lora.rank:
        return None
    return make_lora(
        model, rank=lora.rank, alpha=lora.resolved_alpha, targets=tuple(lora.targets), dropout=lora.dropout
    )


def init_state(
    config: Config,
    model: Model,
    lora: Lora | None,
    optimizer: optax.GradientTransformation,
    adapters: Params | None = None,
) -> TrainState:
    """Makes the state of step 0."""
    if lora is None:
        return init_train_state(model.policy, model.params, optimizer)
    if adapters is None:
        adapters = init_adapters(lora, jax.random.key(config.training.seed))
    return init_train_state(model.policy, adapters, optimizer, lora=lora)


def make_run_schedule(config: Config, num_steps: int) -> optax.Schedule:
    """Makes the learning rate of each step that a config names."""
    training = config.training
    return make_schedule(
        training.learning_rate,
        lr_schedule=training.lr_schedule,
        warmup_steps=training.warmup_steps,
        num_steps=num_steps,
    )


def make_run_optimizer(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Makes the optimizer that a config names.

    Raises:
        ValueError: it names one that cannot be loaded, or that is no optimizer of optax.
    """
    training = config.training
    if training.optimizer is not None:
        return own_optimizer(training.optimizer, schedule)
    return make_optimizer(
        schedule,
        weight_decay=training.weight_decay,
        adam_b1=training.adam_b1,
        adam_b2=training.adam_b2,
        max_grad_norm=training.max_grad_norm,
    )
