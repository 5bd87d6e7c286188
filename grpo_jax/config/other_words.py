"""Advice on unknown keys: they may be the word of another project, or a typing mistake."""

import difflib
from collections.abc import Iterable
from typing import Any

_BATCHES = "it is `training.batch_size` here: completions of one update, all prompts and devices together"
_ONE_LOOP = "not supported: our own compiled loop samples the completions, and there is no second engine"
_ONE_DEVICE = "not supported: a run uses one device and holds the whole model there"
_HUB = "not supported: the model is written to run_dir/hf, from where any tool uploads it"
_ADAMW = "not supported: the optimizer is AdamW"
_EVERY_STEP = "not needed: every step is a row of metrics.jsonl"
_QUANTIZED = "not supported: weights are float32; `model.dtype` sets the data type of the computation"
_DOMAIN = "not supported: sampling has only temperature, `top_k`, `top_p` and `min_p`"
_LORA = "not supported: LoRA has `lora.rank`, `lora.alpha`, `lora.targets` and `lora.dropout`"
_NO_DATA = "not needed: all data are read at the start; seed and step determine their order"


def _is(key: str, more: str = "") -> str:
    return f"it is `{key}` here{more}"


# Word of TRL, verl or transformers in lower case -> the advice. A name with a section counts only there.
OTHER_WORDS: dict[str, str] = {
    # the objective
    "beta": _is("algorithm.kl_coef"),
    "kl_coeff": _is("algorithm.kl_coef"),
    "kl_loss_coef": _is("algorithm.kl_coef"),
    "epsilon": _is("algorithm.clip_range"),
    "epsilon_low": _is("algorithm.clip_range"),
    "clip_ratio": _is("algorithm.clip_range"),
    "clip_ratio_low": _is("algorithm.clip_range"),
    "epsilon_high": _is("algorithm.clip_range_high"),
    "clip_ratio_high": _is("algorithm.clip_range_high"),
    "clip_ratio_c": _is("algorithm.dual_clip"),
    "loss_type": _is("algorithm.name", ", or `algorithm.reduction` for the reduction alone"),
    "loss_agg_mode": _is("algorithm.reduction"),
    "adv_estimator": _is("algorithm.name"),
    "scale_rewards": _is("algorithm.advantage", ": std, batch or none"),
    "norm_adv_by_std_in_grpo": _is("algorithm.advantage", ": std or none"),
    "num_generations": _is("algorithm.group_size"),
    "num_return_sequences": _is("algorithm.group_size"),
    "rollout.n": _is("algorithm.group_size"),
    "ppo_epochs": _is("algorithm.num_iterations"),
    "steps_per_generation": _is("algorithm.num_minibatches"),
    "generation_batch_size": "it is `training.batch_size` times `algorithm.num_minibatches` here",
    "importance_sampling_level": _is("algorithm.ratio_level"),
    "multi_objective_aggregation": _is("algorithm.aggregation"),
    "mask_truncated_completions": _is("algorithm.mask_truncated"),
    "sync_ref_model": _is("algorithm.ref_sync_every"),
    "ref_model_sync_steps": _is("algorithm.ref_sync_every"),
    "ref_model_mixup_alpha": _is("algorithm.ref_mixup_alpha"),
    "top_entropy_quantile": _is("algorithm.top_entropy"),
    "entropy_coeff": _is("algorithm.entropy_coef"),
    "off_policy_mask_threshold": _is("algorithm.max_staleness"),
    "vllm_importance_sampling_cap": _is("algorithm.importance_cap"),
    "vllm_importance_sampling_clip_max": _is("algorithm.importance_cap"),
    "use_bias_correction_kl": "it is `algorithm.kl_estimator: ratio_k3` here",
    "sapo_temperature_pos": _is("algorithm.tau"),
    "sapo_temperature_neg": _is("algorithm.tau_negative"),
    "use_adaptive_entropy": "not supported: the bonus `algorithm.entropy_coef` stays as it is",
    "filter_groups": _is("algorithm.dynamic_sampling"),
    "gamma": "not supported: a completion has one reward, which is not discounted",
    "lam": "not supported: there is no critic, so no GAE",
    # the model
    "model_name_or_path": _is("model.hf_model_name"),
    "model_name": _is("model.hf_model_name"),
    "model_path": _is("model.hf_model_name"),
    "model.name": _is("model.hf_model_name"),
    "model.path": _is("model.hf_model_name"),
    "pretrained_model_name_or_path": _is("model.hf_model_name"),
    "model_revision": _is("model.revision"),
    "torch_dtype": _is("model.dtype"),
    "bf16": "it is `model.dtype: bfloat16` here",
    "fp16": "not supported; `model.dtype: bfloat16` is the fast one here",
    "tf32": "not needed: XLA chooses; `model.dtype: bfloat16` is the fast one here",
    "attn_implementation": _is("model.attention"),
    "gradient_checkpointing": "it is `model.remat: full` here, or `model.remat: dots`",
    "activation_checkpointing": "it is `model.remat: full` here, or `model.remat: dots`",
    "chat_template_kwargs": _is("model.chat_template_arguments"),
    "enable_thinking": "it is `model.chat_template_arguments: {enable_thinking: false}` here",
    "trust_remote_code": "not supported: code that comes with a model is never run",
    "load_in_4bit": _QUANTIZED,
    "load_in_8bit": _QUANTIZED,
    "tokenizer": "not needed: the tokenizer is the model's own",
    "tokenizer_name_or_path": "not needed: the tokenizer is the model's own",
    "ref_model": "not needed: the reference is the model at the start (see `algorithm.ref_sync_every`)",
    # LoRA
    "use_peft": "not needed: `lora.rank` above 0 trains adapters",
    "lora_r": _is("lora.rank"),
    "lora.r": _is("lora.rank"),
    "lora_alpha": _is("lora.alpha"),
    "lora_dropout": _is("lora.dropout"),
    "lora_target_modules": _is("lora.targets"),
    "target_modules": _is("lora.targets", "; empty is every dense layer of attention and MLP"),
    "use_rslora": _LORA,
    "use_dora": _LORA,
    "modules_to_save": _LORA,
    "bias": _LORA,
    # data
    "dataset_name": _is("data.dataset"),
    "dataset_path": _is("data.dataset"),
    "train_files": _is("data.train_file", ", which takes a list, too"),
    "val_files": _is("data.eval_file", ", which takes a list, too"),
    "data_files": _is("data.train_file", ", which takes a list, too"),
    "train_dataset": _is("data.train_file", " (or `data.dataset`)"),
    "eval_dataset": _is("data.eval_file", " (or `data.eval_split`)"),
    "val_file": _is("data.eval_file"),
    "test_file": _is("data.eval_file"),
    "valid_file": _is("data.eval_file"),
    "dataset_train_split": _is("data.train_split"),
    "dataset_test_split": _is("data.eval_split"),
    "split": _is("data.train_split"),
    "prompt_key": "it is `data.columns: {prompt: <name in the file>}` here",
    "prompt_column": "it is `data.columns: {prompt: <name in the file>}` here",
    "reward_fn_key": "it is `data.columns` here, which gives columns the names that the rewards ask for",
    "shuffle": "not supported: each pass shuffles the prompts again, by `training.seed`",
    "shuffle_dataset": "not supported: each pass shuffles the prompts again, by `training.seed`",
    "filter_overlong_prompts": "it is `data.over_length: drop` here",
    "truncation": _is("data.over_length", ": error, drop or truncate_left"),
    "streaming": _NO_DATA,
    "dataset_streaming": _NO_DATA,
    "dataloader_num_workers": _NO_DATA,
    "remove_unused_columns": "not needed: every column goes to the rewards",
    # rewards
    "reward_funcs": "it is `rewards` here, such as rewards: [exact_match, path/file.py:function]",
    "reward_functions": "it is `rewards` here, such as rewards: [exact_match, path/file.py:function]",
    "reward": "it is `rewards` here, a list such as rewards: [exact_match, path/file.py:function]",
    "reward_fn": "it is `rewards` here, such as rewards: [exact_match, path/file.py:function]",
    "custom_reward_function": "it is `rewards` here: rewards: ['verl:path/file.py:compute_score']",
    "reward_weights": "it is `weight` of each entry of `rewards` here",
    "reward_model_name_or_path": "it is a reward here: rewards: [{function: reward_model, ...}]",
    # sampling
    "max_completion_length": _is("sampling.max_new_tokens"),
    "max_response_length": _is("sampling.max_new_tokens"),
    "max_tokens": _is("sampling.max_new_tokens"),
    "max_length": _is(
        "sampling.max_new_tokens", " for completions, and `data.max_prompt_length` for prompts"
    ),
    "max_prompt_len": _is("data.max_prompt_length"),
    "stop_strings": _is("sampling.stop"),
    "stop_sequences": _is("sampling.stop"),
    "stop_words": _is("sampling.stop"),
    "eos_token_id": _is("sampling.eos_token_ids"),
    "eos_token": _is("sampling.eos_token_ids", ", which takes texts of tokens, too"),
    "stop_token_ids": _is("sampling.eos_token_ids"),
    "repetition_penalty": "not supported in sampling; there is a reward of that name",
    "frequency_penalty": _DOMAIN,
    "presence_penalty": _DOMAIN,
    "length_penalty": "not supported in sampling; there is a reward of that name",
    "no_repeat_ngram_size": _DOMAIN,
    "bad_words_ids": _DOMAIN,
    "logit_bias": _DOMAIN,
    "min_new_tokens": "not supported: a completion may end at once; a reward can punish that",
    "min_tokens": "not supported: a completion may end at once; a reward can punish that",
    "min_length": "not supported: a completion may end at once; a reward can punish that",
    "typical_p": _DOMAIN,
    "epsilon_cutoff": _DOMAIN,
    "num_beams": "not supported: completions are sampled, and there is no beam search",
    "do_sample": "not needed: training samples, and evaluation adds a greedy pass of its own",
    "generation_kwargs": _DOMAIN,
    "use_vllm": _ONE_LOOP,
    "vllm_mode": _ONE_LOOP,
    "vllm_gpu_memory_utilization": _ONE_LOOP,
    "gpu_memory_utilization": _ONE_LOOP,
    "tensor_parallel_size": _ONE_DEVICE,
    # the optimizer and the length of the run
    "per_device_train_batch_size": _BATCHES,
    "train_batch_size": _BATCHES,
    "ppo_mini_batch_size": _BATCHES,
    "gradient_accumulation_steps": "it is `training.num_microbatches` here, slices of `training.batch_size`",
    "ppo_micro_batch_size_per_gpu": "it is `training.num_microbatches` here, slices of `training.batch_size`",
    "num_train_epochs": _is("training.num_epochs"),
    "total_epochs": _is("training.num_epochs"),
    "epochs": _is("training.num_epochs"),
    "max_steps": _is("training.num_steps"),
    "total_training_steps": _is("training.num_steps"),
    "steps": _is("training.num_steps"),
    "lr": _is("training.learning_rate"),
    "lr_scheduler_type": _is("training.lr_schedule", ": constant, linear or cosine"),
    "lr_scheduler": _is("training.lr_schedule", ": constant, linear or cosine"),
    "scheduler": _is("training.lr_schedule", ": constant, linear or cosine"),
    "warmup_ratio": _is("training.warmup_steps", ", a number of steps"),
    "lr_warmup_steps": _is("training.warmup_steps"),
    "adam_beta1": _is("training.adam_b1"),
    "adam_beta2": _is("training.adam_b2"),
    "betas": "it is `training.adam_b1` and `training.adam_b2` here",
    "adam_epsilon": _ADAMW,
    "optim": _ADAMW,
    "optimizer": _ADAMW,
    "optim_args": _ADAMW,
    "max_norm": _is("training.max_grad_norm"),
    "gradient_clip": _is("training.max_grad_norm"),
    "grad_clip": _is("training.max_grad_norm"),
    "clip_grad_norm": _is("training.max_grad_norm"),
    "random_seed": _is("training.seed"),
    "data_seed": _is("training.seed", ", one seed for all"),
    "full_determinism": "not needed: a run is a function of `training.seed`",
    "torch_compile": "not needed: everything is compiled by XLA",
    "use_liger_kernel": "not needed: everything is compiled by XLA",
    "deepspeed": _ONE_DEVICE,
    "fsdp": _ONE_DEVICE,
    "n_gpus_per_node": _ONE_DEVICE,
    "use_cpu": "not needed: JAX_PLATFORMS=cpu in the environment",
    # evaluation, checkpoints, tracking
    "eval_steps": _is("evaluation.every"),
    "eval_strategy": _is("evaluation.every"),
    "test_freq": _is("evaluation.every"),
    "eval_every": _is("evaluation.every"),
    "eval_on_start": "not needed: a run begins and ends with an evaluation",
    "num_generations_eval": _is("evaluation.num_samples"),
    "per_device_eval_batch_size": _is("evaluation.batch_size"),
    "output_dir": _is("run_dir"),
    "default_local_dir": _is("run_dir"),
    "save_dir": _is("run_dir"),
    "out_dir": _is("run_dir"),
    "save_steps": _is("checkpoints.every"),
    "save_freq": _is("checkpoints.every"),
    "save_strategy": _is("checkpoints.every"),
    "save_total_limit": _is("checkpoints.keep"),
    "resume_from_checkpoint": _is("checkpoints.resume"),
    "load_best_model_at_end": _is("checkpoints.best_metric"),
    "metric_for_best_model": _is("checkpoints.best_metric"),
    "greater_is_better": _is("checkpoints.best_mode", ": max or min"),
    "report_to": "it is `tracking.wandb` and `tracking.tensorboard` here; metrics.jsonl is always written",
    "logger": "it is `tracking.wandb` and `tracking.tensorboard` here; metrics.jsonl is always written",
    "use_wandb": _is("tracking.wandb"),
    "run_name": _is("tracking.wandb_name"),
    "experiment_name": _is("tracking.wandb_name"),
    "project": _is("tracking.wandb_project"),
    "project_name": _is("tracking.wandb_project"),
    "logging_steps": _EVERY_STEP,
    "log_every": _EVERY_STEP,
    "logging_strategy": _EVERY_STEP,
    "log_completions": _is("tracking.completions_every"),
    "num_completions_to_print": _is("tracking.num_completions"),
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_token": _HUB,
}


