"""The words of TRL, verl and Tunix: each gives its counterpart here, or "there is none" with the reason."""

import json
import re
import typing
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml

from grpo_jax.config.other_words import OTHER_WORDS, advise
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.peer_words import VALUES
from grpo_jax.config.run import Config
from grpo_jax.config.trl_fields import GROUPS, OLD_NAMES, TRL_FIELDS

FIXTURES = Path(__file__).parent.parent / "fixtures"
TRL = json.loads((FIXTURES / "trl_fields.json").read_text())
TRL.pop("")


def parse(*argv) -> Config:
    return parse_record(Config, list(argv), command="test", description="")


def of_file(tmp_path, text) -> Config:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return parse("--config", str(path))


def keys_of(record=Config, prefix=""):
    for name, kind in typing.get_type_hints(record).items():
        yield prefix + name
        for inner in (kind, *typing.get_args(kind)):
            if is_dataclass(inner):
                yield from keys_of(inner, f"{prefix}{name}.")


KEYS = sorted(set(keys_of()))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("sampling.repetition_penalty", "not supported in sampling"),
        ("sampling.eos_token_id", "`sampling.eos_token_ids`"),
        ("sampling.min_new_tokens", "not supported: a completion may end at once"),
        ("sampling.stop_strings", "`sampling.stop`"),
        ("sampling.num_beams", "not supported"),
        ("model.chat_template_kwargs", "`model.chat_template_arguments`"),
        ("data.shuffle", "not supported: each pass shuffles the prompts again"),
        ("training.lr", "`training.learning_rate`"),
        ("lora.r", "`lora.rank`"),
        ("seed", "did you mean 'training.seed'?"),
        ("sampling.seed", "did you mean 'training.seed'?"),
        ("trainin.learning_rte", "did you mean 'training.learning_rate'?"),
        ("algorithm.kl_ceof", "did you mean 'algorithm.kl_coef'?"),
        # Words that are near to nothing: a wrong guess would be worse than none.
        ("sampling.top_words", "--help lists the keys"),
        ("data.evaluate_all", "--help lists the keys"),
        ("training.bfloat", "--help lists the keys"),
    ],
)
def test_advice(key, said):
    """Seen: `sampling.stop` -> top_p, `data.shuffle` -> eval_file, and so on (case data-08)."""
    assert said in advise(key, KEYS)


def test_no_key_is_taken_by_its_beginning():
    """Seen: `--lora.r=16` was taken for lora.rank, and `--training.lr` for lr_schedule."""
    for option, key in (("--lora.r=16", "lora.rank"), ("--training.lr=1", "training.learning_rate")):
        with pytest.raises(ValueError, match=rf"unknown key .*; it is `{re.escape(key)}` here"):
            parse(option)


@pytest.mark.parametrize(("group", "name"), list(zip(GROUPS, TRL, strict=False)), ids=list(TRL))
def test_the_table_has_every_field_of_trl_with_its_default(group, name):
    assert {row.name: row.default for row in GROUPS[group]} == TRL[name]


def test_every_field_of_trl_in_one_file(tmp_path):
    """Seen: of the 20 keys of trl_grpo.yaml, 9 got no advice, and num_generations that of num_iterations."""
    names = [name for fields in TRL.values() for name in fields]
    with pytest.raises(ValueError) as caught:
        of_file(tmp_path, yaml.safe_dump(dict.fromkeys(names, 1), sort_keys=False))
    lines = caught.value.lines
    assert len(lines) == len(names) > 200
    for line, name in zip(lines, names, strict=True):
        advice = TRL_FIELDS[name].advice
        same = re.match(rf"it is `(\w+\.{name})` here", advice)
        wanted = f"did you mean '{same[1]}'?" if same else advice
        assert line.endswith(f": unknown key {name!r}; {wanted}"), line


