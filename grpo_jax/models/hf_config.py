"""Reads config.json, whichever version of transformers wrote it, and refuses what is not supported."""

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from grpo_jax.models.flax_configs import FAMILIES
from grpo_jax.models.interface import HFConfig
from grpo_jax.models.llama_variants import MODEL_TYPES, Settings

# Keys of config.json that begin with `_` and select no code.
HARMLESS_KEYS = {"_name_or_path", "_commit_hash", "_num_labels", "_attn_implementation_autoset"}
HARMLESS_KEYS_OF = {
    "opt": {"_remove_final_layer_norm"},  # both implementations know it (old fine-tuned checkpoints have it)
    "gemma3_text": {"_sliding_window_pattern"},  # transformers writes it, beside the layer_types made from it
}


def read_config(raw: dict, source: str) -> HFConfig:
    """Builds the configuration object from the contents of config.json.

    Args:
        raw: config.json as a dict.
        source: name of the model in messages.

    Returns:
        the transformers configuration object.

    Raises:
        ValueError: it names remote code or an unknown model type, or is no configuration of its type.
    """
    if "auto_map" in raw:
        raise ValueError(
            f"{source}: config.json has `auto_map`, code from the model's author; it is never run"
        )
    model_type = raw.get("model_type")
    supported = dict.fromkeys((*MODEL_TYPES, *FAMILIES))
    if isinstance(raw.get("text_config"), dict):
        text_type = raw["text_config"].get("model_type")
        raise ValueError(
            f"{source}: model type {model_type!r} wraps a text model ({text_type}) and others, such as one "
            "for images; save the text model alone, with what `text_config` holds as its config.json"
        )
    if model_type not in supported:
        raise ValueError(
            f"{source}: model type {model_type!r} is not supported; supported: {', '.join(supported)}"
        )
    harmless = HARMLESS_KEYS | HARMLESS_KEYS_OF.get(model_type, set())
    hidden_keys = sorted(key for key in raw if key.startswith("_") and key not in harmless)
    if hidden_keys:
        raise ValueError(
            f"{source}: config.json has {', '.join(hidden_keys)}; keys beginning with `_` can select other "
            "code than the family's own: remove them"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(_older_rope(raw))
    except Exception as error:  # whatever a configuration class raises, in several lines from version 5 on
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: config.json is no {model_type} configuration: {reason}") from None


def settings_of(config: HFConfig) -> Settings:
    """Returns the fields of a configuration, spelled as before transformers 5."""
    return _older_rope(config.to_dict())


def torch_class_name(config: HFConfig) -> str:
    """Returns the name of the PyTorch class of the same checkpoint."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]


def _older_rope(raw: dict) -> dict:
    """Spells `rope_parameters`, new in transformers 5, as `rope_theta` and `rope_scaling`.

    Gemma 3 has one entry for each type of layer. The local one was `rope_local_base_freq`.
    """
    if (rope := raw.get("rope_parameters")) is None:
        return raw
    local: dict = {}
    if raw.get("model_type") == "gemma3_text":
        rope, local = _rope_of_layers(rope)
    if not {"rope_type", "rope_theta"} <= set(rope):
        raise ValueError(f"rope_parameters={rope}: only those of one kind for all layers are supported")
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": None} | local
    if scaling != {"rope_type": "default"}:
        older["rope_scaling"] = scaling
    if different := [key for key in older if raw.get(key, older[key]) != older[key]]:
        raise ValueError(f"{different[0]}={raw[different[0]]} contradicts rope_parameters={rope}")
    return {key: value for key, value in raw.items() if key != "rope_parameters"} | older


def _rope_of_layers(rope: dict) -> tuple[dict, dict]:
    """Returns (the parameters of full attention, what the others are called in older configurations)."""
    kinds = {"full_attention", "sliding_attention"}
    if set(rope) != kinds or not all(isinstance(part, dict) for part in rope.values()):
        return rope, {}
    sliding = dict(rope["sliding_attention"])
    local = {"rope_local_base_freq": sliding.pop("rope_theta", None)}
    if sliding != {"rope_type": "default"} or local["rope_local_base_freq"] is None:
        raise ValueError(
            f"rope_parameters.sliding_attention={rope['sliding_attention']}: only rope_type default, with a "
            "rope_theta, is supported there"
        )
    return rope["full_attention"], local
