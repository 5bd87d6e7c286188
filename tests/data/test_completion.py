"""The task of continuing a text: where texts are split."""

import json

import pytest

from grpo_jax.config.run import DataConfig, RewardConfig
from grpo_jax.data.loading import load_data
from grpo_jax.data.tasks.completion import make_rows
from grpo_jax.rewards.loading import check_columns, load_rewards


def cut(text, num_words):
    return [(row["prompt"], row["continuation"]) for row in make_rows({"text": text}, num_words=num_words)]


def test_texts_are_split_at_word_borders():
    assert cut("  a b, c\n d  e f.", 2) == [("a b,", " c\n d")]
    assert cut("a b c d e f g", 2) == [("a b", " c d"), ("e f", " g")]
    assert cut("a b c d e f", 2) == [("a b", " c d")]  # nothing would follow `e f`
    assert cut("a b", 2) == cut("a", 2) == cut("", 2) == []
    assert cut("a b", 1) == [("a", " b")]


def test_blocks_make_up_the_text():
    text = " ".join(f"w{i}" for i in range(64))
    blocks = cut(text, 8)
    assert " ".join(prompt + continuation for prompt, continuation in blocks) == text


def test_from_a_text_and_from_lines(tmp_path):
    paragraphs = [" ".join(f"word{i}-{j}" for j in range(20)) for i in range(50)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "book.jsonl").write_text(
        "".join(json.dumps({"body": p, "page": 1}) + "\n" for p in paragraphs)
    )
    settings = {"task": "completion", "task_arguments": {"num_words": 5}}
    of_text = load_data(DataConfig(train_file=str(tmp_path / "book.txt"), **settings))
    of_lines = load_data(
        DataConfig(train_file=str(tmp_path / "book.jsonl"), columns={"text": "body"}, **settings)
    )
    assert [e.prompt for e in of_text.train] == [e.prompt for e in of_lines.train]
    assert len(of_text.train) + len(of_text.evaluation) == 100 and 2 <= len(of_text.evaluation) <= 25
    assert not {e.prompt for e in of_text.train} & {e.prompt for e in of_text.evaluation}
    assert set(of_lines.train[0].columns) == {"page", "continuation"}
    assert of_text.rewards == ("distinct_words",)
    rewards = load_rewards([RewardConfig(function=name) for name in of_text.rewards])
    check_columns(rewards, of_text.train[0].columns)


def test_mistakes_are_named_in_one_line(tmp_path):
    (tmp_path / "short.txt").write_text("few words\n\nhere\n")
    short = str(tmp_path / "short.txt")
    cases = (
        ({}, r"data\.task: completion needs data\.train_file or data\.dataset"),
        ({"train_file": short}, r"short\.txt: the task completion makes a prompt of none of its rows"),
        ({"train_file": short, "task_arguments": {"words": 3}}, r"did you mean 'num_words'\?"),
        ({"train_file": short, "task_arguments": {"num_words": 0}}, r"num_words: 0; it must be at least 1"),
        (
            {"train_file": short, "columns": {"title": "text"}},
            r"completion needs the column `text`; .*: title",
        ),
    )
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            load_data(DataConfig(task="completion", **settings))
    with pytest.raises(ValueError, match="`text` must be text, not int"):
        make_rows({"text": 3})
