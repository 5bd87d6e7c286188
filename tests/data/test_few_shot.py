"""Held-out prompts that are few-shot examples too are counted in one line at the start."""

import json

import pytest
import small_run

from grpo_jax.data.few_shot import note_on_few_shot
from grpo_jax.models.loading import load_model
from grpo_jax.run.build import build
from grpo_jax.types import Example

SHOTS = (("1+1=", "2"), ("3+4=", "7"))


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    "prompt",
    [
        "3+4=",
        " 3+4=\n",
        [user("3+4=")],
        [{"role": "system", "content": "Add."}, user("3+4= ")],
    ],
    ids=str,
)
def test_what_is_the_same_question(prompt):
    note = note_on_few_shot(SHOTS, [Example("5+5="), Example(prompt, place="eval.jsonl, line 2")])
    assert note == (
        "1 of 2 held-out prompts are data.few_shot examples as well, white space aside; the first is "
        "eval.jsonl, line 2: their own prompts show an answer, so evaluation measures copying there"
    )


@pytest.mark.parametrize(
    "prompt",
    ["4+3=", "3 + 4=", [user("3+4="), {"role": "assistant", "content": "7"}, user("And 3+5?")]],
    ids=str,
)
def test_what_is_another_question(prompt):
    assert note_on_few_shot(SHOTS, [Example(prompt)]) is None
    assert note_on_few_shot((), [Example(prompt)]) is None


def test_a_run_says_it_at_the_start(tmp_path):
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("\n".join(json.dumps({"prompt": p, "answer": "1"}) for p in ("12+10=", "13+10=")))
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"prompt": "40+10=", "answer": "50"}))
    changes = {
        "data__train_file": train,
        "data__eval_file": held_out,
        "rewards": "[{function: exact_match}]",
        "data__few_shot_separator": " ",
    }
    model = load_model("packaged:arithmetic")
    notes = {
        shot: build(
            small_run.config(
                tmp_path, **changes, data__few_shot=json.dumps([{"prompt": shot, "completion": "23"}])
            ),
            model=model,
        ).notes
        for shot in ("13+10=", "13+11=")
    }
    (note,) = (note for note in notes["13+10="] if "few_shot" in note)
    assert note.startswith("1 of 2 held-out prompts are data.few_shot examples") and "line 2" in note
    assert not [note for note in notes["13+11="] if "few_shot" in note]
