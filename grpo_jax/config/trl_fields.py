"""The fields of TRL 1.16, each with its default there and its counterpart here.

Three things read these tables: the advice on an unknown key, `--from_trl`, and the page docs/from_trl.md,
which a test holds equal to them.
"""

from typing import Any, NamedTuple

from grpo_jax.config.transformers_fields import TRAINING_ARGUMENTS


class Field(NamedTuple):
    """A field: its name, its default in TRL, and a clause that says what it is here."""

    name: str
    default: Any
    advice: str


def _is(key: str, more: str = "") -> str:
    return f"it is `{key}` here{more}"


_ONE_LOOP = "not supported: our own compiled loop samples the completions, and there is no second engine"
_SAME_POLICY = "not needed: sampler and scorer are one; `algorithm.importance_cap` truncates what differs"
_NO_VESPO = "not supported: there is no VESPO loss; `algorithm.name` lists the recipes"
_NO_CONTROLLER = "not supported: the weight `algorithm.entropy_coef` of the bonus stays as it is"
_OWN_CACHE = "not needed: finished completions leave our own decoding loop, which has its own cache"
_ADAPTERS = "not supported: LoRA has `lora.rank`, `lora.alpha`, `lora.targets` and `lora.dropout`"
_QUANTIZED = "not supported: weights are float32; `model.dtype` sets the data type of the computation"
_ALL_SAMPLES = "not needed: `tracking.completions_every` and completions.jsonl show samples of many prompts"

