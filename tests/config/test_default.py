"""A command that is told nothing of a run takes the config that ships with the package."""

import pytest

from grpo_jax.config.default import DEFAULT, or_default
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config

OWN = ("json", "num_prompts")


@pytest.mark.parametrize(
    "argv", [[], ["--json"], ["--json", "true"], ["--num_prompts=4", "--json"], ["--num_prompts", "4"]]
)
def test_the_packaged_config_where_no_run_is_described(argv, capsys):
    assert or_default(argv, own=OWN) == ["--config", str(DEFAULT), *argv]
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(DEFAULT) in err


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", "mine.yaml"],
        ["--config=mine.yaml", "--json"],
        ["--json", "--training.num_steps=3"],
        ["--num_prompts", "4", "stray"],
        ["--help"],
        ["-h"],
        ["stray"],
    ],
)
def test_what_is_given_is_taken_as_it_is(argv, capsys):
    assert or_default(argv, own=OWN) == argv
    assert capsys.readouterr() == ("", "")


def test_arguments_of_the_process(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train"])
    assert or_default(None) == ["--config", str(DEFAULT)]
    monkeypatch.setattr("sys.argv", ["train", "--run_dir=x"])
    assert or_default(None) == ["--run_dir=x"]


def test_it_is_the_main_job():
    config = parse_record(Config, or_default([]), command="train", description="")
    assert (config.run_dir, config.model.hf_model_name) == ("runs/arithmetic", "packaged:arithmetic")
    assert (config.training.num_steps, config.sampling.max_new_tokens) == (300, 5)