WRONG = [
    # TRL
    ("num_generations=8", "`algorithm.group_size`"),
    ("beta=0.04", "`algorithm.kl_coef`"),
    ("epsilon_high=0.28", "`algorithm.clip_range_high`"),
    ("max_completion_length=256", "`sampling.max_new_tokens`"),
    ("per_device_train_batch_size=8", "`training.batch_size`"),
    ("gradient_accumulation_steps=4", "`training.num_microbatches`"),
    ("steps_per_generation=4", "`algorithm.num_minibatches`"),
    ("scale_rewards=false", "it is `algorithm.advantage: none` here"),
    ("scale_rewards=batch", "it is `algorithm.advantage: batch` here"),
    ("algorithm.loss_type=dr_grpo", "it is `algorithm.reduction: constant` here"),
    ("loss_type=cispo", "it is `algorithm.name: cispo` here"),
    ("loss_type=vespo", "it is `algorithm.reduction` here"),
    ("multi_objective_aggregation=normalize_then_sum", "it is `algorithm.aggregation: gdpo` here"),
    ("bf16=true", "it is `model.dtype: bfloat16` here"),
    ("bf16=false", "it is `model.dtype: float32` here"),
    ("gradient_checkpointing=false", "it is `model.remat: none` here"),
    ("torch_dtype=bfloat16", "`model.dtype`"),
    ("report_to=wandb", "it is `tracking.wandb: true` here"),
    ("training.lr_scheduler_type=constant_with_warmup", "it is `training.lr_schedule: constant` here"),
    ("lora_target_modules=all-linear", "it is `lora.targets: []` here"),
    ("use_vllm=true", "not supported: our own compiled loop"),
    ("push_to_hub=true", "not supported in training: the command export takes"),
    # verl
    ("actor_rollout_ref.rollout.n=8", "`algorithm.group_size`"),
    ("actor_rollout_ref.actor.ppo_mini_batch_size=64", "prompts times `algorithm.group_size`"),
    ("actor_rollout_ref.actor.kl_loss_type=low_var_kl", "it is `algorithm.kl_estimator: k3` here"),
    ("actor_rollout_ref.actor.loss_agg_mode=token-mean", "it is `algorithm.reduction: token` here"),
    ("actor_rollout_ref.actor.optim.lr=1e-6", "`training.learning_rate`"),
    ("actor_rollout_ref.rollout.tensor_model_parallel_size=2", "not supported: a run uses one device"),
    ("data.train_batch_size=64", "`training.batch_size` times `algorithm.num_minibatches`"),
    ("algorithm.adv_estimator=rloo", "it is `algorithm.name: rloo` here"),
    ("algorithm.adv_estimator=gae", "it is `algorithm.name` here"),
    ("trainer.n_gpus_per_node=8", "not supported: a run uses one device"),
    ("trainer.test_freq=5", "`evaluation.every`"),
    # Tunix
    ("max_tokens_to_generate=256", "`sampling.max_new_tokens`"),
    ("mini_batch_size=8", "`training.batch_size`"),
    ("loss_algo=gspo-token", "it is `algorithm.name: gspo_token` here"),
    ("rollout_config.kv_cache_size=1024", "not needed: the cache has room"),
    ("algorithm.epsilon=0.2", "`algorithm.clip_range`"),
]


@pytest.mark.parametrize(("setting", "said"), WRONG)
def test_a_wrong_key_gives_its_counterpart(setting, said, tmp_path):
    key, _, value = setting.partition("=")
    with pytest.raises(ValueError) as caught:
        parse(f"--{setting}")
    assert str(caught.value).startswith(f"unknown key {key!r}; ") and said in str(caught.value)
    document = yaml.safe_load(value)
    for name in reversed(key.split(".")):
        document = {name: document}
    with pytest.raises(ValueError) as caught:
        of_file(tmp_path, yaml.safe_dump(document))
    assert f"unknown key {key!r}; " in str(caught.value) and said in str(caught.value)


def test_the_tables_name_keys_that_there_are():
    for word, advice in OTHER_WORDS.items():
        assert word not in KEYS and word == word.lower(), word
        for key in re.findall(r"`([\w.]+)[:`]", advice):
            names = {key.rpartition(".")[2] for key in KEYS} if "." not in key else KEYS
            assert key in names or key == "reward_model", (word, advice)
        assert advice.startswith(("it is ", "not supported", "not needed")), word
    settings = [setting for values in VALUES.values() for setting in values.values()]
    assert len(settings) > 40
    for setting in settings:
        key, _, value = setting.partition(": ")
        given = [f"--{key}={value}"]
        needs = {"lora.targets": ["--lora.rank=4"]}.get(key, [])
        assert key in KEYS and parse(*given, *needs)
    assert set(OLD_NAMES.values()) <= set(TRL_FIELDS)


def test_a_guess_by_spelling_never_comes_before_the_table():
    for name, field in TRL_FIELDS.items():
        said = advise(name, KEYS)
        assert said == field.advice or re.fullmatch(rf"did you mean '\w+\.{name}'\?", said), name
