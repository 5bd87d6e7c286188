"""The sections `model` and `lora` of the configuration: the language model, and what of it is trained."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_jax.config.checks import check_ranges, require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model.

    Args:
        type: what the model is trained as. `policy` is the only kind.
        hf_model_name: a local directory, a Hugging Face hub id, or `packaged:arithmetic`, a small model that
            ships with this package.
        revision: branch, tag or commit of a hub id.
        dtype: data type of the computation. Parameters and optimizer stay float32.
        implementation: code that computes the model: our `decoder`, the `flax` classes of transformers, or
            `auto`, which takes the first of these that supports the model.
        remat: what the backward pass recomputes to save memory: nothing (`none`), everything but the results
            of dense layers (`dots`), or every layer from its input (`full`). Only the decoder can do this.
        attention: `shared`, where a group's completions attend to one copy of their prompt, or `cudnn`, which
            is flash attention on an NVIDIA GPU with bfloat16. With `cudnn`, memory grows only linearly with
            the length of a row.
        chat_template: how chat messages become text: `auto` (the tokenizer's own template), `plain` (lines
            `role: content`, then `assistant:`, for models without a template), or the path of a Jinja file.
        chat_template_arguments: variables of the chat template by name, such as `enable_thinking: false`.
        chat_template_date: date, or date and time, that a chat template may print, such as `2026-11-28`.
            `null` means the date of the run's first start, also when the run is continued.
    """

    type: Literal["policy"] = "policy"
    hf_model_name: str = "packaged:arithmetic"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    implementation: Literal["auto", "decoder", "flax"] = "auto"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["shared", "cudnn"] = "shared"
    chat_template: str = "auto"
    # The type is not dict[str, Any], because the parser would then read the text `"a: b"` as a dict.
    chat_template_arguments: dict = field(default_factory=dict)
    chat_template_date: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "chat_template_arguments", spelled_values(self.chat_template_arguments))


def spelled_values(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments in which texts such as `false` are replaced by the values that they spell."""
    return {name: _scalar(value) for name, value in arguments.items()}


def _scalar(value: Any) -> Any:
    """Converts a text such as `false` or `3` to the value that it spells. "007" stays a text."""
    if not isinstance(value, str):
        return value
    if value in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[value]
    return int(value) if re.fullmatch(r"0|-?[1-9]\d{0,18}", value) else value


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters that are trained instead of the model, https://arxiv.org/abs/2106.09685; see `lora.py`.

    Args:
        rank: rank of the adapters. With 0 the whole model is trained.
        alpha: numerator of an adapter's scale, which is alpha / rank. `null` means twice the rank.
        targets: globs on the names of dense layers, or on the ends of these names: `q_proj`, `attn.c_proj`,
            `layers.0.*`. An empty list means every dense layer of attention and MLP.
        dropout: probability that an input of an adapter is zeroed, for all tokens of an update.
        start_from: directory of a LoRA adapter, saved by PEFT or by a run, from which training goes on. Rank,
            alpha and targets then come from the adapter, and any that are given must agree with it. The
            reference is the base model, as always. `null` starts with a fresh adapter, which adds nothing at
            first.
    """

    rank: int = 0
    alpha: float | None = None
    targets: list[str] = field(default_factory=list)
    dropout: float = 0.0
    start_from: str | None = None

    @property
    def resolved_alpha(self) -> float:
        """The alpha that is used."""
        return 2.0 * self.rank if self.alpha is None else float(self.alpha)

    def __post_init__(self):
        check_ranges("lora.", vars(self), _LORA_RANGES)
        if self.rank > 0 or self.start_from is not None:
            return
        needs_rank = {
            "alpha": self.alpha is not None,
            "targets": bool(self.targets),
            "dropout": self.dropout > 0,
        }
        for name, given in needs_rank.items():
            require(not given, f"lora.{name} is given, but lora.rank is 0: set it, such as to 16")


_LORA_RANGES = (
    ("rank", lambda x: x >= 0, "0 (the whole model is trained) or more"),
    ("alpha", lambda x: 0 < x < math.inf, "finite and above 0"),
    ("dropout", lambda x: 0 <= x < 1, "a probability, at least 0 and below 1"),
)
