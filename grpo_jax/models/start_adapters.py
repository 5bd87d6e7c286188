"""Reads a LoRA adapter that PEFT or a run has saved, as the start of training (`lora.start_from`).

An adapter that ours cannot represent is refused, rather than read as something else.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from grpo_jax.config.run import LoraConfig
from grpo_jax.models.directories import ADAPTER_CONFIG, read_json
from grpo_jax.models.peft import ADAPTER_TENSORS
from grpo_jax.models.tensor_files import read_tensors
from grpo_jax.policy.lora import Lora
from grpo_jax.types import Params

_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# Keys of adapter_config.json -> the values with which an adapter is no more than W + (alpha / r) A B.
_PLAIN = {
    "use_rslora": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "bias": ("none",),
    "modules_to_save": ([],),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([],),
    "megatron_config": ({},),
    # Others, such as pissa or olora, subtract something from the base.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def settings_of_adapter(lora: LoraConfig) -> LoraConfig:
    """Fills in rank, alpha and targets from the adapter that `start_from` names.

    Args:
        lora: the section `lora` of a config. If it gives rank, alpha or targets itself, they have to be the
            adapter's. Targets are patterns. They are compared once the model is known, see `read_adapters`.

    Returns:
        The same record with rank, alpha and targets given. Without `start_from` it comes back as it is.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: the adapter cannot be trained here, or has other settings.
    """
    if lora.start_from is None:
        return lora
    directory = Path(lora.start_from).expanduser()
    content = _read_config(directory)
    rank = content["r"]
    alpha = float(content["lora_alpha"])
    for name, wanted, theirs in (("rank", lora.rank or None, rank), ("alpha", lora.alpha, alpha)):
        if wanted is not None and wanted != theirs:
            raise ValueError(
                f"lora.{name}: {wanted}, but the adapter in {directory} has {theirs}; leave it out"
            )
    modules = sorted({module for module, _ in _read_pairs(directory, rank)})
    return replace(lora, rank=rank, alpha=alpha, targets=list(lora.targets) or modules)


def read_adapters(lora: Lora, start_from: str) -> Params:
    """Reads the adapters of a directory.

    Args:
        lora: the choice of what is adapted.
        start_from: the directory.

    Returns:
        The pytree of `init_adapters`, float32.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: the adapter adapts other layers, or layers of other sizes.
    """
    directory = Path(start_from).expanduser()
    tensors = _read_pairs(directory, lora.rank)
    ours = {target.module for target in lora.targets}
    theirs = {module for module, _ in tensors}
    if ours != theirs:
        extra = sorted(theirs - ours)
        absent = sorted(ours - theirs)
        which = f"adapts {extra[0]}, which lora.targets do not name" if extra else f"has no {absent[0]}"
        raise ValueError(f"lora.targets: the adapter in {directory} {which}; leave lora.targets out")
    flat = {}
    for target in lora.targets:
        wanted = {"A": (lora.rank, target.inputs), "B": (target.outputs, lora.rank)}
        for factor, shape in wanted.items():
            tensor = tensors[target.module, factor]
            if tensor.shape != shape:
                raise ValueError(
                    f"lora.start_from: lora_{factor} of {target.module} in {directory} has shape "
                    f"{tensor.shape}, and {shape} on this base; give the base model it was trained on"
                )
            flat[(*target.path, factor.lower())] = jnp.array(tensor.T, jnp.float32)
    return unflatten_dict(flat)


def base_note(start_from: str, model_name: str) -> str | None:
    """Returns a line for the user if the adapter names another base than the model, else None."""
    theirs = _read_config(Path(start_from).expanduser()).get("base_model_name_or_path")
    if not theirs or Path(str(theirs)).name == Path(model_name).name:
        return None
    return (
        f"lora.start_from: the adapter says that it was trained on {theirs}, and model.hf_model_name is "
        f"{model_name}: they have to be the same weights"
    )


def _read_config(directory: Path) -> dict[str, Any]:
    content = read_json(directory / ADAPTER_CONFIG)
    if content is None:
        raise FileNotFoundError(
            f"lora.start_from: no {ADAPTER_CONFIG} in {directory}; give a directory that PEFT has saved, or "
            "the adapter/ of a run"
        )
    where = f"lora.start_from: {directory / ADAPTER_CONFIG}"
    if content.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {content.get('peft_type')!r}; only LORA is supported")
    for key, plain in _PLAIN.items():
        value = content.get(key)
        if value is not None and value not in plain:
            raise ValueError(
                f"{where}: {key} is {value!r}, which is not supported; merge that adapter in PEFT "
                "(merge_and_unload()), and give the result as model.hf_model_name"
            )
    rank = content.get("r")
    alpha = content.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{where}: r is {rank!r}; a rank is a whole number from 1 on")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise ValueError(f"{where}: lora_alpha is {alpha!r}; it has to be a number above 0")
    return content


def _read_pairs(directory: Path, rank: int) -> dict[tuple[str, str], np.ndarray]:
    """Reads the tensors by (module, `A` or `B`). Both of each module exist, are finite and have that rank."""
    path = directory / ADAPTER_TENSORS
    if not path.is_file():
        pickled = directory / "adapter_model.bin"
        reason = " (adapter_model.bin is a pickle, which is never read)" if pickled.is_file() else ""
        raise FileNotFoundError(f"lora.start_from: no {ADAPTER_TENSORS} in {directory}{reason}")
    tensors = {}
    for name, tensor in read_tensors(path).items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(
                f"lora.start_from: {path} has {name}, which is no lora_A or lora_B of a dense layer"
            )
        tensors[found[1], found[2]] = tensor
    for module, factor in list(tensors):
        other = "B" if factor == "A" else "A"
        if (module, other) not in tensors:
            raise ValueError(f"lora.start_from: {path} has lora_{factor} of {module}, and no lora_{other}")
        tensor = tensors[module, factor]
        its_rank = tensor.shape[0 if factor == "A" else -1] if tensor.ndim == 2 else None
        if its_rank != rank:
            raise ValueError(
                f"lora.start_from: lora_{factor} of {module} in {path} has shape {tensor.shape}; the rank "
                f"is {rank}"
            )
        if not np.all(np.isfinite(tensor.astype(np.float32))):
            raise ValueError(f"lora.start_from: lora_{factor} of {module} in {path} is not finite")
    if not tensors:
        raise ValueError(f"lora.start_from: {path} has no tensors")
    return tensors
