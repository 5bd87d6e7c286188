"""The rules of `--from_trl`: each reads some fields of TRL's config and sets ours."""

import math
from typing import Any

from grpo_jax.config.translation import Translation, recipe_default
from grpo_jax.config.trl_rewards import reward_entries
from grpo_jax.config.trl_updates import batches, optimizer

# loss_type -> (recipe, reduction): TRL's loss types are how tokens are averaged, and for two the surrogate.
# Its `dapo` and `dr_grpo` name the loss alone: no dynamic sampling, and the standard deviation stays.
_LOSSES = {
    "grpo": ("grpo", "sequence"),
    "bnpo": ("grpo", "local_token"),
    "dr_grpo": ("grpo", "constant"),
    "dapo": ("grpo", "token"),
    "luspo": ("grpo", "sequence_sum"),
    "cispo": ("cispo", "token"),
    "sapo": ("sapo", "sequence"),
}
_DTYPES = ("float32", "bfloat16", "float16", "auto")
_SCALES = {"group": "std", True: "std", "batch": "batch", "none": "none", False: "none"}


def _model(out: Translation) -> None:
    name = out.get("model_name_or_path")
    if name is None:
        out.problems.append(("model_name_or_path", "model_name_or_path is missing; TRL needs it as well"))
        return
    out.put("model.hf_model_name", name, "model_name_or_path")
    inits = dict(out.get("model_init_kwargs") or {})
    dtype = inits.pop("dtype", inits.pop("torch_dtype", None)) or out.get("dtype")
    revision = inits.pop("revision", None) or out.get("model_revision")
    inits.pop("attn_implementation", None)
    for key, value in inits.items():
        out.missing.append(f"model_init_kwargs: {key}: {value}; the section `model` has fixed keys")
    if dtype not in _DTYPES:
        out.problems.append(("dtype", f"dtype: {dtype!r}; it must be one of {', '.join(_DTYPES)}"))
    if revision != "main":
        out.put("model.revision", revision, "model_revision", "model_init_kwargs")
    half = bool(out.get("fp16")) or dtype == "float16"
    mixed = out.get("bf16")
    mixed = True if mixed is None else bool(mixed)
    computes_in = "bfloat16" if half or mixed or dtype == "bfloat16" else "float32"
    out.put("model.dtype", computes_in, "bf16", "fp16", "dtype", "model_init_kwargs")
    if half:
        out.lack("fp16", "float16 is not supported, so it is `model.dtype: bfloat16`")
    elif dtype == "bfloat16":
        out.differs.append("dtype: bfloat16; parameters and optimizer stay float32 here")
    out.put("model.remat", "full" if out.get("gradient_checkpointing") else "none", "gradient_checkpointing")
    if out.get("chat_template_kwargs"):
        out.put("model.chat_template_arguments", out.get("chat_template_kwargs"), "chat_template_kwargs")


def _lora(out: Translation) -> None:
    if not out.get("use_peft"):
        return
    rank = out.number("lora_r", int)
    alpha = out.number("lora_alpha", float)
    scale = math.sqrt(rank) if out.get("use_rslora") else 1.0
    out.settings["lora.rank"] = rank
    out.settings["lora.alpha"] = alpha * scale
    out.settings["lora.dropout"] = out.number("lora_dropout", float)
    for key, name in (("rank", "lora_r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout")):
        if name not in out.given:
            out.defaults[f"lora.{key}"] = name
    targets = out.get("lora_target_modules")
    if targets is None:
        out.differs.append(
            "lora_target_modules: PEFT would choose by the model's type (for many q_proj and v_proj); here "
            "every dense layer of attention and MLP has an adapter; name them in lora.targets"
        )
    elif targets not in ("all-linear", ["all-linear"]):
        out.put("lora.targets", [targets] if isinstance(targets, str) else targets, "lora_target_modules")


