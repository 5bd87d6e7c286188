"""GSM8K from a file; tests/data/test_hub.py reads it from the hub."""

import csv
import json

import pytest

from grpo_jax.config.run import DataConfig, RewardConfig
from grpo_jax.data.loading import load_data
from grpo_jax.data.tasks import load_task
from grpo_jax.data.tasks.gsm8k import make_rows
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.loading import check_columns, load_rewards

ROWS = [{"question": f"{i} and {i}?", "answer": f"{i}+{i}\n#### {1000 + i:,}"} for i in range(60)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_from_a_file(path):
    task = load_data(DataConfig(task="gsm8k", train_file=path))
    assert task.name == "gsm8k" and len(task.train) + len(task.evaluation) == 60 and task.evaluation
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.evaluation}
    rewards = load_rewards([RewardConfig(function=name) for name in task.rewards])
    example = task.train[0]
    check_columns(rewards, example.columns)
    number = example.columns["answer"].rpartition(" ")[2]
    completions = [f"so it is {number}.", "so it is 7", number.replace(",", "")]
    columns = {"answer": [example.columns["answer"]] * 3}
    assert call_rewards(rewards, ["p"] * 3, completions, columns)[:, 0].tolist() == [1, 0, 1]


def test_held_out_elsewhere(path):
    task = load_data(DataConfig(task="gsm8k", train_file=path, eval_file=path))
    assert len(task.train) == len(task.evaluation) == 60
    task = load_data(DataConfig(task="gsm8k", train_file=path, eval_fraction=0.0))
    assert len(task.train) == 60 and not task.evaluation


def test_other_names_and_a_template(tmp_path):
    path = tmp_path / "sums.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["problem", "solution"], *((row["question"], row["answer"]) for row in ROWS)])
    names = {"question": "problem", "answer": "solution"}
    task = load_data(
        DataConfig(
            task="gsm8k",
            train_file=str(path),
            columns=names,
            prompt_template="Q: {{ question }}\nA:",
            eval_fraction=0.0,
        )
    )
    assert task.train[1].prompt == "Q: 1 and 1?\nA:" and list(task.train[1].columns) == ["answer"]
    with pytest.raises(
        ValueError, match=r"sums\.csv, line 2: gsm8k needs the column `question`; there are: pr"
    ):
        load_data(DataConfig(task="gsm8k", train_file=str(path)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "gsm8k needs the column `answer`; there are: question"),
        ({"question": 3, "answer": "#### 1"}, "`question` must be text, not int"),
        ({"question": "q", "answer": "it is 18"}, "`answer` needs a number after ####, got 'it is 18'"),
        ({"question": "q", "answer": "18 #### none"}, "`answer` needs a number after ####"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        make_rows(row)


def test_the_task_needs_rows():
    with pytest.raises(ValueError, match=r"data\.task: gsm8k reads rows"):
        load_task("gsm8k")
