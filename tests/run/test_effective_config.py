"""config.yaml holds the values that take effect, and means the same run as the config that left them open."""

import dataclasses

import jax
import pytest
import yaml

from grpo_jax.config.inert_settings import check_settings
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.objective.recipes import RECIPES
from grpo_jax.run.directory import check_same_run, config_dict, read_config, write_config
from grpo_jax.run.effective_config import effective_config, named_recipe


def parse(*argv) -> Config:
    return parse_record(Config, list(argv), command="test", description="")


CHANGES = {
    "nothing": [],
    "clip": ["--algorithm.clip_range_high=0.3"],
    "several": [
        "--algorithm.kl_coef=0.1", "--algorithm.kl_estimator=ratio_k3", "--algorithm.advantage=batch",
        "--algorithm.reduction=token", "--algorithm.kl_placement=loss", "--algorithm.overlong_buffer=8",
        "--algorithm.mask_truncated=true", "--algorithm.entropy_coef=0.01",
    ],
    "exact": ["--algorithm.kl_coef=0.1", "--algorithm.kl_estimator=exact", "--algorithm.kl_placement=loss"],
    "surrogate": ["--algorithm.surrogate=sapo", "--algorithm.tau=2.0"],
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("change", CHANGES)
def test_the_recipe_is_the_same(name, change):
    try:
        config = parse(f"--algorithm.name={name}", *CHANGES[change])
        before = named_recipe(config)
    except ValueError:
        pytest.skip("the recipe refuses this change")
    effective = effective_config(config)
    after = named_recipe(effective)
    # The buffer is in tokens then, and the same.
    assert after.overlong_tokens(64) == before.overlong_tokens(64)
    assert dataclasses.replace(after, overlong_buffer=before.overlong_buffer) == before
    leaves = [(type(leaf), leaf) for leaf in jax.tree.leaves(before)]
    assert [(type(leaf), leaf) for leaf in jax.tree.leaves(after)] == leaves
    assert jax.tree.structure(before.clip) == jax.tree.structure(after.clip)
    check_settings(effective, after, num_rewards=1)  # to repeat the recipe's own value is no mistake
    assert effective_config(effective) == effective


def test_what_is_written(tmp_path):
    run_dir = str(tmp_path / "run")
    write_config(parse(f"--run_dir={run_dir}", "--algorithm.kl_coef=0.1"))
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["algorithm"]
    assert written["kl_coef"] == 0.1  # the user's
    expected = {
        "advantage": "std", "surrogate": "clipped", "clip_range": 0.2, "clip_range_high": None, "cap": None,
        "kl_estimator": "k3", "kl_placement": "loss", "reduction": "sequence", "ratio_level": "token",
        "aggregation": "sum_then_normalize", "missing": "drop", "kl_on_dead_groups": True,
        "mask_truncated": False, "dynamic_sampling": False, "overlong_buffer": 0, "entropy_coef": None,
        "top_entropy": None, "kl_target": None,
    }  # fmt: skip
    assert {key: written[key] for key in expected} == expected
    dapo = config_dict(parse("--algorithm.name=dapo", "--sampling.max_new_tokens=20"))["algorithm"]
    assert (dapo["clip_range_high"], dapo["dynamic_sampling"], dapo["overlong_buffer"]) == (0.28, True, 4)
    assert dapo["kl_coef"] == 0.0


def test_configs_are_compared_by_what_takes_effect(tmp_path):
    """A run directory of an earlier version has null where a new one has the recipe's value."""
    run_dir = str(tmp_path / "run")
    mine = parse(f"--run_dir={run_dir}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(mine)))
    older = read_config(run_dir)
    assert older.algorithm.kl_coef is None
    write_config(mine)
    newer = read_config(run_dir)
    assert newer.algorithm.kl_coef == 0.04
    for theirs in (older, newer):
        check_same_run(mine, theirs)
        check_same_run(effective_config(mine), theirs)
        check_same_run(parse(f"--run_dir={run_dir}", "--algorithm.kl_coef=0.04"), theirs)
        other = parse(f"--run_dir={run_dir}", "--algorithm.kl_coef=0.1")
        with pytest.raises(ValueError, match=r"algorithm\.kl_coef is 0\.04 there and 0\.1 here\. Give"):
            check_same_run(other, theirs)
