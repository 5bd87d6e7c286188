"""The plan: its numbers by hand, before anything compiles."""

import json
from types import SimpleNamespace

import jax
import pytest
import small_run

from grpo_jax.models.loading import load_model
from grpo_jax.run.build import build
from grpo_jax.run.planning import make_plan

# The packaged GPT-2: V=17, D=128, 2 layers, 4 heads, 32 positions, 512 in the MLP.
PARAMETERS = (
    17 * 128 + 32 * 128 + 2 * (4 * 128 + (128 + 1) * 384 + (128 + 1) * 128 + 129 * 512 + 513 * 128) + 256
)


@pytest.fixture(scope="module")
def model():
    return load_model("packaged:arithmetic")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """80 prompts of 3, 8, 9 and 20 tokens."""
    path = tmp_path_factory.mktemp("plan") / "prompts.jsonl"
    texts = ["1+=", "12+3456=", "12+34567=", "1+" * 9 + "1="] * 20
    path.write_text("".join(json.dumps({"prompt": text, "answer": "1"}) + "\n" for text in texts))
    return path


def plan_of(tmp_path, model, **changes):
    return make_plan(build(small_run.config(tmp_path, **changes), model=model))


def of_file(prompts, **changes):
    return {"data__train_file": prompts, "rewards": "[{function: exact_match}]", **changes}


def test_numbers_by_hand(tmp_path, model, prompts):
    plan = plan_of(
        tmp_path,
        model,
        **of_file(prompts, algorithm__group_size=4, algorithm__num_iterations=3),
        training__num_steps="null",
        training__num_epochs=2.5,
        training__num_microbatches=2,
    )
    assert (plan.num_prompts, plan.group_size, plan.batch_size) == (8, 4, 32)
    assert (plan.num_examples, plan.num_dropped, plan.num_evaluation) == (80, 0, 0)
    assert plan.num_steps == 80 * 2.5 / 8 * 3 == 75
    assert (plan.prompt_length, plan.max_new_tokens) == (20, 5)
    assert plan.generate_shapes == (8, 16, 20)
    assert plan.num_compilations == 3 + 3 + 1
    assert plan.text().split("\n")[1:] == [
        "  8 prompts × 4 completions = 32 per update in 2 micro-batches, 3 updates per rollout, "
        "75 updates = 2.50 epochs of 80 prompts",
        "  prompts up to 20 tokens + completions up to 5 = 25; 0 held-out prompts",
        *plan.text().split("\n")[3:],
    ]
    assert plan.checkpoint_size == plan.memory["parameters"] + plan.memory["optimizer"]
    assert f"{plan.checkpoint_size / 1e6:.1f} MB on disk" in plan.text().split("\n")[4]
    assert plan.text().split("\n")[3].startswith("  7 compilations, about ")


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1, 10), (0.1, 1), (0.01, 1), (1.01, 11), (0.3, 3), (100, 1000)]
)
def test_steps_of_epochs(epochs, steps, tmp_path, model, prompts):
    changes = of_file(prompts, training__num_steps="null", training__num_epochs=epochs)
    assert plan_of(tmp_path, model, **changes, algorithm__group_size=4).num_steps == steps


def test_dropped_prompts(tmp_path, model, prompts):
    limits = {"data__max_prompt_length": 8, "data__over_length": "drop"}
    plan = plan_of(tmp_path, model, **of_file(prompts, **limits))
    assert (plan.num_examples, plan.num_dropped, plan.prompt_length) == (40, 40, 8)
    assert plan.generate_shapes == (8,) and plan.num_compilations == 3
    assert "epochs of 40 prompts (40 too long: dropped)" in plan.text()


def test_truncated_prompts(tmp_path, model, prompts):
    limits = {"data__max_prompt_length": 8, "data__over_length": "truncate_left"}
    plan = plan_of(tmp_path, model, **of_file(prompts, **limits))
    assert (plan.num_examples, plan.num_dropped, plan.num_truncated, plan.prompt_length) == (80, 0, 40, 8)
    assert "epochs of 80 prompts (40 too long: truncated at the left)" in plan.text()


