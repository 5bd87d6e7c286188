"""The implementations that can compute a model: our own decoder, or the Flax classes of transformers."""

from grpo_jax.models import decoder_families
from grpo_jax.models.interface import HFConfig, Implementation
from grpo_jax.models.llama_variants import MODEL_TYPES

IMPLEMENTATIONS = ("decoder", "flax")  # in the order of preference


def load_implementation(name: str) -> Implementation:
    """Returns the module of an implementation, an entry of IMPLEMENTATIONS.

    Raises:
        ImportError: it is `flax`, and transformers has no Flax classes, as from version 5 on.
    """
    if name == "flax":
        from grpo_jax.models import flax_families  # Most models do without it, and without Flax classes.

        return flax_families
    return decoder_families


def choose_implementation(config: HFConfig, wanted: str, *, source: str) -> str:
    """Returns the implementation that computes a configuration as PyTorch does.

    Args:
        config: the transformers configuration object.
        wanted: an entry of IMPLEMENTATIONS, or `auto` for the first that is right.
        source: name of the model in messages.

    Returns:
        an entry of IMPLEMENTATIONS.

    Raises:
        ValueError: there is no such implementation. The message has every reason.
    """
    if wanted not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"implementation {wanted!r}: choose one of auto, {', '.join(IMPLEMENTATIONS)}")
    reasons = {}
    for name in IMPLEMENTATIONS if wanted == "auto" else (wanted,):
        reasons[name] = _reasons_against(name, config)
        if not reasons[name]:
            return name
    if wanted == "auto":
        # The reasons that matter are those of the first implementation that knows the model type at all.
        blamed = "decoder" if config.model_type in MODEL_TYPES else "flax"
        setting = ""
    else:
        blamed = wanted
        setting = f" with model.implementation: {wanted}"
    raise ValueError(
        f"{source}: this {config.model_type} configuration is not supported{setting}: "
        f"{'; '.join(reasons[blamed])}"
    )


def _reasons_against(name: str, config: HFConfig) -> list[str]:
    try:
        implementation = load_implementation(name)
    except ImportError as error:
        return [str(error)]
    return [*implementation.problems(config)]
