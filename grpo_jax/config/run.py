"""The configuration: frozen records, checked strictly before anything is loaded or compiled.

A section is named after the part that reads it, and a field has the name of the keyword argument that it
becomes. The rooms `objective`, `policy` and `training` never see these records.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grpo_jax.config.algorithm import AlgorithmConfig
from grpo_jax.config.checks import check_ranges, require
from grpo_jax.config.data import DataConfig
from grpo_jax.config.model import LoraConfig, ModelConfig
from grpo_jax.config.sampling import SamplingConfig


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
        check_ranges("rewards.", vars(self), _REWARD_RANGES)
        if self.timeout is None:
            for name, default in (("workers", 1), ("rows_per_call", None)):
                value = getattr(self, name)
                require(value == default, f"rewards.{name}: {value} needs rewards.timeout, in seconds")


_REWARD_RANGES = (
    ("timeout", lambda x: 0 < x < math.inf, "a finite number of seconds above 0"),
    ("workers rows_per_call", lambda x: x >= 1, "at least 1"),
)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimizer and the length of the run.

    Args:
        batch_size: B, the number of *completions* per optimizer step. They belong to batch_size / group_size
            prompts.
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
        optimizer: an optax optimizer in place of AdamW, as `package.module:name` or `path/file.py:name`, such
            as `optax:lion`. It is a function of the learning rate's schedule, or an optimizer.
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
    optimizer: str | None = None
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self):
        check_ranges("training.", vars(self), _TRAINING_RANGES)
        require(
            self.batch_size % self.num_microbatches == 0,
            f"training.batch_size {self.batch_size} does not divide into training.num_microbatches "
            f"{self.num_microbatches} equal parts",
        )
        for name in (
            ("weight_decay", "adam_b1", "adam_b2", "max_grad_norm") if self.optimizer is not None else ()
        ):
            value = getattr(self, name)
            require(
                value == type(self).__dataclass_fields__[name].default,
                f"training.{name}: {value} is for AdamW and does nothing with training.optimizer; set it "
                "inside that optimizer",
            )


_TRAINING_RANGES = (
    ("batch_size num_microbatches num_steps", lambda x: x >= 1, "at least 1"),
    ("num_epochs", lambda x: 0 < x < math.inf, "finite and above 0"),
    ("learning_rate weight_decay", lambda x: 0 <= x < math.inf, "finite and not negative"),
    ("adam_b1 adam_b2", lambda x: 0 <= x < 1, "in [0, 1)"),
    ("warmup_steps", lambda x: x >= 0, "0 or more"),
    ("max_grad_norm", lambda x: x >= 0, "0 (off) or more"),
    ("seed", lambda x: 0 <= x < 2**31, "in [0, 2**31)"),
)


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
        check_ranges("evaluation.correct.", vars(self), _CORRECT_RANGES)


_CORRECT_RANGES = (("threshold", math.isfinite, "a finite number"),)


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
        check_ranges("evaluation.", vars(self), _EVALUATION_RANGES)


_EVALUATION_RANGES = (
    ("every num_prompts", lambda x: x >= 0, "0 or more"),
    ("num_samples batch_size", lambda x: x >= 1, "at least 1"),
    (
        "temperature",
        lambda x: 0 < x < math.inf,
        "finite and above 0 (evaluation adds a greedy pass of its own)",
    ),
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
        check_ranges("checkpoints.", vars(self), _CHECKPOINT_RANGES)


_CHECKPOINT_RANGES = (("every keep", lambda x: x >= 1, "at least 1"),)


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
        trackers: further trackers, each as `package.module:name` or `path/file.py:name`: an object with a
            method `log(step, metrics)`, or a class or function without arguments that makes one. Methods
            `log_completions(step, rows)`, `message(text)` and `close()` are called if there are any.
    """

    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "grpo_jax"
    wandb_name: str | None = None
    completions_every: int = 50
    num_completions: int = 8
    trackers: list[str] = field(default_factory=list)

    def __post_init__(self):
        check_ranges("tracking.", vars(self), _TRACKING_RANGES)


_TRACKING_RANGES = (
    ("completions_every", lambda x: x >= 1, "at least 1"),
    ("num_completions", lambda x: x >= 0, "0 or more"),
)


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
        run_dir: directory of the run. It holds config.yaml, run.json, metrics.jsonl, completions.jsonl,
            checkpoints/ and hf/, with LoRA also adapter/, and best/ if best_metric is given. With `null`
            nothing is written.
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
    run_dir: str | None = "runs/grpo"

    @property
    def directory(self) -> Path:
        """The directory of the run, of which there is one wherever anything is written."""
        assert self.run_dir is not None
        return Path(self.run_dir)

    @property
    def num_prompts(self) -> int:
        """N, the number of prompts per rollout (and per round of dynamic sampling)."""
        return self.training.batch_size * self.algorithm.num_minibatches // self.algorithm.group_size

    @property
    def updates_per_rollout(self) -> int:
        """Number of optimizer steps from one rollout."""
        return self.algorithm.num_iterations * self.algorithm.num_minibatches

    def __post_init__(self):
        batch = self.training.batch_size
        group = self.algorithm.group_size
        require(
            batch % group == 0,
            f"training.batch_size {batch} counts completions and must be a multiple of "
            f"algorithm.group_size {group}: try {max(1, round(batch / group)) * group}",
        )
        lora = self.lora
        sync = self.algorithm.ref_sync_every
        key = f"lora.rank {lora.rank}" if lora.rank else f"lora.start_from {lora.start_from}"
        require(
            not (sync and (lora.rank or lora.start_from is not None)),
            f"algorithm.ref_sync_every: {sync} moves the reference, but with {key} that is the "
            "base model, which never moves; leave one of them out",
        )
        needs_directory = {
            "checkpoints.best_metric": self.checkpoints.best_metric is not None,
            "tracking.tensorboard": self.tracking.tensorboard,
            "tracking.wandb": self.tracking.wandb,
        }
        for name, given in needs_directory.items():
            require(
                self.run_dir is not None or not given,
                f"{name} is given, but there is no run_dir, where it writes; give one, or leave {name} out",
            )