def _data(out: Translation) -> None:
    mixture = out.get("datasets") or []
    train_split = out.get("dataset_train_split")
    name = out.get("dataset_name")
    if len(mixture) == 1 and isinstance(mixture[0], dict) and not mixture[0].get("fraction"):
        entry = mixture[0]
        files = entry.get("data_files")
        if files is not None and not isinstance(files, dict) and entry.get("path") in _FILE_KINDS:
            out.put("data.train_file", files, "datasets")
            name = None
        else:
            name = entry.get("path")
            out.put("data.dataset_config", entry.get("name"), "datasets") if entry.get("name") else None
            train_split = entry.get("split", "train")
        rest = set(entry) - {"path", "name", "data_files", "split", "columns"}
        if rest:
            out.missing.append(f"datasets: {', '.join(sorted(rest))}; give data.dataset or data.train_file")
    elif mixture:
        out.problems.append(
            ("datasets", "datasets: a mixture of data sets; write it into a file and give data.train_file")
        )
    elif name is None:
        out.problems.append(("dataset_name", "dataset_name is missing; TRL needs it or `datasets` as well"))
    if name is not None:
        out.put("data.dataset", name, "dataset_name", "datasets")
        if out.get("dataset_config") is not None:
            out.put("data.dataset_config", out.get("dataset_config"), "dataset_config")
        if train_split != "train":
            out.put("data.train_split", train_split, "dataset_train_split", "datasets")
    evaluates = out.get("eval_strategy") not in ("no", False)
    if mixture and out.get("test_split_size") is not None:  # TRL splits a mixture alone
        out.put("data.eval_fraction", out.number("test_split_size", float), "test_split_size")
        if not evaluates:
            out.put("evaluation.num_prompts", 0, "test_split_size")
    elif evaluates and name is not None:
        out.put("data.eval_split", out.get("dataset_test_split"), "eval_strategy", "dataset_test_split")
    if out.get("max_prompt_length") is not None:
        out.put("data.max_prompt_length", out.number("max_prompt_length", int), "max_prompt_length")
        out.put("data.over_length", "truncate_left", "max_prompt_length")


_FILE_KINDS = ("json", "csv", "parquet", "text")


def _rewards(out: Translation) -> None:
    entries, columns = reward_entries(out)
    out.settings["rewards"] = entries
    if columns:
        out.settings["data.columns"] = columns
    if len(entries) > 1:
        # In TRL a missing reward counts as 0 in the sum, and a completion without any leaves the statistics.
        out.put("algorithm.missing", "skip", "reward_funcs", ours="drop")


def _objective(out: Translation) -> None:
    loss = out.get("loss_type")
    if loss == "vespo" or loss not in _LOSSES:
        known = ", ".join(_LOSSES)
        out.problems.append(("loss_type", f"loss_type: {loss} has no counterpart; choose one of {known}"))
        loss = "grpo"
    recipe, reduction = _LOSSES[loss]
    out.put("algorithm.name", recipe, "loss_type", ours="grpo")
    out.put("algorithm.reduction", reduction, "loss_type", ours=recipe_default(recipe, "reduction"))
    levels = {"token": "token", "sequence": "sequence"}
    level = out.choice("importance_sampling_level", levels)
    out.put("algorithm.ratio_level", level, "importance_sampling_level", ours="token")
    _penalty(out, recipe)
    _clip(out, recipe)
    several = {"sum_then_normalize": "sum_then_normalize", "normalize_then_sum": "gdpo"}
    aggregation = out.choice("multi_objective_aggregation", several)
    if aggregation == "gdpo":  # TRL divides each reward by its group's deviation, whatever scale_rewards is
        out.put("algorithm.aggregation", "gdpo", "multi_objective_aggregation")
    else:
        out.put("algorithm.advantage", out.choice("scale_rewards", _SCALES), "scale_rewards", ours="std")
    out.put("algorithm.group_size", out.number("num_generations", int), "num_generations")
    out.put("algorithm.num_iterations", out.number("num_iterations", int), "num_iterations")
    if out.get("mask_truncated_completions"):
        out.put("algorithm.mask_truncated", True, "mask_truncated_completions")
        out.differs.append(
            "mask_truncated_completions: TRL keeps truncated completions in the mean and the standard "
            "deviation of their group; here they leave them"
        )
    for name, key, off in (
        ("top_entropy_quantile", "top_entropy", 1.0),
        ("entropy_coef", "entropy_coef", 0.0),
        ("off_policy_mask_threshold", "max_staleness", None),
    ):
        value = out.number(name, float)
        if value != off:
            out.put(f"algorithm.{key}", value, name)


