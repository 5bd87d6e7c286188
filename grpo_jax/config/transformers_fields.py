"""The fields of transformers' TrainingArguments that TRL 1.16's GRPOConfig inherits; see trl_fields.py.

The defaults are those of `GRPOConfig`.
"""


def _is(key: str, more: str = "") -> str:
    return f"it is `{key}` here{more}"


_BATCH = (
    "it is `training.batch_size` here: completions of one update, all prompts and devices together (per "
    "device x gradient_accumulation_steps x devices)"
)
_REMAT = "it is `model.remat: full` here, or `model.remat: dots`"
_XLA = "not needed: everything is compiled by XLA"
_HUB = "not supported in training: the command export takes --push_to_hub owner/name"
_ONE_DEVICE = "not supported: a run uses one device and holds the whole model there"
_NO_DATA = "not needed: all data are read at the start; seed and step determine their order"
_EVERY_STEP = "not needed: every step is a row of metrics.jsonl"
_ADAMW = "not supported: the optimizer is AdamW"
_ONE_PROCESS = "not needed: a run is one process"
_NO_LOSS = "not supported: evaluation samples and judges completions, it has no loss"
_CONSOLE = "not supported: the console shows a line for each step"
_DETERMINISTIC = "not needed: a run is a function of `training.seed`"
_ALWAYS = "not needed: the command train trains and evaluates, evaluate evaluates alone"
_TRACKIO = "not supported: `tracking.wandb` and `tracking.tensorboard` are the trackers"