GRPO_CONFIG = (
    ("learning_rate", 1e-6, _is("training.learning_rate")),
    ("model_init_kwargs", None, "it is the section `model` here, whose keys are fixed; see `model.dtype`"),
    ("trust_remote_code", False, "not supported: code that comes with a model is never run"),
    ("router_aux_loss_coef", None, "not supported: mixtures of experts are refused"),
    ("disable_dropout", False, "not needed: the model's own dropout is always off"),
    ("cast_lm_head_to_fp32", False, "not needed: logits are summed in float32 under either `model.dtype`"),
    ("remove_unused_columns", False, "not needed: every column goes to the rewards"),
    ("num_generations", 8, _is("algorithm.group_size")),
    ("num_generations_eval", None, _is("evaluation.num_samples")),
    ("max_completion_length", 512, _is("sampling.max_new_tokens")),
    ("ds3_gather_for_generation", True, "not needed: a run uses one device and holds the whole model there"),
    ("shuffle_dataset", True,
     "not supported: prompts are always shuffled, anew in each pass, by `training.seed`"),
    ("pad_to_multiple_of", "auto", "not needed: prompts are padded to the longest, or to a few lengths"),
    ("generation_batch_size", None,
     "it is `training.batch_size` times `algorithm.num_minibatches` here"),
    ("steps_per_generation", None,
     _is("algorithm.num_minibatches", ", which counts updates: divide by gradient_accumulation_steps")),
    ("temperature", 1.0, _is("sampling.temperature")),
    ("top_p", 1.0, _is("sampling.top_p")),
    ("top_k", 0, _is("sampling.top_k")),
    ("min_p", None, _is("sampling.min_p", ", where 0 is off")),
    ("generation_kwargs", None,
     "not supported as a whole: sampling has temperature, `top_k`, `top_p`, `min_p`, `stop` and "
     "`eos_token_ids`"),
    ("chat_template_kwargs", None, _is("model.chat_template_arguments")),
    ("repetition_penalty", 1.0, "not supported in sampling; there is a reward of that name"),
    ("cache_implementation", None, _OWN_CACHE),
    ("use_vllm", False, _ONE_LOOP),
    ("vllm_mode", "colocate", _ONE_LOOP),
    ("vllm_model_impl", "vllm", _ONE_LOOP),
    ("vllm_enable_sleep_mode", False, _ONE_LOOP),
    ("vllm_structured_outputs_regex", None,
     "not supported: decoding is not constrained; a reward such as regex_format judges the form"),
    ("vllm_server_base_url", None, _ONE_LOOP),
    ("vllm_server_host", "0.0.0.0", _ONE_LOOP),
    ("vllm_server_port", 8000, _ONE_LOOP),
    ("vllm_server_timeout", 240.0, _ONE_LOOP),
    ("vllm_group_port", 51216, _ONE_LOOP),
    ("vllm_gpu_memory_utilization", 0.3, _ONE_LOOP),
    ("vllm_max_model_length", None, _ONE_LOOP),
    ("vllm_tensor_parallel_size", 1, _ONE_LOOP),
    ("beta", 0.0, _is("algorithm.kl_coef")),
    ("num_iterations", 1, _is("algorithm.num_iterations")),
    ("epsilon", 0.2, _is("algorithm.clip_range")),
    ("delta", None, _is("algorithm.delta")),
    ("epsilon_high", None, _is("algorithm.clip_range_high", ", and `algorithm.cap` with CISPO")),
    ("sapo_temperature_neg", 1.05, _is("algorithm.tau_negative")),
    ("sapo_temperature_pos", 1.0, _is("algorithm.tau")),
    ("vespo_k_pos", 2.0, _NO_VESPO),
    ("vespo_lambda_pos", 3.0, _NO_VESPO),
    ("vespo_k_neg", 3.0, _NO_VESPO),
    ("vespo_lambda_neg", 2.0, _NO_VESPO),
    ("importance_sampling_level", "token", _is("algorithm.ratio_level")),
    ("reward_weights", None, "it is `weight` of each entry of `rewards` here"),
    ("multi_objective_aggregation", "sum_then_normalize",
     _is("algorithm.aggregation", "; TRL's normalize_then_sum is `algorithm.aggregation: gdpo`")),
    ("scale_rewards", "group", _is("algorithm.advantage", ": std, batch or none")),
    ("loss_type", "dapo", _is("algorithm.reduction", ", and `algorithm.name` for cispo and sapo")),
    ("mask_truncated_completions", False,
     _is("algorithm.mask_truncated", ", which also takes them out of their group's mean")),
    ("sync_ref_model", False, _is("algorithm.ref_sync_every", ", above 0")),
    ("ref_model_mixup_alpha", 0.6, _is("algorithm.ref_mixup_alpha")),
    ("ref_model_sync_steps", 512, _is("algorithm.ref_sync_every")),
    ("top_entropy_quantile", 1.0, _is("algorithm.top_entropy")),
    ("entropy_coef", 0.0, _is("algorithm.entropy_coef")),
    ("use_adaptive_entropy", False, _NO_CONTROLLER),
    ("entropy_coef_min", 0.0, _NO_CONTROLLER),
    ("entropy_coef_max", 1.0, _NO_CONTROLLER),
    ("entropy_coef_delta", 0.005, _NO_CONTROLLER),
    ("entropy_target", 0.2, _NO_CONTROLLER),
    ("max_tool_calling_iterations", None, "not supported: a completion is one turn, without tools"),
    ("vllm_importance_sampling_correction", True, _SAME_POLICY),
    ("vllm_importance_sampling_mode", "sequence_mask", _SAME_POLICY),
    ("vllm_importance_sampling_clip_max", 3.0,
     _is("algorithm.importance_cap", ", which truncates the weight of each token")),
    ("vllm_importance_sampling_clip_min", None, _SAME_POLICY),
    ("off_policy_mask_threshold", None, _is("algorithm.max_staleness")),
    ("use_bias_correction_kl", True, "it is `algorithm.kl_estimator: ratio_k3` here"),
    ("log_completions", False, _is("tracking.completions_every", "; samples are always written")),
    ("log_multimodal", True, "not supported: models are text alone"),
    ("num_completions_to_print", None, _is("tracking.num_completions")),
    ("log_unique_prompts", False, _ALL_SAMPLES),
    ("log_completions_hub_repo", None, "not supported: samples stay in completions.jsonl and the trackers"),
    ("use_transformers_continuous_batching", False, _OWN_CACHE),
    ("transformers_continuous_batching_config", None, _OWN_CACHE),
    ("use_transformers_paged", False, _OWN_CACHE),
    ("vllm_importance_sampling_cap", None,
     _is("algorithm.importance_cap", ", which truncates the weight of each token")),
)  # fmt: skip

