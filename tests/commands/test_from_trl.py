"""A config of `trl grpo` with a reward of the user's own, as it is, through plan, score and train."""

import json

import pytest
import small_run

from grpo_jax import plan, score, train
from grpo_jax.run.directory import read_config

TRL = """
model_name_or_path: packaged:arithmetic
datasets:
- path: json
  data_files: sums.jsonl
reward_funcs: [rewards_of_mine.right, rewards_of_mine.short]
reward_weights: [1.0, 0.5]
num_generations: 4
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
max_completion_length: 4
learning_rate: 1e-4
max_steps: 2
bf16: false
output_dir: out
report_to: none
use_vllm: true
"""
REWARDS = """
def right(completions, solution, **kwargs):
    return [float(c.strip() == s) for c, s in zip(completions, solution)]

def short(completions, **kwargs):
    return [-float(len(c)) for c in completions]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    rows = [{"prompt": f"{a}+{a}=", "solution": str(a + a)} for a in range(10, 26)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards_of_mine.py").write_text(REWARDS)
    (tmp_path / "trl.yaml").write_text(TRL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def test_from_a_config_of_trl_to_a_trained_model(place, capsys):
    assert plan.main(["--from_trl", "trl.yaml"]) == 0
    out, err = capsys.readouterr()
    assert "# These fields have no counterpart:\n#   use_vllm: true" in err and "translated" not in out
    assert score.main(["--from_trl=trl.yaml", "--num_prompts=2", "--num_samples=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_prompts"] == 2
    assert train.main(["--from_trl", "trl.yaml", "--model.remat=none"]) == 0
    rows = [row for row in small_run.rows("out") if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert {"rewards/right/mean", "rewards/short/mean"} <= set(rows[0])
    config = read_config("out")
    assert (config.training.batch_size, config.training.num_microbatches) == (8, 2)
    assert (config.training.lr_schedule, config.algorithm.reduction) == ("linear", "token")
    # The same command continues the run, here as one that is done.
    assert train.main(["--from_trl", "trl.yaml", "--model.remat=none"]) == 0
    assert "continuing after step 2 of 2" in capsys.readouterr().out
