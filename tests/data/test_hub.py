"""Data sets of the hub: what we ask `datasets` for, and which errors it raises."""

import json
import sys
import types

import pytest

from grpo_jax.config.run import DataConfig
from grpo_jax.data.hub import read_dataset
from grpo_jax.data.loading import load_data

ROWS = {
    "train": [{"question": f"{i} + {i}?", "answer": f"so #### {2 * i}"} for i in range(40)],
    "test": [{"question": "50 + 50?", "answer": "#### 100"}],
}


@pytest.fixture
def asked(monkeypatch):
    """A stand-in for `datasets` that notes how it is called."""
    calls = []

    def load_dataset(name, config, *, split):
        calls.append((name, config, split))
        if split not in ROWS:
            raise ValueError(f'Unknown split "{split}". Should be one of [train, test].\nmore')
        return ROWS[split]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_rows_have_places(asked):
    assert list(read_dataset("a/b", config="c", split="train"))[:2] == [
        ("row 1", ROWS["train"][0]),
        ("row 2", ROWS["train"][1]),
    ]
    assert asked == [("a/b", "c", "train")]


def test_errors_are_one_line(asked):
    with pytest.raises(ValueError) as caught:
        list(read_dataset("a/b", config=None, split="valid"))
    assert str(caught.value) == (
        "data.dataset: a/b, split 'valid', does not load: ValueError: Unknown split \"valid\". "
        "Should be one of [train, test]."
    )


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'a/b needs `datasets`: pip install "grpo-jax\[hub\]"'):
        list(read_dataset("a/b", config=None, split="train"))
    with pytest.raises(ImportError, match=r"openai/gsm8k needs `datasets`.*or give data\.train_file"):
        load_data(DataConfig(task="gsm8k"))


def test_a_data_set_as_training_data(asked):
    columns = {"prompt": "question"}
    task = load_data(DataConfig(dataset="a/sums", dataset_config="main", columns=columns, eval_split="test"))
    assert (task.name, len(task.train), len(task.evaluation), task.rewards) == ("sums", 40, 1, ())
    assert task.train[3].prompt == "3 + 3?" and task.train[3].columns == {"answer": "so #### 6"}
    assert asked == [("a/sums", "main", "train"), ("a/sums", "main", "test")]
    assert load_data(DataConfig(dataset="a/sums", columns=columns)).evaluation == []
    with pytest.raises(
        ValueError, match=r"a/sums \[train\], row 1: `prompt` is missing; the keys are: question"
    ):
        load_data(DataConfig(dataset="a/sums"))


def test_gsm8k_knows_its_data_set(asked):
    task = load_data(DataConfig(task="gsm8k"))
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert (task.name, task.rewards, len(task.train), len(task.evaluation)) == (
        "gsm8k", ("numeric_answer",), 40, 1,
    )  # fmt: skip
    task = load_data(DataConfig(task="gsm8k", eval_fraction=0.3))  # of the training split
    assert asked[2:] == [("openai/gsm8k", "main", "train")]
    assert len(task.train) + len(task.evaluation) == 40 and 4 < len(task.evaluation) < 20


def test_a_local_directory(tmp_path, tmp_path_factory, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    for split, rows in ROWS.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row for _, row in read_dataset(str(tmp_path), config=None, split="train")] == ROWS["train"]
    task = load_data(DataConfig(task="gsm8k", dataset=str(tmp_path), eval_split="test"))
    assert [example.prompt for example in task.evaluation] == ["50 + 50?"]
    with pytest.raises(ValueError, match=r"split 'valid', does not load: ValueError: Unknown split"):
        list(read_dataset(str(tmp_path), config=None, split="valid"))
    with pytest.raises(ValueError, match=r"no/such, split 'train', does not load"):
        list(read_dataset("no/such", config=None, split="train"))