def _penalty(out: Translation, recipe: str) -> None:
    beta = out.number("beta", float)
    out.put("algorithm.kl_coef", beta, "beta", ours=recipe_default(recipe, "kl_coef"))
    if not beta:
        return
    estimator = "ratio_k3" if out.get("use_bias_correction_kl") else "k3"
    out.put("algorithm.kl_estimator", estimator, "use_bias_correction_kl", ours="k3")
    if out.get("sync_ref_model"):
        if "lora.rank" in out.settings:
            out.lack("sync_ref_model", "with LoRA the reference is the base model, which never moves")
            return
        out.put("algorithm.ref_sync_every", out.number("ref_model_sync_steps", int), "sync_ref_model")
        out.put("algorithm.ref_mixup_alpha", out.number("ref_model_mixup_alpha", float),
                "ref_model_mixup_alpha")  # fmt: skip


def _clip(out: Translation, recipe: str) -> None:
    if recipe == "sapo":
        out.put("algorithm.tau", out.number("sapo_temperature_pos", float), "sapo_temperature_pos", ours=1.0)
        negative = out.number("sapo_temperature_neg", float)
        out.put("algorithm.tau_negative", negative, "sapo_temperature_neg", ours=1.05)
        return
    low = out.number("epsilon", float)
    high = out.number("epsilon_high", float)
    if recipe == "cispo":  # TRL's cap is epsilon_high itself, or else epsilon
        cap = low if high is None else high
        out.put("algorithm.cap", cap, "epsilon_high", "epsilon", ours=recipe_default("cispo", "cap"))
        if high is None:
            out.differs.append(f"epsilon_high: without it TRL caps CISPO's weights at epsilon, {low}")
        return
    out.put("algorithm.clip_range", low, "epsilon", ours=recipe_default(recipe, "clip_range"))
    if high is not None:
        out.put("algorithm.clip_range_high", high, "epsilon_high")
    if out.get("delta") is not None:
        out.put("algorithm.delta", out.number("delta", float), "delta")


def _sampling(out: Translation) -> None:
    out.put("sampling.max_new_tokens", out.number("max_completion_length", int), "max_completion_length")
    out.put("sampling.temperature", out.number("temperature", float), "temperature")
    out.put("sampling.top_p", out.number("top_p", float), "top_p")
    out.put("sampling.top_k", max(0, out.number("top_k", int) or 0), "top_k")  # -1 and None are off, too
    out.put("sampling.min_p", out.number("min_p", float) or 0.0, "min_p")
    known = {"stop_strings": "stop", "eos_token_id": "eos_token_ids", "min_p": "min_p", "top_k": "top_k",
             "top_p": "top_p", "temperature": "temperature"}  # fmt: skip
    for name, value in dict(out.get("generation_kwargs") or {}).items():
        if name in known:
            out.put(f"sampling.{known[name]}", value, "generation_kwargs")
        else:
            out.missing.append(f"generation_kwargs: {name}: {value}; sampling has no such setting")


def _interval(out: Translation, strategy: Any, name: str, steps: int | None, otherwise: Any) -> int | None:
    """Returns the number of updates between two events, or None if TRL counts something else."""
    value = out.number(name, float)
    value = otherwise if value is None else value
    if strategy not in ("steps", True):
        return None
    if value >= 1:
        return int(value)
    return max(1, math.ceil(value * steps)) if steps is not None and steps > 0 else None


def _evaluation(out: Translation) -> None:
    strategy = out.get("eval_strategy")
    if strategy in ("no", False):
        return
    steps = out.number("max_steps", int)
    every = _interval(out, strategy, "eval_steps", steps, out.number("logging_steps", float))
    if every is None:
        out.lack("eval_strategy", "evaluation.every is a number of updates")
    else:
        out.put("evaluation.every", every, "eval_strategy", "eval_steps")
    samples = out.number("num_generations_eval", int) or out.number("num_generations", int)
    out.put("evaluation.num_samples", samples, "num_generations_eval", "num_generations")
    if "per_device_eval_batch_size" in out.given:
        size = out.number("per_device_eval_batch_size", int) * (out.number("num_processes", int) or 1)
        out.put("evaluation.batch_size", size, "per_device_eval_batch_size")
    out.differs.append(
        "eval_strategy: TRL evaluates on all held-out prompts, here evaluation.num_prompts are sampled"
    )


