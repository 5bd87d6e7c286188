"""The configuration: frozen records, checked strictly before anything is loaded or compiled.

A section is named after the part that reads it, and a field has the name of the keyword argument that it
becomes. The rooms `objective`, `policy` and `training` never see these records.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_jax.config.algorithm import AlgorithmConfig
from grpo_jax.config.data import DataConfig, require
from grpo_jax.config.sampling import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model.

    Args:
        type: what the model is trained as. `policy` is the only kind.
        hf_model_name: a local directory, a Hugging Face hub id, or `packaged:arithmetic`, a small model that
            ships with this package.
        revision: branch, tag or commit of a hub id.
        dtype: data type of the computation. Parameters and optimizer stay float32.
        implementation: code that computes the model: our `decoder`, the `flax` classes of transformers, or
            `auto`, which takes the first of these that supports the model.
        remat: what the backward pass recomputes to save memory: nothing (`none`), everything but the results
            of dense layers (`dots`), or every layer from its input (`full`). Only the decoder can do this.
        attention: `shared`, where a group's completions attend to one copy of their prompt, or `cudnn`, which
            is flash attention on an NVIDIA GPU with bfloat16. With `cudnn`, memory grows only linearly with
            the length of a row.
        chat_template: how chat messages become text: `auto` (the tokenizer's own template), `plain` (lines
            `role: content`, then `assistant:`, for models without a template), or the path of a Jinja file.
        chat_template_arguments: variables of the chat template by name, such as `enable_thinking: false`.
        chat_template_date: date, or date and time, that a chat template may print, such as `2026-11-28`.
            `null` means the date of the run's first start, also when the run is continued.
    """

    type: Literal["policy"] = "policy"
    hf_model_name: str = "packaged:arithmetic"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    implementation: Literal["auto", "decoder", "flax"] = "auto"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["shared", "cudnn"] = "shared"
    chat_template: str = "auto"
    # The type is not dict[str, Any], because the parser would then read the text `"a: b"` as a dict.
    chat_template_arguments: dict = field(default_factory=dict)
    chat_template_date: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "chat_template_arguments", spelled_values(self.chat_template_arguments))


