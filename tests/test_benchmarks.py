"""The benchmarks' own parts: what they count, the models they make, the commands they run."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.models.loading import decode, encode, load_model, pad_prompts
from grpo_jax.policy.decoding import generate
from grpo_jax.policy.log_probs import completion_hidden
from grpo_jax.types import Rollout

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import memory
import old_new
import peers
import random_models
import scaling
import step
import work

TINY = "1x64x2x96x64"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return random_models.find_model(TINY, cache=tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory)


# What is counted


def test_flops_by_a_loop_over_tokens():
    lengths, prompt, prompts = [5, 1, 3, 3], 7, 2
    block, head, attention = 1000, 90, 16
    flops = 0
    for _ in range(prompts):
        for position in range(prompt):
            flops += 2 * block + 4 * attention * (position + 1)
    for length in lengths:
        flops += 2 * head * length
        for token in range(length - 1):  # the last one is drawn, and never run
            flops += 2 * block + 4 * attention * (prompt + token + 1)
    sizes = {"prompt": prompt, "prompts": prompts, "block": block, "head": head, "attention": attention}
    assert work.forward_flops(lengths, **sizes) == flops
    with_reference = work.step_flops(lengths, reference=True, **sizes)
    assert (with_reference.generate, with_reference.score, with_reference.update) == (flops, flops, 3 * flops)
    assert with_reference.step == 5 * flops
    assert work.step_flops(lengths, reference=False, **sizes).step == 4 * flops


def test_flops_are_those_of_the_real_forward(tmp_path):
    # XLA also counts what is no matmul, and the half of the attention that is masked: a few per cent here.
    model = load_model(random_models.find_model("2x256x4x512x64", cache=tmp_path))
    prompts, group, prompt, completion = 2, 4, 8, 9
    rows = prompts * group
    rollout = Rollout(
        prompt_tokens=jnp.zeros((rows, prompt), jnp.int32),
        prompt_mask=jnp.ones((rows, prompt), bool),
        tokens=jnp.zeros((rows, completion), jnp.int32),
        mask=jnp.ones((rows, completion), bool),
        log_probs=None,
        kept_mass=None,
        finished=None,
    )

    def logits(params, rollout):
        hidden = completion_hidden(model.policy, params, rollout, group_size=group)
        return model.policy.unembed(params, hidden)

    measured = jax.jit(logits).lower(model.params, rollout).compile().cost_analysis()["flops"]
    block = step.block_parameters(model.params)
    assert block == 2 * 12 * 256**2
    counted = work.forward_flops(
        [completion] * rows, prompt=prompt, prompts=prompts, block=block, head=512 * 256, attention=2 * 256
    )
    assert 1 < measured / counted < 1.06


def test_phases_add_up_to_the_step():
    metrics = {
        "time/generate": 1.0,
        "time/reward": 0.25,
        "time/score": 0.5,
        "time/update": 2.0,
        "step_time": 4.0,
    }
    seconds = step.phase_seconds(metrics)
    assert tuple(seconds) == step.PHASES
    assert seconds == {"generate": 1.0, "score": 0.75, "update": 2.0, "host": 0.25, "step": 4.0}


# The models


def test_a_random_model_opens_and_starts_like_gpt2(directory, model):
    shape = random_models.parse_shape(TINY)
    assert sum(x.size for x in jax.tree.leaves(model.params)) == (
        (96 + 64) * 64 + (4 * 64 + (64 + 1) * 4 * 64 + (64 + 1) * 256 + (256 + 1) * 64) + 2 * 64
    )
    assert model.eos_ids == (95,) and model.max_positions == 64
    tensors = random_models.init_tensors(shape)
    stds = {name.removeprefix("transformer."): float(x.std()) for name, x in tensors.items()}
    assert stds["wte.weight"] == pytest.approx(0.02, rel=0.05)
    assert stds["h.0.mlp.c_fc.weight"] == pytest.approx(0.02, rel=0.05)
    assert stds["h.0.mlp.c_proj.weight"] == pytest.approx(0.02 / 2**0.5, rel=0.05)
    embedding = model.params["transformer"]["wte"]["embedding"]
    np.testing.assert_array_equal(embedding, tensors["transformer.wte.weight"])
    kernel = model.params["transformer"]["h"]["0"]["attn"]["c_attn"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["transformer.h.0.attn.c_attn.weight"].T)


def test_a_random_model_is_made_once_and_depends_on_its_seed(directory):
    cache, before = Path(directory).parent, Path(directory, "model.safetensors").stat().st_mtime_ns
    assert random_models.find_model(TINY, cache=cache) == directory
    assert Path(directory, "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in cache.iterdir()] == [Path(directory).name]
    shape = random_models.parse_shape(TINY)
    one, other = (random_models.init_tensors(shape, seed)["transformer.wte.weight"] for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert random_models.find_model("some/directory", cache=cache) == "some/directory"


def test_prompts_have_exactly_their_length(model):
    prompts = work.prompt_rows(5, 12)
    sequences = encode(model, prompts)
    assert [len(sequence) for sequence in sequences] == [12] * 5
    assert len(set(map(tuple, sequences))) == 5
    tokens = np.asarray(sequences)
    assert decode(model, tokens, np.ones(tokens.shape, bool)) == prompts


def test_completions_end_with_the_hazard_asked_for(model):
    mean, limit = 5.0, 31  # one compiled loop
    ending = step.end_with_hazard(model, mean)
    prompts = pad_prompts(encode(ending, work.prompt_rows(8, 8)), 8)
    rollout = generate(
        ending.policy,
        ending.params,
        prompts,
        jax.random.key(0),
        group_size=128,
        max_new_tokens=limit,
        eos_ids=jnp.asarray(ending.eos_ids),
    )
    lengths = np.asarray(rollout.mask).sum(axis=1)
    # 1024 lengths of standard deviation 4.5: the mean is known to 0.14, one that never ends is rare
    assert abs(lengths.mean() - mean) < 0.5
    assert np.mean(lengths == 1) == pytest.approx(1 / mean, abs=0.04)
    assert np.mean(rollout.finished) > 0.99


@pytest.mark.parametrize("text", ["geometric", "geometric:", "geometric:1", "geometric:x", "short"])
def test_unknown_lengths_are_refused(text):
    with pytest.raises(ValueError, match="geometric:MEAN"):
        step.parse_lengths(text)


def test_lengths():
    assert step.parse_lengths("full") is None
    assert step.parse_lengths("geometric:16") == 16.0


# A step, and what is said about it


@pytest.fixture(scope="module")
def measured():
    sizes = work.Work(model=TINY, prompt=8, completion=6, prompts=2, group=4)
    return step.measure(sizes, steps=1, lengths="full", dtype="float32", matmul_size=64, overrides=[])


def test_one_step_of_a_real_run(measured):
    assert measured["mean_length"] == 6
    phases = measured["phases"]
    assert all(phases[name]["median_s"] > 0 for name in ("generate", "update", "step"))
    assert phases["update"]["flops"] == 3 * phases["generate"]["flops"] == 3 * phases["score"]["flops"]
    assert measured["first"]["compilations"] > 0
    # The peak is the process's, and tests before this one may have set it.
    assert measured["memory"]["peak_rss"] >= measured["memory"]["rss_before_model"] > 0
    json.dumps(measured)


def test_reports_hold_every_phase(measured):
    text = step.report(measured)
    assert all(f"| {name} |" in text for name in step.PHASES)
    line = memory.setting_line(["--training.num_microbatches=2"], measured)
    assert line.count("|") == len(memory.HEADER) + 1 and "training.num_microbatches=2" in line
    for before in (None, measured):
        line = scaling.scaling_line("group", scaling.BASE, measured, before)
        assert line.count("|") == len(scaling.HEADER) + 1
    assert "(1.00×)" in line


# The comparisons


def test_rows_are_those_of_the_targets():
    sizes = {
        name: (
            *random_models.SHAPES[row.model].__dict__.values(),
            row.prompt,
            row.completion,
            row.prompts,
            row.group,
        )
        for name, row in work.ROWS.items()
    }
    assert sizes == {
        "first": (6, 384, 6, 8192, 512, 32, 64, 8, 8),
        "prompt256": (6, 384, 6, 8192, 512, 256, 64, 8, 8),
        "124m": (12, 768, 12, 50257, 1024, 32, 32, 2, 4),
        "smallest": (4, 128, 4, 96, 256, 16, 32, 4, 8),
        "memory": (12, 768, 12, 50257, 1024, 64, 128, 4, 8),
    }
    assert all(row.kl_coef == 0.1 for row in work.ROWS.values())


def test_commands_of_the_peers(monkeypatch):
    monkeypatch.setattr(peers, "find_model", lambda name: f"/models/{name}")
    row = work.ROWS["prompt256"]
    command = peers.trl_command("python", "trl.py", row, 3)
    assert command == ["python", "trl.py", "/models/mid", "256", "64", "8", "8", "4", "0.1"]
    command = peers.tunix_command("python", "tunix.py", row, 3)
    assert {"--layers=6", "--width=384", "--vocab=8192", "--prompt-len=256", "--num-prompts=8"} <= set(
        command
    )
    with pytest.raises(ValueError, match="directory"):
        peers.tunix_command("python", "tunix.py", work.Work(model="/models/mine"), 3)


def test_ratios_and_the_json_line():
    ours = {"step": 2.0, "generate": 1.0, "memory": 10}
    theirs = {"step": 6.0, "generate": 4.0, "memory": 25}
    assert peers.ratios([(theirs, ours)]) == {"step": [3.0], "generate": [4.0], "memory": [2.5]}
    line = peers.round_line("first", "trl", 1, theirs, ours, {"step": 3.0, "generate": 4.0, "memory": 2.5})
    assert line.count("|") == len(peers.HEADER) + 1 and "3.00×" in line
    assert peers.last_json('STEP 1\n{"step_median_s": 2}\n\n') == {"step_median_s": 2}
    with pytest.raises(ValueError, match="no JSON"):
        peers.last_json("STEP 1")


def test_two_trees_are_compared_by_rounds():
    rounds = [({"step": 2.0, "cpu": 4.0}, {"step": 1.0, "cpu": 4.0}), ({"step": 1.0, "cpu": 2.0},) * 2]
    assert old_new.ratios(rounds) == {"step": [0.5, 1.0], "cpu": [1.0, 1.0]}
    assert old_new.report("first", rounds)[0] == "| first | step | 1.5 | 1 | 0.750 | 0.500 to 1.000 |"


def test_a_process_reports_its_own_memory_and_its_failure():
    script = "x = bytearray(200 * 2**20); print(len(x))"
    output, peak = work.run_process([sys.executable, "-c", script], work.environment())
    assert output.strip() == str(200 * 2**20) and peak > 200 * 2**20
    with pytest.raises(RuntimeError, match="no such thing"):
        work.run_process([sys.executable, "-c", "raise SystemExit('no such thing')"], work.environment())


def test_settings_of_the_memory_table_are_keys_of_a_config():
    settings = list(memory.default_settings(4))
    assert ["--training.num_microbatches=4"] in settings and ["--training.num_microbatches=8"] not in settings
    assert ["--model.remat=full"] in settings
    for (option,) in settings:
        parse_record(Config, [option], command="memory", description="")


@pytest.mark.parametrize("size", scaling.SIZES)
def test_scaling_doubles_one_size(size):
    once, twice = scaling.grown(size, 1), scaling.grown(size, 2)
    assert once == scaling.BASE
    for other in scaling.SIZES:
        factor = 2 if other == size else 1
        assert scaling.value_of(other, twice) == factor * scaling.value_of(other, once)
