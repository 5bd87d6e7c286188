"""--from_trl: configs of `trl grpo` become ours with translated values, and what is not the same is said."""

import re

import pytest
import yaml

from grpo_jax.config.from_trl import translate
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.config.trl_fields import TRL_FIELDS

MINIMAL = """
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
dataset_name: trl-lib/DeepMath-103K
reward_funcs: [accuracy_reward]
"""


def translated(text: str):
    return translate(yaml.safe_load(text), "trl.yaml", text=text)


def config_of(tmp_path, text: str, *argv: str) -> Config:
    path = tmp_path / "trl.yaml"
    path.write_text(text)
    return parse_record(
        Config, ["--from_trl", str(path), *argv], command="test", description="", from_trl=True
    )


def test_the_least_that_trl_takes_brings_its_defaults(tmp_path, capsys):
    """Seen: linear became constant, beta2 .999 became .99, beta 0 became .04 and so on (FROM_TRL 3.1)."""
    out = translated(MINIMAL)
    assert out.nested() == {
        "algorithm": {"reduction": "token", "kl_coef": 0.0},
        "model": {"hf_model_name": "Qwen/Qwen2.5-0.5B-Instruct", "dtype": "bfloat16", "remat": "full"},
        "data": {"dataset": "trl-lib/DeepMath-103K", "columns": {"answer": "solution"}},
        "rewards": [{"function": "math_answer"}],
        "sampling": {"max_new_tokens": 512},
        "training": {
            "batch_size": 8,
            "learning_rate": 1e-6,
            "num_epochs": 3.0,
            "adam_b2": 0.999,
            "lr_schedule": "linear",
            "seed": 42,
        },
        "checkpoints": {"every": 500},
        "run_dir": "trainer_output",
    }
    # Each of them is a default, which the printed text says with our own.
    assert set(out.defaults) == {
        "algorithm.reduction", "algorithm.kl_coef", "model.dtype", "model.remat", "sampling.max_new_tokens",
        "training.batch_size", "training.learning_rate", "training.num_epochs", "training.adam_b2",
        "training.lr_schedule", "training.seed", "checkpoints.every", "run_dir",
    }  # fmt: skip
    config = config_of(tmp_path, MINIMAL)
    printed = capsys.readouterr().err
    assert "learning_rate: 1.0e-06  # TRL's default of learning_rate; ours is 1e-05\n" in printed
    assert "reduction: token  # TRL's default of loss_type; ours is sequence\n" in printed
    assert "kl_coef: 0.0  # TRL's default of beta; ours is 0.04\n" in printed
    for remark in ("num_processes: ", "save_total_limit: ", "resume_from_checkpoint: ", "reward_funcs: acc"):
        assert f"\n#   {remark}" in printed
    # What is printed is a config of ours, which says the same.
    (tmp_path / "ours.yaml").write_text(printed)
    again = parse_record(Config, ["--config", str(tmp_path / "ours.yaml")], command="t", description="")
    assert again == config
    assert config.training.learning_rate == 1e-6 and config.data.columns == {"answer": "solution"}


