"""The rules of `--from_trl` for updates: batch sizes, optimizer, schedule."""

import math

from grpo_jax.config.translation import Translation

_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_restarts": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "polynomial": "linear",
    "inverse_sqrt": "constant",
    "reduce_lr_on_plateau": "constant",
    "warmup_stable_decay": "constant",
    "greedy": "constant",
}
_SAME_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
_ADAMW = {
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision",
    "adamw_hf",
}  # fmt: skip


def batches(out: Translation) -> None:
    each = out.number("per_device_train_batch_size", int) or 1
    slices = (out.number("gradient_accumulation_steps", int) or 1) * (out.number("num_processes", int) or 1)
    processes = out.number("num_processes", int) or 1
    group = out.number("num_generations", int) or 8
    update = each * slices
    steps = out.number("steps_per_generation", int)
    generation = out.number("generation_batch_size", int)
    sources = (
        "per_device_train_batch_size", "gradient_accumulation_steps", "num_processes",
    )  # fmt: skip
    if steps is not None and generation is not None:
        said = "generation_batch_size and steps_per_generation are both given; TRL takes only one of them"
        out.problems.append(("generation_batch_size", said))
    rollout = generation or (update if steps is None else each * processes * steps)
    if rollout % group:
        said = f"num_generations: {group} does not divide the {rollout} completions of a generation batch"
        out.problems.append(("num_generations", said))
        return
    minibatches = rollout // update if rollout % update == 0 else 1
    if rollout > update and (rollout % update or update % group):
        out.differs.append(
            f"steps_per_generation: TRL makes updates of {update} completions from a generation batch of "
            f"{rollout}; here an update has whole groups, so it is one of {rollout}"
        )
        minibatches = 1
        update = rollout
        slices = rollout // each
    out.put("training.batch_size", update, *sources)
    out.put("training.num_microbatches", slices, *sources)
    out.put("algorithm.num_minibatches", minibatches, "steps_per_generation", "generation_batch_size")
    if "num_processes" not in out.given:
        out.differs.append(
            "num_processes: the file does not say on how many processes TRL ran, so it is 1; with more, "
            "multiply training.batch_size by their number"
        )


def optimizer(out: Translation) -> None:
    for name, key in (
        ("learning_rate", "learning_rate"),
        ("num_train_epochs", "num_epochs"),
        ("adam_beta1", "adam_b1"),
        ("adam_beta2", "adam_b2"),
        ("weight_decay", "weight_decay"),
        ("max_grad_norm", "max_grad_norm"),
    ):
        value = out.number(name, float)
        out.put(f"training.{key}", 0.0 if value is None else value, name)
    steps = out.number("max_steps", int)
    if steps is not None and steps > 0:
        out.put("training.num_steps", steps, "max_steps")
        out.settings.pop("training.num_epochs", None)
        out.defaults.pop("training.num_epochs", None)
    kind = out.get("lr_scheduler_type")
    out.put("training.lr_schedule", out.choice("lr_scheduler_type", _SCHEDULES), "lr_scheduler_type")
    if kind not in _SAME_SCHEDULES and kind in _SCHEDULES:
        out.lack("lr_scheduler_type", f"the nearest is `training.lr_schedule: {_SCHEDULES[kind]}`")
    _warmup(out, steps, constant=kind == "constant")
    kind_of_optimizer = out.get("optim")
    if kind_of_optimizer not in _ADAMW:
        out.lack("optim", "the optimizer is AdamW in float32")
    out.put("training.seed", out.number("seed", int), "seed")
    data_seed = out.number("data_seed", int)
    if data_seed is not None and data_seed != out.get("seed"):
        out.lack("data_seed", "one seed determines the whole run")


def _warmup(out: Translation, steps: int | None, *, constant: bool) -> None:
    name = "warmup_ratio" if out.get("warmup_ratio") else "warmup_steps"
    warmup = out.number(name, float) or 0.0
    if warmup and constant:
        out.differs.append(f"{name}: TRL's constant schedule has no warmup, so there is none here")
    elif warmup >= 1 and name == "warmup_steps":
        out.put("training.warmup_steps", int(warmup), name)
    elif warmup and steps is not None and steps > 0:
        out.put("training.warmup_steps", math.ceil(warmup * steps), name)
    elif warmup:
        out.lack(name, "training.warmup_steps is a number of steps; `plan` says how many the run has")