def _checkpoints(out: Translation) -> None:
    every = _interval(out, out.get("save_strategy"), "save_steps", out.number("max_steps", int), 500)
    if every is None and out.get("save_strategy") != "steps":
        out.lack("save_strategy", "checkpoints.every counts updates, and the last is always saved")
    elif every is None:
        out.lack("save_steps", "checkpoints.every is a number of updates")
    else:
        out.put("checkpoints.every", every, "save_steps")
    keep = out.number("save_total_limit", int)
    if keep is None:
        out.differs.append("save_total_limit: TRL keeps every checkpoint, here the newest checkpoints.keep")
    else:
        out.put("checkpoints.keep", keep, "save_total_limit")
    metric = out.get("metric_for_best_model")
    best = out.get("load_best_model_at_end")
    if metric is not None or best:
        ours = _metric(metric)
        if ours is None:
            out.lack("metric_for_best_model", "evaluation has no such metric; one is eval/greedy_accuracy")
        else:
            out.put("checkpoints.best_metric", ours, "metric_for_best_model")
            if out.get("greater_is_better") is False:
                out.put("checkpoints.best_mode", "min", "greater_is_better")
    resume = out.get("resume_from_checkpoint")
    if isinstance(resume, str) and resume.lower() != "true":
        out.lack("resume_from_checkpoint", "a checkpoint of TRL is not read; give its model as the start")
    out.differs.append(
        "resume_from_checkpoint: TRL starts anew without it; here the command continues a run in run_dir"
    )


def _metric(name: str | None) -> str | None:
    """Returns our name of a metric of evaluation. `reward` and `rewards/<name>/mean` have one."""
    short = (name or "loss").removeprefix("eval_").removeprefix("eval/")
    return f"eval/{short}" if short == "reward" or short.startswith("rewards/") else None


def _tracking(out: Translation) -> None:
    out.put("run_dir", out.get("output_dir") or "trainer_output", "output_dir")
    wanted = out.get("report_to")
    wanted = [wanted] if isinstance(wanted, str) else list(wanted or [])
    for tracker in wanted:
        if tracker in ("wandb", "tensorboard"):
            out.put(f"tracking.{tracker}", True, "report_to")
        elif tracker not in ("none", "all"):
            out.missing.append(f"report_to: {tracker}; tracking.wandb and tracking.tensorboard are there")
        elif tracker == "all":
            out.missing.append("report_to: all; set tracking.wandb or tracking.tensorboard")
    if "wandb" in wanted:
        if out.get("run_name") is not None:
            out.put("tracking.wandb_name", out.get("run_name"), "run_name")
        if "project" in out.given:
            out.put("tracking.wandb_project", out.get("project"), "project")
    shown = out.number("num_completions_to_print", int)
    if shown is not None:
        out.put("tracking.num_completions", shown, "num_completions_to_print")
    if out.get("use_vllm"):
        out.missing.append("use_vllm: true; our own compiled loop samples, and the vllm_* fields have no use")
        out.used.update(name for name in out.given if name.startswith("vllm_"))
    out.used.update(_NOTHING_TO_SAY & set(out.given))


# What TRL prints or how often, and names of the run: nothing is lost without them.
_NOTHING_TO_SAY = {
    "logging_steps", "logging_strategy", "logging_first_step", "log_completions", "log_unique_prompts",
    "disable_tqdm", "attn_implementation", "do_train", "do_eval", "remove_unused_columns", "run_name",
    "project", "eval_on_start",
}  # fmt: skip

RULES = (
    _model, _lora, _data, _rewards, _objective, batches, optimizer, _sampling, _evaluation, _checkpoints,
    _tracking,
)  # fmt: skip