# Fields beside MINIMAL -> settings of ours (None: there must be no such setting), fields that are said to be
# missing, and fields that are said to differ.
CASES = {
    "quick start": (
        "{num_generations: 16, beta: 0.001, epsilon: 0.1, learning_rate: 1e-5, bf16: false, seed: 7}",
        {"algorithm.group_size": 16, "algorithm.kl_coef": 0.001, "algorithm.kl_estimator": "ratio_k3",
         "algorithm.clip_range": 0.1, "training.learning_rate": 1e-5, "model.dtype": "float32",
         "training.batch_size": 16, "training.seed": 7, "per": "per_device_train_batch_size: 16"},
        [], [],
    ),
    "batches": (
        "{per_device_train_batch_size: 4, gradient_accumulation_steps: 8, num_processes: 2, "
        "steps_per_generation: 32, num_generations: 8, num_iterations: 2}",
        {"training.batch_size": 64, "training.num_microbatches": 16, "algorithm.num_minibatches": 4,
         "algorithm.num_iterations": 2},
        [], [],
    ),
    "a generation smaller than an update": (
        "{per_device_train_batch_size: 8, gradient_accumulation_steps: 4, steps_per_generation: 1}",
        {"training.batch_size": 32, "training.num_microbatches": 4, "algorithm.num_minibatches": 1},
        [], [],
    ),
    "updates of half a group": (
        "{per_device_train_batch_size: 4, generation_batch_size: 16, num_generations: 8}",
        {"training.batch_size": 16, "training.num_microbatches": 4, "algorithm.num_minibatches": 1},
        [], ["steps_per_generation"],
    ),
    "dr_grpo": (
        "{loss_type: dr_grpo, scale_rewards: false}",
        {"algorithm.name": "grpo", "algorithm.reduction": "constant", "algorithm.advantage": "none"},
        [], [],
    ),
    "grpo with two-sided clip": (
        "{loss_type: grpo, epsilon_high: 0.28, delta: 1.5, scale_rewards: batch, beta: 0.1, "
        "use_bias_correction_kl: false, sync_ref_model: true, ref_model_sync_steps: 64, "
        "ref_model_mixup_alpha: 0.9}",
        {"algorithm.reduction": "sequence", "algorithm.clip_range_high": 0.28, "algorithm.delta": 1.5,
         "algorithm.advantage": "batch", "algorithm.kl_estimator": "k3", "algorithm.ref_sync_every": 64,
         "algorithm.ref_mixup_alpha": 0.9},
        [], [],
    ),
    "gspo": (
        "{importance_sampling_level: sequence, loss_type: grpo, epsilon: 3e-4, epsilon_high: 4e-4}",
        {"algorithm.ratio_level": "sequence", "algorithm.clip_range": 3e-4,
         "algorithm.clip_range_high": 4e-4},
        [], [],
    ),
    "luspo": (
        "{loss_type: luspo, importance_sampling_level: sequence}",
        {"algorithm.reduction": "sequence_sum", "algorithm.ratio_level": "sequence"}, [], [],
    ),
    "cispo": (
        "{loss_type: cispo, epsilon_high: 5.0, epsilon: 0.3}",
        {"algorithm.name": "cispo", "algorithm.cap": 5.0, "algorithm.clip_range": None}, [], [],
    ),
    "sapo": (
        "{loss_type: sapo, sapo_temperature_neg: 1.1, epsilon: 0.3}",
        {"algorithm.name": "sapo", "algorithm.tau_negative": 1.1, "algorithm.tau": None,
         "algorithm.clip_range": None},
        [], ["epsilon"],
    ),
    "bnpo and masks": (
        "{loss_type: bnpo, mask_truncated_completions: true, top_entropy_quantile: 0.2, entropy_coef: 0.01, "
        "off_policy_mask_threshold: 0.5}",
        {"algorithm.reduction": "local_token", "algorithm.mask_truncated": True,
         "algorithm.top_entropy": 0.2, "algorithm.entropy_coef": 0.01, "algorithm.max_staleness": 0.5},
        [], ["mask_truncated_completions"],
    ),
    "several rewards": (
        "{reward_funcs: [accuracy_reward, think_format_reward, my.pack.fn], reward_weights: [1.0, 0.5, 2], "
        "multi_objective_aggregation: normalize_then_sum, reward_model_name_or_path: null}",
        {"algorithm.aggregation": "gdpo", "algorithm.missing": "skip", "algorithm.advantage": None,
         "data.columns": {"answer": "solution", "solution": "solution"},
         "rewards": [
             {"function": "math_answer"},
             {"function": "regex_format", "weight": 0.5, "arguments": {
                 "pattern": r"(?s)\A<think>(?!.*<think>)(.*?)</think>", "search": True}},
             {"function": "my.pack:fn", "weight": 2.0}]},
        [], ["reward_funcs"],
    ),
    "a reward model and a long limit": (
        "{reward_model_name_or_path: org/rm, reward_funcs: [get_soft_overlong_punishment], "
        "max_completion_length: 1280, reward_weights: [2.0, 1.0]}",
        {"rewards": [{"function": "reward_model", "arguments": {"model": "org/rm"}, "weight": 2.0}],
         "algorithm.overlong_buffer": 256, "algorithm.missing": None, "data.columns": None},
        [], [],
    ),
    "adapters": (
        "{use_peft: true, lora_alpha: 64, lora_r: 4, use_rslora: true, lora_target_modules: [q_proj, v_proj]"
        ", lora_modules_to_save: [lm_head], sync_ref_model: true, beta: 0.1}",
        {"lora.rank": 4, "lora.alpha": 128.0, "lora.dropout": 0.05, "lora.targets": ["q_proj", "v_proj"],
         "algorithm.ref_sync_every": None},
        ["sync_ref_model", "lora_modules_to_save"], [],
    ),
    "all-linear": (
        "{use_peft: true, lora_target_modules: all-linear}",
        {"lora.rank": 16, "lora.alpha": 32.0, "lora.targets": None}, [], [],
    ),
    "schedules": (
        "{max_steps: 200, warmup_ratio: 0.1, lr_scheduler_type: cosine_with_min_lr, optim: adafactor, "
        "num_train_epochs: 1, lr_scheduler_kwargs: {min_lr: 1e-7}}",
        {"training.num_steps": 200, "training.num_epochs": None, "training.warmup_steps": 20,
         "training.lr_schedule": "cosine"},
        ["lr_scheduler_type", "optim", "lr_scheduler_kwargs"], [],
    ),
    "constant has no warmup in transformers": (
        "{lr_scheduler_type: constant, warmup_steps: 10}",
        {"training.lr_schedule": "constant", "training.warmup_steps": None}, [], ["warmup_steps"],
    ),
    "a share of an unknown number of steps": (
        "{lr_scheduler_type: constant_with_warmup, warmup_steps: 0.1}",
        {"training.lr_schedule": "constant", "training.warmup_steps": None}, ["warmup_steps"], [],
    ),
    "sampling": (
        "{temperature: 0.7, top_k: -1, top_p: 0.9, min_p: 0.05, generation_kwargs: {stop_strings: [END], "
        "num_beams: 2}, chat_template_kwargs: {enable_thinking: false}, repetition_penalty: 1.1}",
        {"sampling.temperature": 0.7, "sampling.top_k": 0, "sampling.top_p": 0.9, "sampling.min_p": 0.05,
         "sampling.stop": ["END"], "model.chat_template_arguments": {"enable_thinking": False}},
        ["generation_kwargs", "repetition_penalty"], [],
    ),
    "evaluation and checkpoints": (
        "{eval_strategy: steps, eval_steps: 20, num_generations_eval: 2, per_device_eval_batch_size: 16, "
        "save_steps: 100, save_total_limit: 3, metric_for_best_model: eval_reward, "
        "load_best_model_at_end: true, push_to_hub: true}",
        {"evaluation.every": 20, "evaluation.num_samples": 2, "evaluation.batch_size": 16,
         "data.eval_split": "test", "checkpoints.every": 100, "checkpoints.keep": 3,
         "checkpoints.best_metric": "eval/reward"},
        ["push_to_hub"], ["eval_strategy"],
    ),
    "tracking": (
        "{report_to: [wandb, trackio], run_name: one, project: p, logging_steps: 1, log_completions: true, "
        "num_completions_to_print: 4, output_dir: out, use_vllm: true, vllm_mode: server, fp16: true, "
        "num_processes: 1, use_liger_kernel: true}",
        {"tracking.wandb": True, "tracking.wandb_name": "one", "tracking.wandb_project": "p",
         "tracking.num_completions": 4, "run_dir": "out", "model.dtype": "bfloat16"},
        ["fp16", "report_to", "use_vllm"], ["use_liger_kernel"],
    ),
    "files": (
        "{dataset_name: null, datasets: [{path: json, data_files: [a.jsonl, b.jsonl]}], test_split_size: 0.1"
        ", eval_strategy: epoch, torch_dtype: bfloat16, max_prompt_length: 256}",
        {"data.train_file": ["a.jsonl", "b.jsonl"], "data.dataset": None, "data.eval_fraction": 0.1,
         "data.max_prompt_length": 256, "data.over_length": "truncate_left", "model.dtype": "bfloat16"},
        ["eval_strategy"], ["dtype", "eval_strategy"],
    ),
}  # fmt: skip
# Notes that nearly every file gets.
USUAL = {"num_processes", "save_total_limit", "resume_from_checkpoint", "lora_target_modules", "reward_funcs"}


