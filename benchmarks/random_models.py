"""Randomly initialised GPT-2 directories of any shape, to time things on; made once and kept.

    python benchmarks/random_models.py mid                    # prints the directory
    python benchmarks/random_models.py 4x256x8x4096x1024      # layers, width, heads, vocabulary, positions

Weights are as GPT-2 starts them, in PyTorch names and layouts; token i is the word `t<i>`, the last one
`<|endoftext|>`. PyTorch transformers and `load_model` both open the directory; torch is not needed.
"""

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

EOS = "<|endoftext|>"


@dataclass(frozen=True)
class Shape:
    """Of a GPT-2: the MLP is four times as wide as the model, the head is tied to the embedding."""

    layers: int
    width: int
    heads: int
    vocab: int
    positions: int

    def __str__(self) -> str:
        return "x".join(map(str, astuple(self)))


SHAPES = {
    "small": Shape(4, 128, 4, 96, 256),
    "mid": Shape(6, 384, 6, 8192, 512),
    "124m": Shape(12, 768, 12, 50257, 1024),
}


def parse_shape(name: str) -> Shape | None:
    """Returns the shape of a name in SHAPES or of five numbers with `x` between them, None for other text."""
    numbers = name.split("x")
    if name in SHAPES or len(numbers) != 5 or not all(number.isdecimal() for number in numbers):
        return SHAPES.get(name)
    return Shape(*map(int, numbers))


def init_tensors(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Makes the float32 tensors of a fresh GPT-2 by their PyTorch names.

    N(0, 0.02), and N(0, 0.02 / sqrt(2 layers)) for what is added to the residual stream; biases 0, norms 1.
    """
    random, d = np.random.default_rng(seed), shape.width

    def normal(*size: int, std: float = 0.02) -> np.ndarray:
        return random.standard_normal(size, np.float32) * np.float32(std)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}.weight": np.ones(d, np.float32), f"{name}.bias": np.zeros(d, np.float32)}

    def dense(name: str, rows: int, columns: int, std: float = 0.02) -> dict[str, np.ndarray]:
        kernel = normal(rows, columns, std=std)
        return {f"{name}.weight": kernel, f"{name}.bias": np.zeros(columns, np.float32)}

    residual = 0.02 / (2 * shape.layers) ** 0.5
    tensors = {"wte.weight": normal(shape.vocab, d), "wpe.weight": normal(shape.positions, d)}
    for i in range(shape.layers):
        tensors |= norm(f"h.{i}.ln_1")
        tensors |= dense(f"h.{i}.attn.c_attn", d, 3 * d)
        tensors |= dense(f"h.{i}.attn.c_proj", d, d, residual)
        tensors |= norm(f"h.{i}.ln_2")
        tensors |= dense(f"h.{i}.mlp.c_fc", d, 4 * d)
        tensors |= dense(f"h.{i}.mlp.c_proj", 4 * d, d, residual)
    tensors |= norm("ln_f")
    return {f"transformer.{name}": tensor for name, tensor in tensors.items()}


def make_config(shape: Shape) -> dict:
    """Makes the contents of config.json: GPT-2, without dropout."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": shape.layers,
        "n_embd": shape.width,
        "n_head": shape.heads,
        "n_inner": None,
        "vocab_size": shape.vocab,
        "n_positions": shape.positions,
        "bos_token_id": shape.vocab - 1,
        "eos_token_id": shape.vocab - 1,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "initializer_range": 0.02,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "reorder_and_upcast_attn": False,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": "float32",
    }


def write_tokenizer(directory: Path, shape: Shape) -> None:
    """Writes a word-level tokenizer: one word, one token."""
    vocabulary = {f"t{i}": i for i in range(shape.vocab - 1)} | {EOS: shape.vocab - 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    words.save(str(directory / "tokenizer.json"))
    roles = {"bos_token": EOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.positions,
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "special_tokens_map.json").write_text(json.dumps(roles, indent=2) + "\n")


def write_model(directory: Path, shape: Shape, seed: int = 0) -> None:
    """Writes a model directory, which must exist."""
    config = make_config(shape)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_file(init_tensors(shape, seed), directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(directory, shape)


def default_cache() -> Path:
    """Returns the folder in the user's cache directory where the models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo_jax" / "random_models"


def find_model(name: str, *, cache: Path | None = None, seed: int = 0) -> str:
    """Returns the directory of a model, which is made if it does not exist yet.

    Args:
        name: as in `parse_shape`; anything else is the directory of a model and returned as it is.
        cache: where models are kept; None: `default_cache()`.
        seed: of the weights.
    """
    shape = parse_shape(name)
    if shape is None:
        return name
    directory = (default_cache() if cache is None else cache) / f"gpt2-{shape}-seed{seed}"
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=directory.parent))
        write_model(unfinished, shape, seed)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(directory)
        except OSError:  # another process was first
            shutil.rmtree(unfinished)
    return str(directory)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="+", help=f"{', '.join(SHAPES)}, or five numbers")
    parser.add_argument(
        "--cache", type=Path, help="where models are kept (default: the user's cache directory)"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in arguments.names:
        if parse_shape(name) is None:
            parser.error(f"{name!r} is no shape")
        print(find_model(name, cache=arguments.cache, seed=arguments.seed))


if __name__ == "__main__":
    main()
