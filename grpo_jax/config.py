"""The configuration: frozen records, strict, checked before anything is loaded or compiled.

Sections name their consumer; a field's name is the keyword of the function that receives it.
Nothing below floor 3 ever sees one of these records.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_jax.recipes import RECIPES


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Which recipe, and what to change in it. None keeps the recipe's own choice.

    Args:
        name: recipe: `grpo`, `dr_grpo`, `dapo`, `bnpo`, `gspo`, `gspo_token`, `cispo`, `sapo`, `gmpo`,
            `rloo` or `reinforce`.
        group_size: G, completions sampled for each prompt; at least 2.
        num_iterations: mu, optimizer passes over one rollout; at least 1.
        num_minibatches: optimizer batches that one rollout is cut into; it has num_minibatches *
            training.batch_size completions, and each pass over it makes num_minibatches updates.
        advantage: what is done to the centred rewards of a group: divided by its `std`, by that of the
            `batch`, `none`; or `leave_one_out`: the mean of the others is subtracted.
        aggregation: several reward functions: `sum_then_normalize`, `normalize_then_sum`, or `gdpo`: the
            latter, divided by the standard deviation over the batch.
        missing: a completion without some of its rewards: `skip` the terms, `renormalize` the weights of the
            others, or `drop` the completion.
        ratio_level: `token`, `sequence` or `sequence_token`.
        surrogate: `clipped`, `cispo`, `sapo`, `gmpo` or `reinforce`.
        clip_range: PPO clip below 1 (and above it unless clip_range_high is given).
        clip_range_high: PPO clip above 1.
        delta: two-sided clipping: largest ratio where the advantage is negative; above 1.
        dual_clip: largest loss where the advantage is negative, in units of it; above 1.
        cap: largest importance weight of `cispo`, an absolute ratio.
        tau: sharpness of `sapo`'s gate where the advantage is positive.
        tau_negative: the same where it is not.
        log_clip_range: `gmpo`'s clip of log ratios below 0 (and above it unless the next is given).
        log_clip_range_high: `gmpo`'s clip of log ratios above 0.
        kl_coef: weight of the KL term to the reference; 0 switches the reference off.
        kl_estimator: `k1`, `k2`, `k3`; `ratio_k1`, `ratio_k3`: times the importance ratio; or `exact`:
            over the whole vocabulary, for one more pass of the reference in every update.
        kl_placement: in the `loss`, or in the `reward` (minus kl_coef times the sum of k1).
        kl_on_dead_groups: whether groups whose rewards are all equal feel KL and entropy terms.
        kl_target: KL in nats per token that kl_coef is steered to; None: kl_coef is constant.
        kl_adaptation: gain of that controller, in (0, 5).
        ref_sync_every: updates after which the reference moves towards the policy; 0: it is frozen.
        ref_mixup_alpha: how far it moves then, in (0, 1]; 1 copies the policy.
        reduction: `sequence`, `token`, `constant`, `sequence_sum` or `local_token` (per micro-batch).
        entropy_coef: weight of an entropy bonus.
        top_entropy: share of the batch's tokens, those of highest entropy, that train the policy; (0, 1].
        max_staleness: nats by which the mean log-prob of a completion with a negative advantage may have
            fallen since it was sampled; beyond, it does not train the policy.
        importance_cap: largest truncated importance weight between sampler and scorer; at least 1.
        mask_truncated: completions cut off at max_new_tokens do not train.
        overlong_buffer: tokens before max_new_tokens over which a penalty on the reward grows to 1; 0: off
            (None with `dapo`: a fifth of max_new_tokens).
        dynamic_sampling: train only on groups whose rewards differ, and sample more until there are enough.
        max_sampling_rounds: rounds of sampling per rollout at most, with dynamic_sampling.
    """

    name: str = "grpo"
    group_size: int = 8
    num_iterations: int = 1
    num_minibatches: int = 1
    advantage: Literal["std", "batch", "none", "leave_one_out"] | None = None
    aggregation: Literal["sum_then_normalize", "normalize_then_sum", "gdpo"] | None = None
    missing: Literal["skip", "renormalize", "drop"] | None = None
    ratio_level: Literal["token", "sequence", "sequence_token"] | None = None
    surrogate: Literal["clipped", "cispo", "sapo", "gmpo", "reinforce"] | None = None
    clip_range: float | None = None
    clip_range_high: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    cap: float | None = None
    tau: float | None = None
    tau_negative: float | None = None
    log_clip_range: float | None = None
    log_clip_range_high: float | None = None
    kl_coef: float | None = None
    kl_estimator: Literal["k1", "k2", "k3", "ratio_k1", "ratio_k3", "exact"] | None = None
    kl_placement: Literal["loss", "reward"] | None = None
    kl_on_dead_groups: bool | None = None
    kl_target: float | None = None
    kl_adaptation: float = 0.1
    ref_sync_every: int = 0
    ref_mixup_alpha: float = 0.6
    reduction: Literal["sequence", "token", "constant", "sequence_sum", "local_token"] | None = None
    entropy_coef: float | None = None
    top_entropy: float | None = None
    max_staleness: float | None = None
    importance_cap: float | None = None
    mask_truncated: bool | None = None
    overlong_buffer: int | None = None
    dynamic_sampling: bool | None = None
    max_sampling_rounds: int = 4

    def __post_init__(self):
        _require(
            self.name in RECIPES,
            f"algorithm.name: {self.name!r} is not a recipe; choose one of {', '.join(RECIPES)}",
        )
        _require(self.group_size >= 2, f"algorithm.group_size: {self.group_size}; a group needs at least 2")
        for names, holds, wanted in _ALGORITHM_RANGES:
            for name in names.split():
                value = getattr(self, name)
                _require(value is None or holds(value), f"algorithm.{name}: {value}; {wanted}")