@pytest.mark.parametrize("name", CASES)
def test_values_are_translated(name, tmp_path):
    fields, expected, missing, differs = CASES[name]
    document = {**yaml.safe_load(MINIMAL), **yaml.safe_load(fields)}
    expected = dict(expected)
    more = yaml.safe_load(expected.pop("per", "{}"))
    text = yaml.safe_dump({**document, **more}, sort_keys=False)
    out = translated(text)
    for key, value in expected.items():
        assert out.settings.get(key) == value, key
    assert [line.partition(":")[0] for line in out.missing] == missing
    assert {line.partition(":")[0] for line in out.differs} - USUAL == set(differs) - USUAL
    config = config_of(tmp_path, text)  # our own checks of types, ranges and sections accept it
    for key, value in expected.items():
        if value is not None and key != "rewards":
            section, _, setting = key.rpartition(".")
            assert getattr(getattr(config, section) if section else config, setting) == value


def test_what_is_further_right_wins_over_the_translation(tmp_path, capsys):
    config = config_of(tmp_path, MINIMAL, "--training.seed=3", "--model.dtype", "float32")
    assert (config.training.seed, config.model.dtype, config.training.adam_b2) == (3, "float32", 0.999)


def test_everything_that_is_wrong_with_a_file_of_trl_at_once(tmp_path):
    text = (
        "model_name_or_path: x\nnum_generation: 4\nreward_funcs: [accuracy, get_cosine_scaled_reward]\n"
        "loss_type: vespo\nbeta: high\nscale_rewards: std\ntraining: {seed: 1}\nreward_weights: [1]\n"
    )
    with pytest.raises(ValueError) as caught:
        config_of(tmp_path, text)
    said = [line.removeprefix(f"{tmp_path}/trl.yaml") for line in caught.value.lines]
    for start in (
        ", line 2: unknown field 'num_generation' of TRL 1.16; did you mean 'num_generations'?",
        ", line 4: loss_type: vespo has no counterpart; choose one of grpo, bnpo",
        ", line 5: beta: 'high' is not a number",
        ", line 6: scale_rewards: 'std'; it must be one of group",
        ", line 7: 'training' is a section of our own config",
        ", line 8: reward_weights: 1 weights for 2 reward functions",
        ": dataset_name is missing",
    ):
        assert sum(line.startswith(start) for line in said) == 1, start
    assert len(said) == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{num_generations: 3}",
            "num_generations: 3 does not divide the 8 completions",
        ),
        ("{steps_per_generation: 2, generation_batch_size: 16}", "are both given; TRL takes only one"),
        ("{reward_funcs: [get_soft_overlong_punishment]}", "reward_funcs: no function is left"),
        ("{reward_funcs: null}", "reward_funcs is missing"),
        ("{reward_funcs: [accuracy]}", "reward_funcs: accuracy is no function that `trl grpo` knows"),
        ("{datasets: [{path: a}, {path: b}]}", "datasets: a mixture of data sets"),
        ("{num_iterations: 0}", "algorithm.num_iterations: 0; it must be at least 1"),
        ("{temperature: 0}", "sampling.temperature: 0.0; it must be finite and above 0"),
    ],
)
def test_a_wrong_value_is_one_line(text, message, tmp_path, capsys):
    document = {**yaml.safe_load(MINIMAL), **yaml.safe_load(text)}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        config_of(tmp_path, yaml.safe_dump(document))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"^--from_trl: no\.yaml: there is no such file"):
        parse_record(Config, ["--from_trl", "no.yaml"], command="t", description="", from_trl=True)
    with pytest.raises(ValueError, match=r"trl\.yaml: expected fields of `trl grpo` and .*, got 'a'"):
        config_of(tmp_path, "a")


