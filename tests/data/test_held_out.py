"""The sample of held-out prompts, and the note on those that are training prompts as well."""

import json

import pytest
import small_run

from grpo_jax.data.held_out import note_on_overlap, sample_held_out
from grpo_jax.models.loading import load_model
from grpo_jax.run.build import build
from grpo_jax.run.planning import make_plan
from grpo_jax.types import Example


def rows(count, **columns):
    return [
        Example(f"{i}+1=", {"answer": str(i + 1)}, place=f"eval.jsonl, line {i + 1}") for i in range(count)
    ]


def test_a_sample_is_spread_and_in_order():
    """A file that is sorted by level gives every level its share."""
    examples = rows(1800)
    sample = sample_held_out(examples, 180)
    assert len(sample) == 180
    numbers = [examples.index(example) for example in sample]
    assert numbers == sorted(set(numbers))
    per_third = [sum(600 * i <= n < 600 * (i + 1) for n in numbers) for i in range(3)]
    assert all(40 <= count <= 80 for count in per_third), per_third


def test_a_sample_is_fixed_and_nested():
    examples = rows(100)
    chosen = [example.prompt for example in sample_held_out(examples, 12)]
    assert chosen == [example.prompt for example in sample_held_out(rows(100), 12)]
    assert set(chosen) < {example.prompt for example in sample_held_out(examples, 30)}
    # Rows at the end of the file take the place of some, and move nothing.
    longer = {example.prompt for example in sample_held_out(rows(110), 12)}
    assert longer <= set(chosen) | {f"{i}+1=" for i in range(100, 110)} and len(longer & set(chosen)) >= 8


@pytest.mark.parametrize("count", [0, 18, 19, 1000])
def test_a_sample_of_all_or_none(count):
    assert sample_held_out(rows(18), count) == (rows(18) if count else [])


def files(tmp_path, train, held_out):
    paths = {}
    for name, prompts in (("train", train), ("eval", held_out)):
        lines = [
            json.dumps({"prompt": text, "answer": "1", "level": i // 6}) for i, text in enumerate(prompts)
        ]
        paths[f"data__{name}_file"] = tmp_path / f"{name}.jsonl"
        paths[f"data__{name}_file"].write_text("\n".join(lines))
    return {**paths, "rewards": "[{function: exact_match}]"}


@pytest.fixture(scope="module")
def model():
    return load_model("packaged:arithmetic")


def test_a_run_takes_the_sample_and_its_plan_says_so(model, tmp_path):
    """18 rows sorted by level, of which 6 are used (data-15)."""
    changes = files(tmp_path, ["1+1="] * 4, [f"{i}+10=" for i in range(10, 28)])
    build_with = lambda **more: build(small_run.config(tmp_path, **changes, **more), model=model)  # noqa: E731
    run = build_with(evaluation__num_prompts=6, evaluation__category="level")
    assert len(run.task.evaluation) == 6 and len(run.held_out) == 18
    assert (
        {example.columns["level"] for example in run.task.evaluation}
        == {0, 1, 2}
        == {int(level) for level in run.categories}
    )
    assert "6 of 18 held-out prompts" in make_plan(run).text() and not run.notes
    # Neither the seed nor the form of the prompts chooses others.
    other = build_with(
        evaluation__num_prompts=6,
        training__seed=5,
        data__prompt_template="{{ prompt }}",
        sampling__temperature=0.5,
    )
    assert other.task.evaluation == run.task.evaluation
    assert "; 18 held-out prompts" in make_plan(build_with(evaluation__num_prompts=18)).text()


def test_held_out_prompts_that_are_trained_on_are_reported(model, tmp_path):
    held_out = [f"{i}+10=" for i in range(10, 28)]
    changes = files(tmp_path, ["1+1=", "12+10= ", "13+10=", "13+10="], held_out)
    (note,) = build(small_run.config(tmp_path, **changes, evaluation__num_prompts=18), model=model).notes
    assert note == (
        "2 of 18 held-out prompts are training prompts as well, white space aside; the first is "
        f"{tmp_path}/eval.jsonl, line 3: on these, evaluation measures memory"
    )
    changes = files(tmp_path, held_out, held_out)
    (note,) = build(small_run.config(tmp_path, **changes, evaluation__num_prompts=4), model=model).notes
    assert note.startswith("18 of 18 held-out prompts (4 of the 4 that are evaluated) are training prompts")
    notes = build(small_run.config(tmp_path, **changes, evaluation__num_prompts=0), model=model).notes
    assert not [note for note in notes if "training prompts" in note]


def test_chats_are_compared_by_their_messages():
    chat = lambda text, role="user": Example([{"role": role, "content": text}])  # noqa: E731
    train = [chat("What is\n2+2?"), Example("What is 3+3?")]
    assert note_on_overlap(train, [chat("What is 2+2? ")], [chat("What is 2+2? ")]).startswith(
        "1 of 1 held-out"
    )
    for other in (chat("What is 2+3?"), chat("What is 2+2?", "system"), Example("What is 2+2?")):
        assert note_on_overlap(train, [other], [other]) is None
