"""The implementations that can compute a model: our own decoder, or the Flax classes of transformers."""

from typing import Any

from grpo_jax.models import decoder_families, flax_families

IMPLEMENTATIONS = {"decoder": decoder_families, "flax": flax_families}  # in the order of preference


def choose_implementation(config: Any, wanted: str, *, source: str) -> str:
    """Returns the implementation that computes a configuration as PyTorch does.

    Args:
        config: the transformers configuration object.
        wanted: a key of IMPLEMENTATIONS, or `auto` for the first that is right.
        source: name of the model in messages.

    Returns:
        a key of IMPLEMENTATIONS.

    Raises:
        ValueError: there is no such implementation. The message has every reason.
    """
    if wanted not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"implementation {wanted!r}: choose one of auto, {', '.join(IMPLEMENTATIONS)}")
    candidates = IMPLEMENTATIONS if wanted == "auto" else (wanted,)
    reasons = {name: [*IMPLEMENTATIONS[name].problems(config)] for name in candidates}
    for name in candidates:
        if not reasons[name]:
            return name
    # The first one that knows the type at all is the one that would have to do it.
    blamed = "decoder" if config.model_type in decoder_families.MODEL_TYPES else "flax"
    blamed, by = (blamed, "") if wanted == "auto" else (wanted, f" with model.implementation: {wanted}")
    raise ValueError(
        f"{source}: this {config.model_type} configuration is not supported{by}: {'; '.join(reasons[blamed])}"
    )