def is_foreign(key: str) -> bool:
    """Says whether a key, with or without its section, is in the table."""
    return _entry(key) is not None


def _entry(key: str) -> str | None:
    """Returns the advice on a word of another project, or None."""
    section, _, word = key.lower().rpartition(".")
    nearer = f"{section.rpartition('.')[2]}.{word}"
    return next((OTHER_WORDS[name] for name in (key.lower(), nearer, word) if name in OTHER_WORDS), None)


def say_unknown(key: str, known: Iterable[str], *, value: Any = None) -> str:
    """Returns the sentence about an unknown key, see `advise`."""
    return f"unknown key {key!r}; {advise(key, known)}"


def advise(key: str, known: Iterable[str]) -> str:
    """Returns advice on an unknown key.

    Args:
        key: the unknown key with its section, such as `sampling.stop_strings`.
        known: the known keys, likewise with their sections.

    Returns:
        a clause that names the intended key, or says why there is none. If no key is near, it is
        `--help lists the keys`.
    """
    entry = _entry(key)
    if entry is not None:
        return entry
    section, _, word = key.rpartition(".")
    near = nearest_key(section, word, known)
    return f"did you mean {near!r}?" if near else "--help lists the keys"


def nearest_key(section: str, word: str, known: Iterable[str]) -> str | None:
    """Returns the key that is probably meant by a misspelled word or one in the wrong section."""
    scores: dict[str, float] = {}
    for candidate in known:
        its_section, _, its_word = candidate.rpartition(".")
        word_ratio = _likeness(word, its_word)
        section_ratio = _likeness(section, its_section) if section and its_section else 0.7
        if section == its_section:
            section_ratio = 1.0
        if word_ratio >= 0.75 and (section_ratio >= 0.7 or word_ratio == 1.0):
            scores[candidate] = 2 * word_ratio + section_ratio
    return max(scores, key=scores.__getitem__, default=None)


def _likeness(a: str, b: str) -> float:
    """Returns how alike two words are, 0 to 1."""
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()
