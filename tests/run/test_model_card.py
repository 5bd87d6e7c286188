"""The card of an exported model, from configs and rows made up."""

import json

import pytest
import yaml

from grpo_jax.config.run import (
    AlgorithmConfig,
    Config,
    ModelConfig,
    RewardConfig,
    SamplingConfig,
    TrainingConfig,
)
from grpo_jax.run.model_card import model_card, write_card

ROWS = [
    {"step": 0, "eval/greedy_accuracy": 0.25, "eval/mean@4": 0.125},
    {"step": 1, "loss": 0.0, "reward": 0.5},
    {"step": 5, "eval/greedy_accuracy": 0.5, "eval/mean@4": None},
    {"step": 9, "eval/greedy_accuracy": 1.0, "eval/mean@4": 0.75},
]
CONFIG = Config(
    algorithm=AlgorithmConfig(name="dapo", group_size=4),
    model=ModelConfig(hf_model_name="HuggingFaceTB/SmolLM2-135M-Instruct", revision="v1"),
    training=TrainingConfig(learning_rate=3e-6),
    run_dir="runs/mine",
)


def card(config=CONFIG, rows=ROWS, **arguments):
    return model_card(config, rows, **{"step": 9, "directory": "out"} | arguments)


def front_matter(text):
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_front_matter_and_origin():
    text = card()
    assert front_matter(text) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grpo", "reinforcement-learning", "grpo_jax"],
    }
    assert "\n# mine\n" in text and "at revision `v1`, trained for 9 updates" in text
    assert "recipe `dapo` (" in text and "2503.14476" in text and "groups of 4 completions" in text


@pytest.mark.parametrize(
    ("name", "base"),
    [("packaged:arithmetic", "arithmetic"), ("/data/models/smollm2/", "smollm2"), ("gpt2", "gpt2")],
)
def test_a_local_model_goes_by_a_name_that_the_hub_accepts(name, base):
    assert front_matter(card(Config(model=ModelConfig(hf_model_name=name))))["base_model"] == base


def test_evaluation_is_the_first_and_the_last_up_to_the_step():
    text = card()
    assert "| held-out prompts | step 0 | step 9 |\n|---|---|---|\n" in text
    assert "| greedy_accuracy | 0.2500 | 1.0000 |\n| mean@4 | 0.1250 | 0.7500 |" in text
    text = card(step=6)
    assert "| greedy_accuracy | 0.2500 | 0.5000 |\n| mean@4 | 0.1250 | – |" in text
    assert "| held-out prompts | step 0 |\n|---|---|\n" in card(step=4)
    assert "There was none." in card(rows=[])


def test_settings_are_those_that_differ():
    settings = yaml.safe_load(card().split("```yaml\n")[1].split("```")[0])
    assert settings == {
        "algorithm": {"name": "dapo", "group_size": 4},
        "model": {"hf_model_name": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": "v1"},
        "training": {"learning_rate": 3e-6},
    }
    assert "algorithm:\n  name: grpo\n```" in card(Config())


def test_rewards_without_their_arguments():
    rewards = [RewardConfig(function="judge.py:score", weight=0.5, arguments={"key": "secret"})]
    text = card(Config(rewards=rewards))
    assert "Reward functions: `judge.py:score` (weight 0.5)." in text and "secret" not in text
    assert "those of the task `arithmetic`" in card(Config())


def test_commands():
    text = card()
    assert "python -m grpo_jax.evaluate --model out --config runs/mine/config.yaml" in text
    assert "python -m grpo_jax.train --config runs/mine/config.yaml\n" in text
    moved = "python -m grpo_jax.train --config runs/theirs/config.yaml --run_dir runs/theirs\n"
    assert moved in card(run_dir="runs/theirs")


def test_stop_strings_are_named_for_whoever_samples():
    text = card(Config(sampling=SamplingConfig(stop=["\nQ:", "</answer>"])))
    assert "## Stop strings" in text and "```python\nstop = ['\\nQ:', '</answer>']\n```" in text
    assert "stop = ['x']" in card(Config(sampling=SamplingConfig(stop="x")))
    assert "## Stop strings" not in card()


def test_written_from_the_metrics_of_a_run_cut_off_in_a_line(tmp_path):
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:-20])
    write_card(CONFIG, tmp_path, step=9, run_dir=str(tmp_path))
    assert "| greedy_accuracy | 0.2500 | 0.5000 |" in (tmp_path / "README.md").read_text()
