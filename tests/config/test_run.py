"""The configuration: strict, typed, complete; no key without an effect."""

import ast
import dataclasses
import inspect
import typing
from pathlib import Path

import pytest
import yaml
from small_run import write_yaml

import grpo_jax
from grpo_jax.config import algorithm as algorithm_config
from grpo_jax.config import data as data_config
from grpo_jax.config import model as model_config
from grpo_jax.config import run as records
from grpo_jax.config import sampling as sampling_config
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.objective.recipes import RECIPES, make_recipe
from grpo_jax.run.directory import config_dict, read_config, write_config
from grpo_jax.run.effective_config import effective_config

ROOT = Path(grpo_jax.__file__).parent

PLAN = """
algorithm: {name: grpo, group_size: 8, kl_coef: 0.1, clip_range: 0.2}
model: {type: policy, hf_model_name: "gpt2"}
training: {batch_size: 32, learning_rate: 1e-5, num_epochs: 100}
"""


def parse(*argv) -> Config:
    return parse_record(Config, list(argv), command="test", description="")


def test_the_plans_vocabulary_word_for_word(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    config = parse("--config", str(path))
    algorithm, training = config.algorithm, config.training
    assert (algorithm.name, algorithm.group_size) == ("grpo", 8)
    assert (algorithm.kl_coef, algorithm.clip_range) == (0.1, 0.2)
    assert (config.model.type, config.model.hf_model_name) == ("policy", "gpt2")
    assert (training.batch_size, training.num_epochs) == (32, 100)
    assert training.learning_rate == 1e-5 and isinstance(training.learning_rate, float)
    assert isinstance(training.num_epochs, float) and isinstance(training.batch_size, int)


def test_defaults():
    assert parse() == Config()


def test_what_stands_further_right_wins(tmp_path):
    first = write_yaml(tmp_path / "a.yaml", {"training": {"seed": 1, "num_steps": 5}, "run_dir": "a"})
    second = write_yaml(tmp_path / "b.yaml", {"training": {"seed": 2}})
    config = parse("--config", first, "--config", second, "--training.warmup_steps", "3")
    assert (config.training.seed, config.training.num_steps, config.training.warmup_steps) == (2, 5, 3)
    assert parse("--config", first, "--training.seed", "9").training.seed == 9
    assert parse("--training.seed", "9", "--config", first).training.seed == 1
    assert config.run_dir == "a"


@pytest.mark.parametrize("path", sorted((ROOT.parent / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_we_ship(path):
    config = parse("--config", str(path))
    given = yaml.safe_load(path.read_text())
    assert {"algorithm", "model", "training"} <= set(given)
    assert config.run_dir.startswith("runs/")


def test_written_and_read_again(tmp_path):
    given = {
        "algorithm": {"name": "dapo", "kl_coef": 0.0, "clip_range_high": 0.3, "kl_estimator": "k2"},
        "data": {
            "train_file": "a: b.jsonl",
            "over_length": "drop",
            "max_prompt_length": 7,
            "columns": {"prompt": "question"},
            "prompt_template": "Q: {{ prompt }}\nA:",
            "few_shot": [{"prompt": "1+1", "completion": " 2"}, {"prompt": "7", "completion": "8"}],
            "few_shot_separator": "\n",
            "system_prompt": "Be brief: answer.",
            "task_arguments": {"digits": 2},
        },
        "rewards": [
            {"function": "length_penalty", "weight": 2, "arguments": {"target": 3}},
            {"function": "required_words", "arguments": {"words": ["yes", "no"]}},
        ],
        "training": {"learning_rate": "3e-7", "num_epochs": 2},
        "run_dir": str(tmp_path / "run"),
    }
    config = parse("--config", write_yaml(tmp_path / "a.yaml", given))
    assert config.rewards[0] == records.RewardConfig(
        function="length_penalty", weight=2.0, arguments={"target": 3}
    )
    assert {name: getattr(config.data, name) for name in given["data"]} == given["data"]
    write_config(config)
    assert read_config(config.run_dir) == effective_config(config)
    assert config_dict(config)["rewards"][1]["arguments"] == {"words": ["yes", "no"]}


INVALID = [
    (
        "algorithm",
        {"name": "grpoo"},
        "algorithm.name: 'grpoo' is not a recipe; choose one of grpo, dr_grpo, dapo",
    ),
    ("algorithm", {"group_size": 1}, "algorithm.group_size: 1; it must be at least 2"),
    ("algorithm", {"num_iterations": 0}, "algorithm.num_iterations: 0; it must be at least 1"),
    ("algorithm", {"delta": 1.0}, "algorithm.delta: 1.0; it must be a finite ratio above 1"),
    ("algorithm", {"dual_clip": 0.5}, "algorithm.dual_clip: 0.5; it must be a finite ratio above 1"),
    ("algorithm", {"cap": 0.0}, "algorithm.cap: 0.0; it must be finite and above 0"),
    ("algorithm", {"tau": -1.0}, "algorithm.tau: -1.0; it must be finite and above 0"),
    ("algorithm", {"tau_negative": 0.0}, "algorithm.tau_negative: 0.0; it must be finite and above 0"),
    ("algorithm", {"kl_coef": -0.1}, "algorithm.kl_coef: -0.1; it must be finite and not negative"),
    ("algorithm", {"kl_coef": float("nan")}, "algorithm.kl_coef: nan; it must be finite"),
    ("algorithm", {"clip_range": -1.0}, "algorithm.clip_range: -1.0; it must be finite"),
    ("algorithm", {"clip_range_high": float("inf")}, "algorithm.clip_range_high: inf; it must be finite"),
    ("algorithm", {"num_minibatches": 0}, "algorithm.num_minibatches: 0; it must be at least 1"),
    ("algorithm", {"max_sampling_rounds": 0}, "algorithm.max_sampling_rounds: 0; it must be at least 1"),
    (
        "algorithm",
        {"log_clip_range": -0.1},
        "algorithm.log_clip_range: -0.1; it must be finite and not negative",
    ),
    (
        "algorithm",
        {"log_clip_range_high": float("inf")},
        "algorithm.log_clip_range_high: inf; it must be finite",
    ),
    ("algorithm", {"kl_target": 0.0}, "algorithm.kl_target: 0.0; it must be finite and above 0"),
    ("algorithm", {"kl_adaptation": 0.0}, "algorithm.kl_adaptation: 0.0; it must be in (0, 5)"),
    ("algorithm", {"kl_adaptation": 5.0}, "algorithm.kl_adaptation: 5.0; it must be in (0, 5)"),
    ("algorithm", {"ref_sync_every": -1}, "algorithm.ref_sync_every: -1; it must be 0 (off) or more"),
    ("algorithm", {"ref_mixup_alpha": 0.0}, "algorithm.ref_mixup_alpha: 0.0; it must be in (0, 1]"),
    ("algorithm", {"ref_mixup_alpha": 1.1}, "algorithm.ref_mixup_alpha: 1.1; it must be in (0, 1]"),
    ("algorithm", {"entropy_coef": float("nan")}, "algorithm.entropy_coef: nan; it must be a finite number"),
    ("algorithm", {"top_entropy": 0.0}, "algorithm.top_entropy: 0.0; it must be in (0, 1]"),
    ("algorithm", {"top_entropy": 1.5}, "algorithm.top_entropy: 1.5; it must be in (0, 1]"),
    (
        "algorithm",
        {"max_staleness": -1.0},
        "algorithm.max_staleness: -1.0; it must be finite and not negative",
    ),
    (
        "algorithm",
        {"importance_cap": 0.9},
        "algorithm.importance_cap: 0.9; it must be a finite ratio of at least 1",
    ),
    ("algorithm", {"overlong_buffer": -1}, "algorithm.overlong_buffer: -1; it must be 0 (off) or more"),
    ("lora", {"rank": -1}, "lora.rank: -1; it must be 0 (the whole model is trained) or more"),
    ("lora", {"rank": 4, "alpha": 0.0}, "lora.alpha: 0.0; it must be finite and above 0"),
    ("lora", {"rank": 4, "alpha": float("inf")}, "lora.alpha: inf; it must be finite and above 0"),
    (
        "lora",
        {"rank": 4, "dropout": 1.0},
        "lora.dropout: 1.0; it must be a probability, at least 0 and below 1",
    ),
    ("lora", {"dropout": 0.1}, "lora.dropout is given, but lora.rank is 0: set it, such as to 16"),
    ("lora", {"alpha": 32}, "lora.alpha is given, but lora.rank is 0: set it, such as to 16"),
    ("lora", {"targets": ["q_proj"]}, "lora.targets is given, but lora.rank is 0: set it"),
    ("data", {"max_prompt_length": 0}, "data.max_prompt_length: 0; it must be at least 1 token"),
    ("data", {"eval_file": "e.jsonl"}, "data.eval_file is given without data.train_file"),
    ("data", {"train_file": "a.csv", "dataset": "a/b"}, "data.train_file and data.dataset are both given"),
    ("data", {"dataset_config": "main"}, "data.dataset_config is given without data.dataset"),
    ("data", {"train_split": "test"}, "data.train_split is given without data.dataset"),
    ("data", {"eval_split": "test"}, "data.eval_split is given without data.dataset"),
    ("data", {"eval_fraction": 1.0}, "data.eval_fraction: 1.0; it must be in [0, 1)"),
    ("data", {"eval_fraction": -0.1}, "data.eval_fraction: -0.1; it must be in [0, 1)"),
    (
        "data",
        {"train_file": "a.csv", "eval_file": "b.csv", "eval_fraction": 0.1},
        "data.eval_file and data.eval_fraction are both given",
    ),
    ("data", {"few_shot": [{"prompt": "1"}]}, "data.few_shot[0] needs `completion`, and `prompt` or the"),
    ("data", {"few_shot": [{"completion": "1"}]}, "data.few_shot[0] needs `completion`, and `prompt` or the"),
    ("sampling", {"max_new_tokens": 0}, "sampling.max_new_tokens: 0; it must be at least 1"),
    (
        "sampling",
        {"temperature": 0.0},
        "sampling.temperature: 0.0; it must be finite and above 0, because greedy",
    ),
    ("sampling", {"temperature": float("inf")}, "sampling.temperature: inf;"),
    ("sampling", {"top_k": -1}, "sampling.top_k: -1; it must be 0 (off) or more"),
    ("sampling", {"top_p": 0.0}, "sampling.top_p: 0.0; it must be in (0, 1], where 1 is off"),
    ("sampling", {"top_p": 1.5}, "sampling.top_p: 1.5; it must be in (0, 1], where 1 is off"),
    ("sampling", {"min_p": 1.0}, "sampling.min_p: 1.0; it must be in [0, 1), where 0 is off"),
    ("training", {"batch_size": 0}, "training.batch_size: 0; it must be at least 1"),
    ("training", {"num_microbatches": 0}, "training.num_microbatches: 0; it must be at least 1"),
    (
        "training",
        {"num_microbatches": 5},
        "training.batch_size 32 does not divide into training.num_microbatches 5",
    ),
    ("training", {"num_epochs": 0.0}, "training.num_epochs: 0.0; it must be finite and above 0"),
    ("training", {"num_epochs": float("inf")}, "training.num_epochs: inf; it must be finite and above 0"),
    ("training", {"num_steps": 0}, "training.num_steps: 0; it must be at least 1"),
    (
        "training",
        {"learning_rate": -1e-5},
        "training.learning_rate: -1e-05; it must be finite and not negative",
    ),
    ("training", {"learning_rate": float("inf")}, "training.learning_rate: inf; it must be finite"),
    ("training", {"weight_decay": -0.1}, "training.weight_decay: -0.1; it must be finite and not negative"),
    ("training", {"adam_b1": 1.0}, "training.adam_b1: 1.0; it must be in [0, 1)"),
    ("training", {"adam_b2": -0.5}, "training.adam_b2: -0.5; it must be in [0, 1)"),
    ("training", {"warmup_steps": -1}, "training.warmup_steps: -1; it must be 0 or more"),
    ("training", {"max_grad_norm": -1.0}, "training.max_grad_norm: -1.0; it must be 0 (off) or more"),
    ("training", {"seed": -1}, "training.seed: -1; it must be in [0, 2**31)"),
    ("training", {"seed": 2**31}, "training.seed: 2147483648; it must be in [0, 2**31)"),
    ("evaluation", {"every": -1}, "evaluation.every: -1; it must be 0 or more"),
    ("evaluation", {"num_prompts": -1}, "evaluation.num_prompts: -1; it must be 0 or more"),
    ("evaluation", {"num_samples": 0}, "evaluation.num_samples: 0; it must be at least 1"),
    ("evaluation", {"batch_size": 0}, "evaluation.batch_size: 0; it must be at least 1"),
    ("evaluation", {"temperature": 0.0}, "evaluation.temperature: 0.0; it must be finite and above 0"),
    (
        "evaluation",
        {"temperature": float("inf")},
        "evaluation.temperature: inf; it must be finite and above 0",
    ),
    ("checkpoints", {"every": 0}, "checkpoints.every: 0; it must be at least 1"),
    ("checkpoints", {"keep": 0}, "checkpoints.keep: 0; it must be at least 1"),
    ("tracking", {"completions_every": 0}, "tracking.completions_every: 0; it must be at least 1"),
    ("tracking", {"num_completions": -1}, "tracking.num_completions: -1; it must be 0 or more"),
]


@pytest.mark.parametrize(("section", "values", "message"), INVALID, ids=lambda v: str(v)[:40])
def test_every_validation_error(section, values, message, tmp_path):
    path = write_yaml(tmp_path / "a.yaml", {section: values})
    with pytest.raises(ValueError) as caught:
        parse("--config", path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


TABLES = {
    "algorithm": algorithm_config._RANGES,
    "lora": model_config._LORA_RANGES,
    "data": data_config._RANGES,
    "sampling": (*sampling_config.SAMPLING_RANGES, *sampling_config._TRAINING_RANGES),
    "training": records._TRAINING_RANGES,
    "evaluation": records._EVALUATION_RANGES,
    "checkpoints": records._CHECKPOINT_RANGES,
    "tracking": records._TRACKING_RANGES,
}


@pytest.mark.parametrize("section", TABLES)
def test_every_range_is_tested(section):
    tested = {
        name for s, values, message in INVALID if s == section and "it must be" in message for name in values
    }
    assert {name for names, _, _ in TABLES[section] for name in names.split()} <= tested


@pytest.mark.parametrize("section", TABLES)
def test_every_number_has_a_range(section):
    record = dict(sections())[section]
    numbers = {f.name for f in dataclasses.fields(record) if {int, float} & types_of(f.type)}
    ranges = [name for names, _, _ in TABLES[section] for name in names.split()]
    # What ends a completion has a check of its own: a token is an id or a text.
    assert sorted(ranges) == sorted(numbers - {"eos_token_ids"})


def types_of(annotation) -> set:
    return {annotation, *typing.get_args(annotation)}


def test_the_ends_of_the_ranges_are_in_them():
    ends = {"kl_adaptation": 4.9, "ref_mixup_alpha": 1.0, "top_entropy": 1.0, "importance_cap": 1.0}
    ends |= {"entropy_coef": -0.1, "max_staleness": 0.0, "overlong_buffer": 0, "ref_sync_every": 0}
    config = parse(*(f"--algorithm.{name}={value}" for name, value in ends.items()))
    assert {name: getattr(config.algorithm, name) for name in ends} == ends


@pytest.mark.parametrize(
    ("group", "batch", "suggested"), [(8, 30, 32), (8, 3, 8), (8, 12, 16), (3, 32, 33), (64, 32, 64)]
)
def test_batch_size_is_a_multiple_of_the_group(group, batch, suggested):
    with pytest.raises(
        ValueError, match=f"batch_size {batch} counts completions .*group_size {group}"
    ) as error:
        parse(f"--algorithm.group_size={group}", f"--training.batch_size={batch}")
    assert str(error.value).endswith(f"try {suggested}")


def test_alpha_is_twice_the_rank_unless_given():
    assert parse("--lora.rank=8").lora.resolved_alpha == 16
    assert parse("--lora.rank=8", "--lora.alpha=4").lora.resolved_alpha == 4


def test_the_base_of_adapters_is_a_reference_that_never_moves():
    with pytest.raises(ValueError, match="ref_sync_every: 5 moves the reference, but with lora"):
        parse("--lora.rank=4", "--algorithm.ref_sync_every=5")
    assert parse("--lora.rank=4", "--algorithm.ref_sync_every=0").lora.rank == 4


TYPES = [
    ({"training": {"learning_rate": "fast"}}, "training.learning_rate: expected a value of type float. Got"),
    ({"training": {"seed": 1.5}}, "training.seed: expected a value of type int. Got value: 1.5"),
    ({"training": {"num_steps": "many"}}, "training.num_steps: expected a value of type int or null. Got"),
    ({"algorithm": {"kl_estimator": "k4"}}, "kl_estimator: Expected one of ['k1', 'k2', 'k3', 'ratio_k1',"),
    (
        {"algorithm": {"aggregation": "max"}},
        "aggregation: Expected one of ['sum_then_normalize', 'normalize_t",
    ),
    ({"algorithm": {"missing": "zero"}}, "missing: Expected one of ['drop', 'skip', 'renormalize']"),
    ({"algorithm": {"kl_placement": "both"}}, "kl_placement: Expected one of ['loss', 'reward']"),
    ({"algorithm": {"num_minibatches": 1.5}}, "algorithm.num_minibatches: expected a value of type int. Got"),
    ({"algorithm": {"dynamic_sampling": 3}}, "dynamic_sampling: expected a value of type bool or null. Got"),
    ({"model": {"type": "critic"}}, "model.type: Expected one of ['policy']"),
    ({"model": {"dtype": "float16"}}, "model.dtype: Expected one of ['float32', 'bfloat16']"),
    ({"checkpoints": {"best_mode": "most"}}, "checkpoints.best_mode: Expected one of ['max', 'min']"),
    ({"tracking": {"wandb": "maybe"}}, "tracking.wandb: expected a value of type bool"),
    ({"rewards": 3}, "rewards: expected a value of type list"),
    ({"training": 3}, "training: 3 is not a section of keys (batch_size, "),
]


@pytest.mark.parametrize(("content", "message"), TYPES, ids=lambda v: str(v)[:40])
def test_values_of_the_wrong_type(content, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        parse("--config", write_yaml(tmp_path / "a.yaml", content))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def sections():
    return [(f.name, f.type) for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)]


def test_no_field_is_unused():
    """Every field of every record is read somewhere outside of the records."""
    used = set()
    for path in ROOT.rglob("*.py"):
        if path not in [ROOT / "config" / f"{name}.py" for name in ("run", "model", "algorithm")]:
            tree = ast.parse(path.read_text())
            used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    # These reach `make_recipe` by keyword, all at once.
    accepted = set(inspect.signature(make_recipe).parameters).union(
        *(inspect.signature(recipe.surrogate).parameters for recipe in RECIPES.values())
    )
    for section, record in [*sections(), ("rewards", records.RewardConfig), ("", Config)]:
        for f in dataclasses.fields(record):
            if (section, f.name) == ("model", "type"):  # one value, kept for the plan's vocabulary
                continue
            assert f.name in used | (accepted if section == "algorithm" else set()), f"{section}.{f.name}"


def test_every_field_is_documented():
    for record in [record for _, record in sections()] + [records.RewardConfig, Config]:
        for f in dataclasses.fields(record):
            text = inspect.cleandoc(record.__doc__)  # Python 3.13 has taken the indentation out already
            assert f"\n    {f.name}: " in text, (record, f.name)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"timeout": 0.0}, "rewards.timeout: 0.0; it must be a finite number of seconds above 0"),
        ({"timeout": float("inf")}, "rewards.timeout: inf"),
        ({"timeout": 1.0, "workers": 0}, "rewards.workers: 0; it must be at least 1"),
        ({"timeout": 1.0, "rows_per_call": 0}, "rewards.rows_per_call: 0; it must be at least 1"),
        ({"workers": 2}, "rewards.workers: 2 needs rewards.timeout"),
        ({"rows_per_call": 2}, "rewards.rows_per_call: 2 needs rewards.timeout"),
    ],
)
def test_workers_of_a_reward(settings, match):
    with pytest.raises(ValueError, match=match):
        records.RewardConfig(function="f", **settings)


def test_a_timeout_from_yaml(tmp_path):
    given = {"rewards": [{"function": "f", "timeout": 5, "workers": 2, "rows_per_call": 1}]}
    (reward,) = parse("--config", write_yaml(tmp_path / "a.yaml", given)).rewards
    assert (reward.timeout, reward.workers, reward.rows_per_call) == (5.0, 2, 1)
    with pytest.raises(ValueError, match=r"timeout: -1\.0; it must be a finite number of seconds above 0"):
        parse("--rewards", "[{function: f, timeout: -1}]")
