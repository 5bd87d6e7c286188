"""The arithmetic task and the model that ships with the package."""

import importlib.util
import json
from pathlib import Path

import pytest

import grpo_jax
from grpo_jax.data.tasks import TASKS, load_task
from grpo_jax.data.tasks.arithmetic import split_problems

PACKAGED = Path(grpo_jax.__file__).parent / "packaged" / "arithmetic"
SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_arithmetic.py"


def test_split_covers_every_problem_once():
    train, held_out = split_problems()
    assert len(held_out) == 512
    assert sorted(train + held_out) == [(a, b) for a in range(10, 100) for b in range(10, 100)]


def test_no_held_out_problem_is_trained_on_in_either_order():
    train, held_out = split_problems()
    spellings = {frozenset(problem) for problem in train}
    assert not any(frozenset(problem) in spellings for problem in held_out)


def test_split_is_fixed():
    # Literal, because a packaged model was pretrained without these very problems.
    _, held_out = split_problems()
    assert held_out[:4] == [(49, 95), (56, 74), (12, 70), (40, 70)]
    assert sum(a * b for a, b in held_out) == 1_571_270


def test_prefix_of_the_held_out_problems_is_a_fair_sample():
    _, held_out = split_problems()
    carries = [a % 10 + b % 10 >= 10 for a, b in held_out]
    assert abs(sum(carries[:256]) - sum(carries[256:])) < 40


def test_examples():
    task = load_task("arithmetic")
    assert task.name == "arithmetic" and task.rewards == ("exact_match",)
    for example in [*task.train[:50], *task.evaluation[:50]]:
        a, b = example.prompt.removesuffix("=").split("+")
        assert example.columns == {"answer": str(int(a) + int(b))}
        assert len(example.prompt) == 6


def test_unknown_task_lists_the_tasks_and_suggests_one():
    assert "arithmetic" in TASKS
    with pytest.raises(
        ValueError, match=r"'arithmetics'.*did you mean 'arithmetic'.*The tasks are: arithmetic"
    ):
        load_task("arithmetics")
    with pytest.raises(ValueError, match=r"'zzz' is not a built-in task\. The tasks are: arithmetic"):
        load_task("zzz")


def test_packaged_weights_have_the_pytorch_names_and_shapes():
    from safetensors import safe_open

    config = json.loads((PACKAGED / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]
    assert config["attn_pdrop"] == config["embd_pdrop"] == config["resid_pdrop"] == 0.0
    width, inner = config["n_embd"], config["n_inner"]
    expected = {
        "transformer.wte.weight": [config["vocab_size"], width],
        "transformer.wpe.weight": [config["n_positions"], width],
        "transformer.ln_f.weight": [width],
        "transformer.ln_f.bias": [width],
    }
    for i in range(config["n_layer"]):
        block = f"transformer.h.{i}"
        for norm in ("ln_1", "ln_2"):
            expected |= {f"{block}.{norm}.weight": [width], f"{block}.{norm}.bias": [width]}
        linears = {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, inner),
            "mlp.c_proj": (inner, width),
        }
        for name, (rows, columns) in linears.items():
            expected[f"{block}.{name}.weight"] = [rows, columns]  # Conv1D: [in, out]
            expected[f"{block}.{name}.bias"] = [columns]
    with safe_open(PACKAGED / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: slice_.get_shape() for name, slice_ in slices.items()} == expected
        assert {slice_.get_dtype() for slice_ in slices.values()} == {"F32"}
    assert sum(path.stat().st_size for path in PACKAGED.glob("*.safetensors")) <= 4_000_000


def test_packaged_tokenizer_round_trip():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PACKAGED)
    config = json.loads((PACKAGED / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"] == config["bos_token_id"]
    for text in ["12+34=", "12+34=46", "90-7*8 = 34"]:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text) and tokenizer.eos_token_id not in ids
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    for a, b in split_problems()[1]:
        assert len(tokenizer.encode(f"{a}+{b}=")) == 6
    assert tokenizer.decode(tokenizer.encode("7?")) == "7<|unknown|>"  # never eos


def test_packaged_model_starts_where_it_should():
    import jax
    import jax.numpy as jnp
    from transformers import FlaxGPT2LMHeadModel

    spec = importlib.util.spec_from_file_location("pretrain_arithmetic", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = FlaxGPT2LMHeadModel.from_pretrained(PACKAGED)
    held_out = split_problems()[1]
    tokens, mask = script.encode_rows(held_out, [a + b for a, b in held_out])
    score = jax.jit(lambda params: script.answer_log_probs(model, params, tokens, mask))
    log_probs, greedy = score(model.params)
    # The probability of the right answer is what sampling at temperature 1 reaches in expectation.
    assert 0.38 < jnp.exp(log_probs).mean() < 0.50
    assert 0.45 < greedy.mean() < 0.75
    assert jnp.exp(log_probs).min() > 0.05  # within reach of a group of eight, on every problem