TRAINING_ARGUMENTS: tuple[tuple, ...] = (
    ("output_dir", "trainer_output", _is("run_dir")),
    ("per_device_train_batch_size", 8, _BATCH),
    ("num_train_epochs", 3.0, _is("training.num_epochs")),
    ("max_steps", -1, _is("training.num_steps")),
    ("lr_scheduler_type", "linear", _is("training.lr_schedule", ": constant, linear or cosine")),
    ("lr_scheduler_kwargs", None, "not supported: `training.lr_schedule` falls to 0, or stays constant"),
    ("warmup_steps", 0, _is("training.warmup_steps", ", a number of steps (below 1 it is a share there)")),
    ("optim", "adamw_torch_fused", _ADAMW),
    ("optim_args", None, _ADAMW),
    ("weight_decay", 0.0, _is("training.weight_decay")),
    ("adam_beta1", 0.9, _is("training.adam_b1")),
    ("adam_beta2", 0.999, _is("training.adam_b2")),
    ("adam_epsilon", 1e-8, "not supported: AdamW's epsilon is 1e-8, TRL's default"),
    ("optim_target_modules", None, _ADAMW),
    ("gradient_accumulation_steps", 1,
     "it is `training.num_microbatches` here, slices of `training.batch_size`"),
    ("average_tokens_across_devices", True, "not needed: weights come from the whole batch of an update"),
    ("max_grad_norm", 1.0, _is("training.max_grad_norm")),
    ("label_smoothing_factor", 0.0, "not supported: the loss is a policy gradient, without labels"),
    ("bf16", True, "it is `model.dtype: bfloat16` here"),
    ("fp16", False, "not supported; `model.dtype: bfloat16` is the fast one here"),
    ("bf16_full_eval", False, "not needed: evaluation computes in `model.dtype`, as training does"),
    ("fp16_full_eval", False, "not needed: evaluation computes in `model.dtype`, as training does"),
    ("tf32", None, "not needed: XLA chooses; `model.dtype: bfloat16` is the fast one here"),
    ("activation_checkpointing", None, _REMAT),
    ("activation_checkpointing_kwargs", None, _REMAT),
    ("gradient_checkpointing", True, _REMAT),
    ("gradient_checkpointing_kwargs", None, _REMAT),
    ("torch_compile", False, _XLA),
    ("torch_compile_backend", None, _XLA),
    ("torch_compile_mode", None, _XLA),
    ("use_liger_kernel", False, _XLA),
    ("liger_kernel_config", None, _XLA),
    ("use_cache", False, "not needed: decoding has its own cache, and an update needs none"),
    ("neftune_noise_alpha", None, "not supported: embeddings get no noise"),
    ("torch_empty_cache_steps", None, _XLA),
    ("auto_find_batch_size", False,
     "not supported, as in TRL; plan says what fits; `training.num_microbatches` saves memory"),
    ("logging_strategy", "steps", _EVERY_STEP),
    ("logging_steps", 10, _EVERY_STEP),
    ("logging_first_step", False, _EVERY_STEP),
    ("log_on_each_node", True, _ONE_PROCESS),
    ("logging_nan_inf_filter", True, "not needed: each step's own values are logged"),
    ("include_num_input_tokens_seen", "no", "not needed: num_tokens counts them in metrics.jsonl"),
    ("log_level", "passive", _CONSOLE),
    ("log_level_replica", "warning", _ONE_PROCESS),
    ("disable_tqdm", None, _CONSOLE),
    ("report_to", "none",
     "it is `tracking.wandb` and `tracking.tensorboard` here; metrics.jsonl is always written"),
    ("run_name", None, _is("tracking.wandb_name")),
    ("project", "huggingface", _is("tracking.wandb_project")),
    ("trackio_space_id", None, _TRACKIO),
    ("trackio_bucket_id", None, _TRACKIO),
    ("trackio_static_space_id", None, _TRACKIO),
    ("eval_strategy", "no", _is("evaluation.every", "; 0 means before the first step and after the last")),
    ("eval_steps", None, _is("evaluation.every")),
    ("eval_delay", 0, "not supported: a run begins and ends with an evaluation"),
    ("per_device_eval_batch_size", 8, _is("evaluation.batch_size")),
    ("prediction_loss_only", False, _NO_LOSS),
    ("eval_on_start", False, "not needed: a run begins and ends with an evaluation"),
    ("eval_do_concat_batches", True, _NO_LOSS),
    ("eval_use_gather_object", False, _ONE_PROCESS),
    ("eval_accumulation_steps", None, _NO_LOSS),
    ("include_for_metrics", [], _NO_LOSS),
    ("batch_eval_metrics", False, _NO_LOSS),
    ("save_only_model", False, "not supported: a checkpoint holds what a run needs to go on bit for bit"),
    ("save_strategy", "steps", _is("checkpoints.every")),
    ("save_steps", 500, _is("checkpoints.every")),
    ("save_on_each_node", False, _ONE_PROCESS),
    ("save_total_limit", None, _is("checkpoints.keep")),
    ("enable_jit_checkpoint", False, "not needed: SIGTERM and Ctrl-C save first"),
    ("push_to_hub", False, _HUB),
    ("hub_token", None, _HUB),
    ("hub_private_repo", None, _HUB),
    ("hub_model_id", None, _HUB),
    ("hub_strategy", "every_save", _HUB),
    ("hub_always_push", False, _HUB),
    ("hub_revision", None, _HUB),
    ("load_best_model_at_end", False,
     _is("checkpoints.best_metric", "; the best model is kept in run_dir/best")),
    ("metric_for_best_model", None, _is("checkpoints.best_metric", ", such as eval/mean@4")),
    ("greater_is_better", None, _is("checkpoints.best_mode", ": max or min")),
    ("ignore_data_skip", False, _NO_DATA),
    ("restore_callback_states_from_checkpoint", False, "not needed: a checkpoint holds the whole run"),
    ("full_determinism", False, _DETERMINISTIC),
    ("seed", 42, _is("training.seed")),
    ("data_seed", None, _is("training.seed", ", one seed for all")),
    ("use_cpu", False, "not needed: JAX_PLATFORMS=cpu in the environment"),
    ("accelerator_config", None, _ONE_DEVICE),
    ("parallelism_config", None, _ONE_DEVICE),
    ("dataloader_drop_last", False, _NO_DATA),
    ("dataloader_num_workers", 0, _NO_DATA),
    ("dataloader_pin_memory", True, _NO_DATA),
    ("dataloader_persistent_workers", False, _NO_DATA),
    ("dataloader_prefetch_factor", None, _NO_DATA),
    ("dataloader_multiprocessing_context", None, _NO_DATA),
    ("dataloader_in_order", True, _NO_DATA),
    ("label_names", None, "not needed: prompts have no labels, columns go to the rewards"),
    ("train_sampling_strategy", "random", _NO_DATA),
    ("length_column_name", "length", _NO_DATA),
    ("ddp_find_unused_parameters", None, _ONE_DEVICE),
    ("ddp_bucket_cap_mb", None, _ONE_DEVICE),
    ("ddp_broadcast_buffers", None, _ONE_DEVICE),
    ("ddp_static_graph", None, _ONE_DEVICE),
    ("ddp_backend", None, _ONE_DEVICE),
    ("ddp_timeout", 1800, _ONE_DEVICE),
    ("fsdp", None, _ONE_DEVICE),
    ("fsdp_config", None, _ONE_DEVICE),
    ("deepspeed", None, _ONE_DEVICE),
    ("debug", "", "not needed: GRPO_JAX_TRACEBACK=1 in the environment shows tracebacks"),
    ("skip_memory_metrics", True, "not needed: the command plan says what memory a run needs"),
    ("do_train", False, _ALWAYS),
    ("do_eval", False, _ALWAYS),
    ("do_predict", False, _ALWAYS),
    ("resume_from_checkpoint", None,
     _is("checkpoints.resume", ": auto, never, or the directory of a run")),
    ("local_rank", -1, _ONE_PROCESS),
)  # fmt: skip