def test_it_is_no_key_of_a_config_file(tmp_path):
    (tmp_path / "a.yaml").write_text("from_trl: trl.yaml\n")
    with pytest.raises(ValueError, match=r"a\.yaml, line 1: from_trl is an option of the"):
        argv = ["--config", str(tmp_path / "a.yaml")]
        parse_record(Config, argv, command="t", description="", from_trl=True)
    with pytest.raises(ValueError, match="--from_trl: expected one argument"):
        parse_record(Config, ["--from_trl"], command="t", description="", from_trl=True)


def test_a_config_of_trl_where_ours_is_expected_says_how(tmp_path):
    (tmp_path / "trl.yaml").write_text(MINIMAL)
    argv = ["--config", str(tmp_path / "trl.yaml")]
    with pytest.raises(ValueError, match=r"(?s)^3 problems .*translates it$") as caught:
        parse_record(Config, argv, command="t", description="", from_trl=True)
    assert str(caught.value).count("--from_trl") == 1
    with pytest.raises(ValueError) as caught:  # of a command that cannot, nothing is said
        parse_record(Config, argv, command="t", description="")
    assert "--from_trl" not in str(caught.value)


def test_every_field_is_read_or_noted():
    """A field of TRL with a value of its own is set, noted, or explained: nothing is lost in silence."""
    silent = {"logging_steps", "logging_strategy", "logging_first_step", "log_completions", "disable_tqdm",
              "log_unique_prompts", "attn_implementation", "do_train", "do_eval", "remove_unused_columns",
              "run_name", "project", "eval_on_start"}  # fmt: skip
    values = {str: "other", bool: None, int: 3, float: 0.7, list: ["x"], type(None): "other"}
    for name, field in TRL_FIELDS.items():
        if name in silent:
            continue
        value = (not field.default) if isinstance(field.default, bool) else values[type(field.default)]
        before = translated(MINIMAL)
        try:
            after = translated(MINIMAL + yaml.safe_dump({name: value}) if name not in MINIMAL else MINIMAL)
        except ValueError:
            continue  # it is refused, in a line
        told = (before.settings, before.missing, before.differs)
        changed = told != (after.settings, after.missing, after.differs)
        assert changed or name in MINIMAL or (name in before.used and value == field.default), name
