"""The card of an exported model, from configs and rows made up."""

import json
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from grpo_jax.config.data import DataConfig
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
    front = front_matter(text)
    assert "model-index" in front
    del front["model-index"]  # see test_the_hub_reads_the_figures
    assert front == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grpo", "reinforcement-learning", "grpo_jax"],
    }
    assert front == front_matter(card(rows=[]))
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


def results_of(text):
    """Reads the card as huggingface_hub does, and returns its evaluation results."""
    read = ModelCard(text)
    assert read.content == text and read.data.model_name == "mine"
    return read.data.eval_results


def test_the_hub_reads_the_figures():
    found = {result.metric_type: result.metric_value for result in results_of(card())}
    assert found == {"greedy_accuracy": 1.0, "mean@4": 0.75}
    (result,) = results_of(card(step=6))  # the figure that is null is left out
    assert (result.metric_type, result.metric_value) == ("greedy_accuracy", 0.5)
    assert result.task_type == "text-generation" and result.dataset_type == "arithmetic"
    assert result.dataset_name == "arithmetic, held-out prompts" and result.dataset_split is None


def test_what_the_hub_checks():
    """The checks of `ModelCard.validate` that need no server."""
    for config in (CONFIG, Config(), Config(model=ModelConfig(hf_model_name="/data/models/smollm2/"))):
        data = ModelCard(card(config, run_dir="runs/mine")).data
        validate_repo_id(data.base_model)
        assert len(set(data.tags)) == len(data.tags)
        for result in data.eval_results:
            assert all((result.task_type, result.dataset_type, result.dataset_name, result.metric_type))
            assert isinstance(result.metric_value, float)
    assert ModelCard(card(rows=[])).data.eval_results is None


def test_the_data_set_is_that_of_the_hub(tmp_path):
    data = DataConfig(task="gsm8k", dataset="openai/gsm8k", dataset_config="main", eval_split="test")
    read = ModelCard(card(replace(CONFIG, data=data))).data
    assert read.datasets == ["openai/gsm8k"]
    result = read.eval_results[0]
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == (
        "openai/gsm8k",
        "main",
        "test",
    )
    local = replace(data, dataset=str(tmp_path), eval_file=None)
    read = ModelCard(card(replace(CONFIG, data=local))).data
    assert read.datasets is None and read.eval_results[0].dataset_type == tmp_path.name


LICENSED = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n# x\n"


def test_the_license_is_that_of_the_base_model(tmp_path, monkeypatch):
    local = Config(model=ModelConfig(hf_model_name=str(tmp_path)))
    keys = ("license", "license_name", "license_link")
    for text, expected in [
        (LICENSED, ["other", "mine", "LICENSE"]),
        ("---\nlicense: mit\n---\n", ["mit", None, None]),
        ("# no front matter\n", [None] * 3),
        ("---\n: [\n---\n", [None] * 3),
        (None, [None] * 3),
    ]:
        (tmp_path / "README.md").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "README.md").write_text(text)
        front = front_matter(card(local))
        assert [front.get(key) for key in keys] == expected
    (tmp_path / "README.md").write_text(LICENSED)
    asked = []

    def cached(name, file, revision):
        asked.append((name, file, revision))
        return str(tmp_path / "README.md")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert front_matter(card())["license"] == "other"
    assert asked == [("HuggingFaceTB/SmolLM2-135M-Instruct", "README.md", "v1")]