def spelled_values(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments in which texts such as `false` are replaced by the values that they spell."""
    return {name: _scalar(value) for name, value in arguments.items()}


def _scalar(value: Any) -> Any:
    """Converts a text such as `false` or `3` to the value that it spells. "007" stays a text."""
    if not isinstance(value, str):
        return value
    if value in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[value]
    return int(value) if re.fullmatch(r"0|-?[1-9]\d{0,18}", value) else value


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters that are trained instead of the model, https://arxiv.org/abs/2106.09685; see `lora.py`.

    Args:
        rank: rank of the adapters. With 0 the whole model is trained.
        alpha: numerator of an adapter's scale, which is alpha / rank. `null` means twice the rank.
        targets: globs on the names of dense layers, or on the ends of these names: `q_proj`, `attn.c_proj`,
            `layers.0.*`. An empty list means every dense layer of attention and MLP.
        dropout: probability that an input of an adapter is zeroed, for all tokens of an update.
        start_from: directory of a LoRA adapter, saved by PEFT or by a run, from which training goes on. Rank,
            alpha and targets then come from the adapter, and any that are given must agree with it. The
            reference is the base model, as always. `null` starts with a fresh adapter, which adds nothing at
            first.
    """

    rank: int = 0
    alpha: float | None = None
    targets: list[str] = field(default_factory=list)
    dropout: float = 0.0
    start_from: str | None = None

    @property
    def resolved_alpha(self) -> float:
        """The alpha that is used."""
        return 2.0 * self.rank if self.alpha is None else float(self.alpha)

    def __post_init__(self):
        require(self.rank >= 0, f"lora.rank: {self.rank}; 0 (the whole model is trained) or more")
        a = self.alpha
        require(a is None or 0 < a < math.inf, f"lora.alpha: {a}; above 0, finite")
        p = self.dropout
        require(0 <= p < 1, f"lora.dropout: {p}; a probability, at least 0 and below 1")
        given_keys = {"alpha": a is not None, "targets": bool(self.targets), "dropout": p > 0}
        for name, given in given_keys.items():
            require(
                self.rank > 0 or self.start_from is not None or not given,
                f"lora.{name} is given, but lora.rank is 0: set it, such as to 16",
            )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One reward function.

    Args:
        function: a built-in name, `package.module:function`, or `path/file.py:function`. With `verl:` before
            one of the last two, it is a compute_score written for verl.
        weight: factor of this reward in the sum.
        arguments: further keyword arguments of the function.
        timeout: seconds that one call may take, in a worker process without a device. A call that takes
            longer is killed, and its rows have no reward. With `null` the function is called in the run's own
            process, without a limit.
        workers: number of worker processes.
        rows_per_call: number of completions in one call. `null` splits the batch into as many equal parts as
            there are workers.
    """

    function: str
    weight: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)
    timeout: float | None = None
    workers: int = 1
    rows_per_call: int | None = None

    def __post_init__(self):
        limit, workers, rows = self.timeout, self.workers, self.rows_per_call
        require(
            limit is None or 0 < limit < math.inf, f"rewards.timeout: {limit}; seconds, above 0 and finite"
        )
        require(workers >= 1, f"rewards.workers: {workers}; at least 1")
        require(rows is None or rows >= 1, f"rewards.rows_per_call: {rows}; at least 1")
        if limit is None:
            for name, default in (("workers", 1), ("rows_per_call", None)):
                value = getattr(self, name)
                require(value == default, f"rewards.{name}: {value} needs rewards.timeout, in seconds")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimizer and the length of the run.

    Args:
        batch_size: B, *completions* per optimizer step. They belong to batch_size / group_size prompts.
        num_microbatches: number of slices of the batch, whose gradients are summed for one update.
        num_epochs: number of passes over the training prompts.
        num_steps: number of optimizer steps. It overrides num_epochs.
        learning_rate: peak learning rate of AdamW.
        lr_schedule: learning rate after the warmup: `constant`, `linear` (falls to 0) or `cosine` (falls to
            0).
        warmup_steps: number of optimizer steps in which the learning rate rises linearly from 0.
        weight_decay: decoupled weight decay of AdamW. It acts on matrices only.
        adam_b1: decay rate of the first moment.
        adam_b2: decay rate of the second moment.
        max_grad_norm: largest global norm of the gradient. Larger gradients are scaled down to it. 0 switches
            this off.
        seed: seed that determines the whole run.
    """

    batch_size: int = 32
    num_microbatches: int = 1
    num_epochs: float = 1.0
    num_steps: int | None = None
    learning_rate: float = 1e-5
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_b1: float = 0.9
    adam_b2: float = 0.99
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self):
        require(self.batch_size >= 1, f"training.batch_size: {self.batch_size}; at least 1")
        parts = self.num_microbatches
        require(parts >= 1, f"training.num_microbatches: {parts}; at least 1")
        require(
            self.batch_size % parts == 0,
            f"training.batch_size {self.batch_size} does not divide into training.num_microbatches "
            f"{parts} equal parts",
        )
        require(0 < self.num_epochs < math.inf, f"training.num_epochs: {self.num_epochs}; above 0, finite")
        n = self.num_steps
        require(n is None or n >= 1, f"training.num_steps: {n}; at least 1")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"training.{name}: {value}; a finite number, not negative")
        for name in ("adam_b1", "adam_b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"training.{name}: {value}; in [0, 1)")
        require(self.warmup_steps >= 0, f"training.warmup_steps: {self.warmup_steps}; not negative")
        require(self.max_grad_norm >= 0, f"training.max_grad_norm: {self.max_grad_norm}; 0 (off) or more")
        require(0 <= self.seed < 2**31, f"training.seed: {self.seed}; in [0, 2**31)")


@dataclass(frozen=True, kw_only=True)
class CorrectConfig:
    """When a completion counts as correct in evaluation, see docs/evaluation.md.

    Args:
        reward: name of the reward that decides, as in `rewards/<name>/mean`. `null` means the first of
            evaluation.rewards or, if that is empty, the first training reward that reads a column of the
            data.
        threshold: smallest value of this reward for a correct completion.
    """

    reward: str | None = None
    threshold: float = 1.0

    def __post_init__(self):
        least = self.threshold
        require(math.isfinite(least), f"evaluation.correct.threshold: {least}; a finite number")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out evaluation: greedy accuracy, mean@k and pass@k.

    Args:
        every: number of optimizer steps between evaluations. With 0 there are only two, before the first step
            and after the last.
        num_prompts: number of held-out prompts that are used. If there are more, a fixed sample of them is
            used. 0 switches evaluation off.
        num_samples: k, the number of sampled completions per prompt.
        batch_size: number of completions that are decoded at once.
        temperature: temperature of the sampled completions. `null` means that of training.
        category: column of the held-out prompts. Results are also reported for each of its values.
        rewards: reward functions that are logged and never trained on.
        correct: rule that decides when a completion is correct.
    """

    every: int = 0
    num_prompts: int = 256
    num_samples: int = 4
    batch_size: int = 256
    temperature: float | None = None
    category: str | None = None
    rewards: list[RewardConfig] = field(default_factory=list)
    correct: CorrectConfig = CorrectConfig()

    def __post_init__(self):
        require(self.every >= 0, f"evaluation.every: {self.every}; 0 or more")
        require(self.num_prompts >= 0, f"evaluation.num_prompts: {self.num_prompts}; 0 or more")
        require(self.num_samples >= 1, f"evaluation.num_samples: {self.num_samples}; at least 1")
        require(self.batch_size >= 1, f"evaluation.batch_size: {self.batch_size}; at least 1")
        heat = self.temperature
        require(
            heat is None or 0 < heat < math.inf,
            f"evaluation.temperature: {heat}; finite, above 0 (evaluation adds a greedy pass of its own)",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming.

    Args:
        every: number of optimizer steps between checkpoints. The last step is always saved.
        keep: number of checkpoints that are kept.
        resume: `auto` (continue the run found in run_dir), `never` (refuse a run_dir that was used before),
            or the path of another run to continue from.
        best_metric: a metric of the evaluation, such as `eval/mean@4`. The model with the best value is kept
            in run_dir/best, apart from the checkpoints. With `null` none is kept.
        best_mode: whether the best value is the largest (`max`) or the smallest (`min`).
        allow_changes: what may differ from the run that wrote the checkpoint: `data` (the training prompts
            and their columns), `rewards` (the code of training rewards). All other changes of these two are
            refused.
    """

    every: int = 50
    keep: int = 2
    resume: str = "auto"
    best_metric: str | None = None
    best_mode: Literal["max", "min"] = "max"
    allow_changes: list[Literal["data", "rewards"]] = field(default_factory=list)

    def __post_init__(self):
        require(self.every >= 1, f"checkpoints.every: {self.every}; at least 1")
        require(self.keep >= 1, f"checkpoints.keep: {self.keep}; at least 1")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics are logged, besides metrics.jsonl and the console.

    Args:
        tensorboard: whether event files are written under run_dir/tensorboard (extra `tensorboard`).
        wandb: whether metrics are logged to Weights & Biases (extra `wandb`). Without a key it works offline.
        wandb_project: name of the W&B project.
        wandb_name: name of the W&B run. `null` means the run directory's name.
        completions_every: number of optimizer steps between two tables of samples, which are also written to
            completions.jsonl.
        num_completions: number of completions that are shown and written each time.
    """

    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "grpo_jax"
    wandb_name: str | None = None
    completions_every: int = 50
    num_completions: int = 8

    def __post_init__(self):
        every = self.completions_every
        require(every >= 1, f"tracking.completions_every: {every}; at least 1")
        require(self.num_completions >= 0, f"tracking.num_completions: {self.num_completions}; 0 or more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run.

    Args:
        algorithm: the objective.
        model: the language model.
        lora: adapters that are trained instead of the model.
        data: prompts.
        rewards: reward functions. With an empty list, the task's own are used.
        sampling: how completions are sampled.
        training: the optimizer and the length of the run.
        evaluation: held-out evaluation.
        checkpoints: saving and resuming.
        tracking: where metrics are logged.
        run_dir: directory of the run. It holds config.yaml, metrics.jsonl, completions.jsonl, checkpoints/
            and hf/, with LoRA also adapter/, and best/ if best_metric is given.
    """

    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: list[RewardConfig] = field(default_factory=list)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    run_dir: str = "runs/grpo"

    @property
    def num_prompts(self) -> int:
        """N, the number of prompts per rollout (and per round of dynamic sampling)."""
        return self.training.batch_size * self.algorithm.num_minibatches // self.algorithm.group_size

    @property
    def updates_per_rollout(self) -> int:
        """Number of optimizer steps from one rollout."""
        return self.algorithm.num_iterations * self.algorithm.num_minibatches

    def __post_init__(self):
        batch, group = self.training.batch_size, self.algorithm.group_size
        require(
            batch % group == 0,
            f"training.batch_size {batch} counts completions and must be a multiple of "
            f"algorithm.group_size {group}: try {max(1, round(batch / group)) * group}",
        )
        lora, sync = self.lora, self.algorithm.ref_sync_every
        key = f"lora.rank {lora.rank}" if lora.rank else f"lora.start_from {lora.start_from}"
        require(
            not (sync and (lora.rank or lora.start_from is not None)),
            f"algorithm.ref_sync_every: {sync} moves the reference, but with {key} that is the "
            "base model, which never moves; leave one of them out",
        )
