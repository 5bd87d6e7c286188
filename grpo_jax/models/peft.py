"""LoRA adapters of a Hugging Face model: its dense layers, and the files of PEFT."""

import json
import os
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from grpo_jax.models.directories import ADAPTER_CONFIG
from grpo_jax.models.loading import Model
from grpo_jax.models.tensor_files import write_tensors
from grpo_jax.policy.lora import Lora, Target, match_targets
from grpo_jax.types import Params

ADAPTER_TENSORS = "adapter_model.safetensors"
# PyTorch's class has Conv1D where others have Linear. Its weights are [in, out], and kernels here [out, in].
_CONV1D = ("gpt2",)


def dense_layers(model: Model) -> tuple[Target, ...]:
    """Returns every dense layer of a model in the order of their names, an untied head included."""
    layers = []
    for path, leaf in sorted(flatten_dict(model.params).items(), key=lambda item: item[0]):
        if path[-1] != "kernel" or len(leaf.shape) != 2:
            continue
        output_first = model.config.model_type in _CONV1D and path[0] != "lm_head"
        inputs, outputs = leaf.shape[::-1] if output_first else leaf.shape
        layers.append(Target(path=path, inputs=inputs, outputs=outputs, output_first=output_first))
    return tuple(layers)


def make_lora(
    model: Model, *, rank: int, alpha: float, targets: tuple[str, ...] = (), dropout: float = 0.0
) -> Lora:
    """Chooses the dense layers of a model that get an adapter.

    Args:
        model: a loaded model.
        rank: rank r of the adapters.
        alpha: numerator of the factor alpha / rank of the product.
        targets: patterns of the dense layers' names, see `match_targets`.
        dropout: probability that an input of an adapter is zeroed, see `Lora`.

    Raises:
        ValueError: a target matches no dense layer. The message lists the dense layers.
    """
    try:
        chosen = match_targets(dense_layers(model), targets)
    except ValueError as error:
        raise ValueError(f"lora.targets: {error}") from None
    return Lora(rank=rank, alpha=alpha, targets=chosen, dropout=dropout)


def check_base(theirs: str | None, ours: str, where: Path) -> None:
    """Raises unless adapters were trained on the base they are to be put on.

    Args:
        theirs: `fingerprint` of the base they were trained on.
        ours: fingerprint of the base that was loaded.
        where: path of the adapters.

    Raises:
        ValueError: the fingerprints differ.
    """
    if theirs != ours:
        raise ValueError(
            f"the adapters in {where} belong to another base model (fingerprint {theirs}; that of "
            f"model.hf_model_name is {ours}): give the weights that run was started with"
        )


def save_adapters(model: Model, lora: Lora, adapters: Params, directory: str | os.PathLike) -> None:
    """Writes a directory that `peft.PeftModel.from_pretrained` puts on top of the base model.

    Args:
        model: the base. Its params are not used.
        lora: the choice of what is adapted.
        adapters: pytree as `init_adapters` makes it.
        directory: directory, which is created if missing. Files of the same names are replaced.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pairs = flatten_dict(jax.device_get(adapters))
    tensors = {}
    for target in lora.targets:
        # PyTorch's Linear has its weights [out, in]. These two are Linear even if the layer is a Conv1D.
        for name, factor in (("lora_A", "a"), ("lora_B", "b")):
            tensors[f"base_model.model.{target.module}.{name}.weight"] = np.ascontiguousarray(
                pairs[(*target.path, factor)].T
            )
    write_tensors(directory / ADAPTER_TENSORS, tensors)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source,
        "target_modules": _target_modules(model, lora),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": any(target.output_first for target in lora.targets),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _target_modules(model: Model, lora: Lora) -> list[str]:
    """Returns PEFT's names of the targets: last parts if these name no other layer, else whole names."""
    chosen = {target.module for target in lora.targets}
    short = {name.rpartition(".")[2] for name in chosen}
    named = {t.module for t in dense_layers(model) if t.module.rpartition(".")[2] in short}
    return sorted(short if named == chosen else chosen)