MODEL_CONFIG = (
    ("model_name_or_path", None, _is("model.hf_model_name")),
    ("model_revision", "main", _is("model.revision")),
    ("dtype", "float32", _is("model.dtype", "; parameters stay float32")),
    ("attn_implementation", None,
     "not needed: `model.attention` is shared (a group shares its prompt), or cudnn"),
    ("use_peft", False, "not needed: `lora.rank` above 0 trains adapters"),
    ("lora_r", 16, _is("lora.rank")),
    ("lora_alpha", 32, _is("lora.alpha")),
    ("lora_dropout", 0.05, _is("lora.dropout")),
    ("lora_target_modules", None,
     _is("lora.targets", "; an empty list is all-linear, every dense layer of attention and MLP")),
    ("lora_target_parameters", None, _ADAPTERS),
    ("lora_modules_to_save", None, _ADAPTERS),
    ("lora_task_type", "CAUSAL_LM", "not needed: every model is a causal language model"),
    ("use_rslora", False, "not supported; `lora.alpha` times the root of the rank has the same scale"),
    ("use_dora", False, _ADAPTERS),
    ("load_in_8bit", False, _QUANTIZED),
    ("load_in_4bit", False, _QUANTIZED),
    ("bnb_4bit_quant_type", "nf4", _QUANTIZED),
    ("use_bnb_nested_quant", False, _QUANTIZED),
    ("bnb_4bit_quant_storage", None, _QUANTIZED),
)  # fmt: skip

_REWARDS = "it is `rewards` here, such as rewards: [exact_match, path/file.py:function]"
SCRIPT_ARGUMENTS: tuple[tuple[Any, ...], ...] = (
    ("reward_model_name_or_path", None,
     "it is a reward here: rewards: [{function: reward_model, arguments: {model: ...}}]"),
    ("reward_funcs", None, _REWARDS),
    ("dataset_name", None, _is("data.dataset")),
    ("dataset_config", None, _is("data.dataset_config")),
    ("dataset_train_split", "train", _is("data.train_split")),
    ("dataset_test_split", "test", _is("data.eval_split")),
    ("dataset_streaming", False, "not needed: all data are read at the start"),
    ("ignore_bias_buffers", False, "not needed: there are no buffers of several processes"),
    ("datasets", [], "it is `data.dataset` or `data.train_file` here, which takes a list of files"),
    ("streaming", False, "not needed: all data are read at the start"),
    ("test_split_size", None, _is("data.eval_fraction")),
)  # fmt: skip

# Arguments of `accelerate launch`, which a file for `trl grpo` may also have.
_LAUNCH = "not supported: a run is one process and uses one device"
LAUNCH_ARGUMENTS = (
    ("num_processes", 1, "not needed: it is a factor of `training.batch_size` here"),
    ("accelerate_config", None, _LAUNCH),
    ("config_file", None, _LAUNCH),
    ("num_machines", 1, _LAUNCH),
    ("machine_rank", 0, _LAUNCH),
    ("main_process_ip", None, _LAUNCH),
    ("main_process_port", None, _LAUNCH),
    ("gpu_ids", None, "not needed: CUDA_VISIBLE_DEVICES in the environment chooses the device"),
    ("mixed_precision", None, _is("model.dtype")),
    ("env", None, "not needed: set variables of the environment before the command"),
)  # fmt: skip

GROUPS: dict[str, tuple[Field, ...]] = {
    title: tuple(Field(*row) for row in rows)
    for title, rows in {
        "`GRPOConfig`": GRPO_CONFIG,
        "`TrainingArguments`, which `GRPOConfig` inherits": TRAINING_ARGUMENTS,
        "`ModelConfig`": MODEL_CONFIG,
        "Script and data": SCRIPT_ARGUMENTS,
        "`accelerate launch`": LAUNCH_ARGUMENTS,
    }.items()
}
TRL_FIELDS: dict[str, Field] = {row.name: row for rows in GROUPS.values() for row in rows}

# Names of earlier versions of TRL and transformers -> the name in TRL 1.16.
OLD_NAMES = {
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
    "vllm_device": "vllm_mode",
    "vllm_dtype": "vllm_mode",
    "no_cuda": "use_cpu",
}