def test_compilations_follow_what_is_scored_and_packed(tmp_path, model, monkeypatch):
    alone = {"algorithm__kl_coef": 0.0}  # no reference, and one update per rollout: nothing is scored
    whole, unscored = plan_of(tmp_path, model), plan_of(tmp_path, model, **alone)
    assert (whole.num_compilations, unscored.num_compilations) == (3, 2)
    monkeypatch.setattr(
        "grpo_jax.run.planning.PACKED_FROM", 5
    )  # the completion limit: packed into six buckets
    assert plan_of(tmp_path, model).num_compilations == 1 + 6 + 6
    assert plan_of(tmp_path, model, **alone).num_compilations == 1 + 6


def test_memory_by_hand(tmp_path, model, monkeypatch):
    monkeypatch.setattr("grpo_jax.policy.decoder.cpu_vendor", lambda: "AuthenticAMD")
    memory = plan_of(tmp_path, model).memory
    assert all(size > 0 for size in memory.values())
    assert memory["parameters"] == memory["reference"] == memory["gradients"] == 4 * PARAMETERS
    assert memory["optimizer"] == 2 * memory["parameters"] + 2 * 4  # two moments; two step counters
    # Keys and values of 2 layers in float32: 6 positions of 4 prompts, 5 of 32 completions.
    prefix, own = (2 * 2 * tokens * 128 * 4 for tokens in (6 * 4, 5 * 32))
    turned = 4 * (2 * 12 * 128**2 + 17 * 128)  # kernels and tied head: 32 rows are few on this one
    assert memory["generation"] == pytest.approx(2 * (prefix + own) + 4 * 4 * 17 * 32 + turned, rel=0.001)


def test_memory_follows_the_settings(tmp_path, model):
    memory = plan_of(tmp_path, model).memory
    sliced = plan_of(tmp_path, model, training__num_microbatches=4).memory
    assert sliced["update"] < memory["update"] / 2 and sliced["gradients"] == 2 * memory["gradients"]
    no_kl = plan_of(tmp_path, model, algorithm__kl_coef=0)
    assert no_kl.memory["reference"] == 0 and "reference" not in no_kl.text()
    longer = plan_of(tmp_path, model, sampling__max_new_tokens=20).memory
    growth = longer["generation"] - memory["generation"]
    assert growth == 2 * (2 * 2 * 15 * 32 * 128 * 4) and longer["update"] > 2 * memory["update"]


def test_total_is_the_peak(tmp_path, model):
    plan = plan_of(tmp_path, model)
    m = plan.memory
    stays = m["parameters"] + m["reference"] + m["optimizer"] + m["gradients"]
    assert plan.total_memory == stays + max(m["generation"], m["update"])
    assert f"about {round(plan.total_memory / 1e6)} MB (parameters 1.6, reference 1.6," in plan.text()


@pytest.mark.parametrize(
    "count, text", [(1, "1 × H200"), (2, "1 × H200 (1 more stays idle)"), (8, "1 × H200 (7 more stay idle)")]
)
def test_one_device_is_used_and_the_others_are_counted(count, text, tmp_path, model, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="H200")] * count)
    assert plan_of(tmp_path, model).title.endswith(f", {text}")


def test_nothing_compiles(tmp_path, prompts, monkeypatch):
    compiled = small_run.note_compilations(monkeypatch)
    jax.jit(lambda x: x + 3.75)(jax.numpy.ones(11, "float32"))
    assert compiled  # the note-taking works
    compiled.clear()
    plan_of(tmp_path, load_model("packaged:arithmetic"), **of_file(prompts))
    assert not [name for name in compiled if name in small_run.PROGRAMS or "forward" in name]
    # Reading and converting weights compiles a few one-line programs; nothing of the model.
    assert len(compiled) <= 10, compiled
