"""Hugging Face checkpoints: configurations, tensor files, tokenizers, adapters.

The names below can be imported from here. Each loads its module when it is asked for.
"""

from grpo_jax.lazy_names import lazy_names

_MODULES = {
    "Model": "loading",
    "load_model": "loading",
    "save_model": "loading",
    "decode": "text",
    "encode": "text",
    "load_tokenizer": "tokenizer_files",
    "policy_of": "flax_objects",
}
__getattr__, __all__ = lazy_names(__name__, _MODULES)