# names -> what must hold of them, in code and in words
_ALGORITHM_RANGES = (
    ("num_iterations num_minibatches max_sampling_rounds", lambda x: x >= 1, "at least 1"),
    ("delta dual_clip", lambda x: 1 < x < math.inf, "a finite ratio above 1"),
    ("cap tau tau_negative kl_target", lambda x: 0 < x < math.inf, "finite, above 0"),
    (
        "kl_coef clip_range clip_range_high log_clip_range log_clip_range_high max_staleness",
        lambda x: 0 <= x < math.inf,
        "a finite number, not negative",
    ),
    ("entropy_coef", math.isfinite, "a finite number"),
    ("importance_cap", lambda x: 1 <= x < math.inf, "a finite ratio, at least 1"),
    ("top_entropy ref_mixup_alpha", lambda x: 0 < x <= 1, "in (0, 1]"),
    ("kl_adaptation", lambda x: 0 < x < 5, "in (0, 5)"),
    ("overlong_buffer ref_sync_every", lambda x: x >= 0, "0 (off) or more"),
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model.

    Args:
        type: what the model is trained as; `policy` is the one kind there is.
        hf_model_name: a local directory, a Hugging Face hub id, or `packaged:arithmetic` (ships with us).
        revision: branch, tag or commit of a hub id.
        dtype: compute dtype; parameters and optimizer stay float32.
        implementation: what computes the model: our `decoder`, the `flax` classes of transformers, or `auto`,
            the first of these that supports it.
    """

    type: Literal["policy"] = "policy"
    hf_model_name: str = "packaged:arithmetic"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    implementation: Literal["auto", "decoder", "flax"] = "auto"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where prompts come from.

    Args:
        task: a built-in task (`arithmetic`), used when train_file is not given.
        train_file: JSONL; each line has `prompt` (a string or a list of chat messages), every other
            column goes to the reward functions.
        eval_file: JSONL of held-out prompts; without it a file-based run has no evaluation.
        max_prompt_length: limit in tokens; None: whatever the model's positions leave for the prompt.
        over_length: what happens to a longer prompt: `error`, or `drop` (counted and printed).
    """

    task: str = "arithmetic"
    train_file: str | None = None
    eval_file: str | None = None
    max_prompt_length: int | None = None
    over_length: Literal["error", "drop"] = "error"

    def __post_init__(self):
        n = self.max_prompt_length
        _require(n is None or n >= 1, f"data.max_prompt_length: {n}; at least 1 token")
        _require(
            self.eval_file is None or self.train_file is not None,
            "data.eval_file is given without data.train_file; give both, or neither and a task",
        )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One reward function.

    Args:
        function: built-in name, `package.module:function`, or `path/file.py:function`.
        weight: factor of this reward in the sum.
        arguments: extra keyword arguments of the function.
    """

    function: str
    weight: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)


def check_drawing(section: str, *, max_new_tokens: int, top_k: int, top_p: float, min_p: float) -> None:
    """Checks what training and the generate command both say about how completions are drawn.

    Args:
        section: prefix of the names in the messages, such as `sampling.`.

    Raises:
        ValueError: names the value and its range.
    """
    _require(max_new_tokens >= 1, f"{section}max_new_tokens: {max_new_tokens}; at least 1")
    _require(top_k >= 0, f"{section}top_k: {top_k}; 0 (off) or more")
    _require(0 < top_p <= 1, f"{section}top_p: {top_p}; in (0, 1], 1 is off")
    _require(0 <= min_p < 1, f"{section}min_p: {min_p}; in [0, 1), 0 is off")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How completions are drawn, in training and in sampled evaluation.

    Args:
        max_new_tokens: T, completion tokens at most.
        temperature: divides the logits; above 0 (evaluation adds a greedy pass of its own).
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
        min_p: drop tokens below this fraction of the most likely one; 0 keeps all.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        check_drawing(
            "sampling.",
            max_new_tokens=self.max_new_tokens,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        )
        _require(
            0 < self.temperature < math.inf,
            f"sampling.temperature: {self.temperature}; training needs a temperature above 0: greedy "
            "completions of one prompt are all equal and teach nothing",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimizer and the length of the run.

    Args:
        batch_size: B, *completions* per optimizer step; batch_size / group_size prompts.
        num_microbatches: slices of the batch whose gradients are summed before the one update.
        num_epochs: passes over the training prompts.
        num_steps: optimizer steps; overrides num_epochs.
        learning_rate: peak learning rate of AdamW.
        lr_schedule: `constant`, `linear` (to 0) or `cosine` (to 0), after the warmup.
        warmup_steps: optimizer steps of linear warmup from 0.
        weight_decay: AdamW's decoupled decay, on matrices only.
        adam_b1: decay of the first moment.
        adam_b2: decay of the second moment.
        max_grad_norm: global-norm clipping; 0 switches it off.
        seed: the whole run is a function of it.
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
        _require(self.batch_size >= 1, f"training.batch_size: {self.batch_size}; at least 1")
        parts = self.num_microbatches
        _require(parts >= 1, f"training.num_microbatches: {parts}; at least 1")
        _require(
            self.batch_size % parts == 0,
            f"training.batch_size {self.batch_size} does not divide into training.num_microbatches "
            f"{parts} equal parts",
        )
        _require(0 < self.num_epochs < math.inf, f"training.num_epochs: {self.num_epochs}; above 0, finite")
        n = self.num_steps
        _require(n is None or n >= 1, f"training.num_steps: {n}; at least 1")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"training.{name}: {value}; a finite number, not negative")
        for name in ("adam_b1", "adam_b2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"training.{name}: {value}; in [0, 1)")
        _require(self.warmup_steps >= 0, f"training.warmup_steps: {self.warmup_steps}; not negative")
        _require(self.max_grad_norm >= 0, f"training.max_grad_norm: {self.max_grad_norm}; 0 (off) or more")
        _require(0 <= self.seed < 2**31, f"training.seed: {self.seed}; in [0, 2**31)")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out evaluation: greedy accuracy, mean@k and pass@k.

    Args:
        every: optimizer steps between evaluations; 0: only before the first and after the last.
        num_prompts: held-out prompts used (the first ones of the evaluation set); 0: no evaluation.
        num_samples: k, sampled completions per prompt.
        batch_size: completions decoded at once.
    """

    every: int = 0
    num_prompts: int = 256
    num_samples: int = 4
    batch_size: int = 256

    def __post_init__(self):
        _require(self.every >= 0, f"evaluation.every: {self.every}; 0 or more")
        _require(self.num_prompts >= 0, f"evaluation.num_prompts: {self.num_prompts}; 0 or more")
        _require(self.num_samples >= 1, f"evaluation.num_samples: {self.num_samples}; at least 1")
        _require(self.batch_size >= 1, f"evaluation.batch_size: {self.batch_size}; at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming.

    Args:
        every: optimizer steps between checkpoints; the last step is always saved.
        keep: checkpoints kept.
        resume: `auto` (continue the run found in run_dir), `never` (refuse a used run_dir), or the
            path of another run to continue from.
    """

    every: int = 50
    keep: int = 2
    resume: str = "auto"

    def __post_init__(self):
        _require(self.every >= 1, f"checkpoints.every: {self.every}; at least 1")
        _require(self.keep >= 1, f"checkpoints.keep: {self.keep}; at least 1")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl and the console.

    Args:
        tensorboard: write event files under run_dir/tensorboard (extra `tensorboard`).
        wandb: log to Weights & Biases (extra `wandb`); offline when there is no key.
        wandb_project: W&B project.
        wandb_name: W&B run name; None: the run directory's name.
        completions_every: optimizer steps between sample tables and rows of completions.jsonl.
        num_completions: completions shown and written each time.
    """

    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "grpo_jax"
    wandb_name: str | None = None
    completions_every: int = 50
    num_completions: int = 8

    def __post_init__(self):
        every = self.completions_every
        _require(every >= 1, f"tracking.completions_every: {every}; at least 1")
        _require(self.num_completions >= 0, f"tracking.num_completions: {self.num_completions}; 0 or more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run.

    Args:
        algorithm: the objective.
        model: the language model.
        data: prompts.
        rewards: reward functions; empty: the task's own.
        sampling: how completions are drawn.
        training: the optimizer and the length of the run.
        evaluation: held-out evaluation.
        checkpoints: saving and resuming.
        tracking: where metrics go.
        run_dir: directory of the run: config.yaml, metrics.jsonl, completions.jsonl, checkpoints/, hf/.
    """

    algorithm: AlgorithmConfig = AlgorithmConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rewards: list[RewardConfig] = field(default_factory=list)
    sampling: SamplingConfig = SamplingConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    run_dir: str = "runs/grpo"

    @property
    def num_prompts(self) -> int:
        """N, prompts per rollout (and per round of one)."""
        return self.training.batch_size * self.algorithm.num_minibatches // self.algorithm.group_size

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps made from one rollout."""
        return self.algorithm.num_iterations * self.algorithm.num_minibatches

    def __post_init__(self):
        batch, group = self.training.batch_size, self.algorithm.group_size
        _require(
            batch % group == 0,
            f"training.batch_size {batch} counts completions and must be a multiple of "
            f"algorithm.group_size {group}: try {max(1, round(batch / group)) * group}",
        )
