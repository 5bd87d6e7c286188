"""What a run will do, derived before it starts: sizes, memory, compilations."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.models.endings import describe_endings
from grpo_jax.policy.decoding import decoding_params
from grpo_jax.policy.log_probs import CHUNK_SIZE, completion_hidden
from grpo_jax.policy.shapes import NUM_BUCKETS, PACKED_FROM, bucket_length, decode_stages, shared_rows
from grpo_jax.run.build import Run
from grpo_jax.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The derived numbers of a run, of which `text()` is printed."""

    title: str
    num_prompts: int  # N
    group_size: int  # G
    batch_size: int  # B
    num_microbatches: int
    num_iterations: int
    num_steps: int
    num_examples: int
    num_dropped: int
    num_truncated: int
    num_evaluation: int
    num_held_out: int  # num_evaluation of these are evaluated
    prompt_length: int  # S
    max_new_tokens: int  # T
    generate_shapes: tuple[int, ...]  # prompt buckets that generation may be compiled for
    num_compilations: int  # upper bound for training, see _num_compilations
    num_evaluation_compilations: int
    memory: dict[str, int]  # bytes by purpose
    endings: str = ""  # what ends a completion
    first_prompt: tuple[str, ...] = ()  # lines that show it as tokens
    notes: tuple[str, ...] = ()  # lines for the user

    @property
    def checkpoint_size(self) -> int:
        """Bytes of one checkpoint on disk."""
        return self.memory.get("adapters", self.memory["parameters"]) + self.memory["optimizer"]

    @property
    def total_memory(self) -> int:
        """Bytes at the peak: what stays, plus the larger of generation and update."""
        transient = max(self.memory["generation"], self.memory["update"])
        return sum(self.memory.values()) - self.memory["generation"] - self.memory["update"] + transient

    def text(self) -> str:
        """Returns the plan in a few lines."""
        epochs = self.num_steps * self.num_prompts / self.num_iterations / self.num_examples
        passes = f", {self.num_iterations} updates per rollout" if self.num_iterations > 1 else ""
        slices = f" in {self.num_microbatches} micro-batches" if self.num_microbatches > 1 else ""
        changed = f" ({self.num_dropped:,} too long: dropped)" if self.num_dropped else ""
        changed += f" ({self.num_truncated:,} too long: truncated at the left)" if self.num_truncated else ""
        held_out = f"{self.num_evaluation:,}"
        if self.num_evaluation < self.num_held_out:
            held_out += f" of {self.num_held_out:,}"
        evaluation = f" + {self.num_evaluation_compilations} for evaluation"
        parts = ", ".join(f"{name} {_megabytes(size)}" for name, size in self.memory.items() if size)
        return "\n".join(
            [
                self.title,
                f"  {self.num_prompts} prompts × {self.group_size} completions = {self.batch_size} per update"
                f"{slices}{passes}, {self.num_steps:,} updates = {epochs:.2f} epochs of "
                f"{self.num_examples:,} prompts{changed}",
                f"  prompts up to {self.prompt_length} tokens + completions up to {self.max_new_tokens} = "
                f"{self.prompt_length + self.max_new_tokens}; {held_out} held-out prompts",
                f"  {self.num_compilations} compilations{evaluation if self.num_evaluation else ''}, "
                f"about {_megabytes(self.total_memory)} MB ({parts})",
                f"  a checkpoint is {_megabytes(self.checkpoint_size)} MB on disk, and twice that in memory "
                "while it is written",
                *(f"  {line}" for line in self.first_prompt),
                *([f"  {self.endings}"] if self.endings else []),
                *(f"  note: {note}" for note in self.notes),
            ]
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.1f}"


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _activation_bytes(run: Run, rows: int) -> int:
    """Counts what the backward pass of one micro-batch keeps, by abstract evaluation: nothing runs."""
    policy = run.model.policy
    prompt = (rows, run.prompt_length)
    completion = (rows, run.config.sampling.max_new_tokens)
    rollout = Rollout(
        prompt_tokens=jax.ShapeDtypeStruct(prompt, jnp.int32),
        prompt_mask=jax.ShapeDtypeStruct(prompt, jnp.bool_),
        tokens=jax.ShapeDtypeStruct(completion, jnp.int32),
        mask=jax.ShapeDtypeStruct(completion, jnp.bool_),
        log_probs=jax.ShapeDtypeStruct(completion, jnp.float32),
        kept_mass=jax.ShapeDtypeStruct(completion, jnp.float32),
        finished=jax.ShapeDtypeStruct((rows,), jnp.bool_),
    )

    def residuals(params, rollout):
        shared = shared_rows(rows, run.config.algorithm.group_size, 1)
        return jax.vjp(lambda params: completion_hidden(policy, params, rollout, group_size=shared), params)

    kept = jax.eval_shape(residuals, run.model.params, rollout)
    # The residuals hold the weight matrices too, but these are counted with the parameters.
    return max(0, _bytes(kept) - _bytes(run.model.params))


def _relaid_bytes(run: Run, batch: int) -> int:
    """Returns the bytes of the parameters that generation copies into another layout."""
    policy = run.model.policy
    stages = decode_stages(batch, run.config.sampling.max_new_tokens)
    jaxpr = jax.make_jaxpr(lambda params: decoding_params(policy, params, stages))(run.model.params).jaxpr
    given = set(jaxpr.invars)
    return sum(x.aval.size * x.aval.dtype.itemsize for x in jaxpr.outvars if x not in given)


def _init_state_of(run: Run):
    """Returns init_state as a function of the model's parameters, so that their shapes are enough."""
    return lambda params: replace(run, model=replace(run.model, params=params)).init_state()


def _memory(run: Run) -> dict[str, int]:
    """Estimates bytes by purpose. XLA's fusion usually needs less for the update."""
    config = run.config
    policy = run.model.policy
    params = run.model.params
    size = _bytes(params)
    trained = jax.eval_shape(_init_state_of(run), params)
    batch = config.training.batch_size
    length = run.prompt_length + config.sampling.max_new_tokens
    rows = batch // config.training.num_microbatches
    hidden = jax.eval_shape(
        policy.forward,
        params,
        *(jax.ShapeDtypeStruct((1, 1), dtype) for dtype in (jnp.int32, jnp.bool_, jnp.int32)),
    )[0]
    vocabulary = jax.eval_shape(policy.unembed, params, hidden).shape[-1]

    def full_cache():
        prompts = policy.init_cache(run.config.num_prompts, run.prompt_length)
        return policy.grow_cache(policy.fork_cache(prompts, config.algorithm.group_size), length)

    cache = _bytes(jax.eval_shape(full_cache))
    logits = 4 * vocabulary * min(CHUNK_SIZE, rows * config.sampling.max_new_tokens)
    lora = {}
    if run.lora is not None:  # the base is the reference, so that takes no further memory
        kernels = 4 * sum(target.inputs * target.outputs for target in run.lora.targets)
        lora = {"adapters": _bytes(trained.params), "merged kernels": kernels}
    return {
        "parameters": size,
        **lora,
        "reference": size if run.needs_reference and not lora else 0,
        "optimizer": _bytes(trained.opt_state),
        "gradients": _bytes(trained.params) * (2 if config.training.num_microbatches > 1 else 1),
        # The loop's cache and the one being written; logits, their probabilities and running sums.
        "generation": 2 * cache + 4 * 4 * vocabulary * batch + _relaid_bytes(run, batch),
        "update": _activation_bytes(run, rows) + 3 * logits,
    }


def _num_compilations(run: Run, num_buckets: int) -> int:
    """Counts the programs of training at most: generation and scoring per prompt bucket, and the update.

    Scoring and update have one for each bucket that `tokens_in_use` may give to completions.
    """
    packings = 1 if run.config.sampling.max_new_tokens < PACKED_FROM else NUM_BUCKETS
    scoring = packings if run.rescores_rollout or run.needs_ref_log_probs else 0
    return num_buckets * (1 + scoring) + packings


def _describe_devices() -> str:
    """Names the device that the run uses, which is one, and counts those that it leaves idle."""
    used, *idle = jax.devices()
    others = f" ({len(idle)} more {'stays' if len(idle) == 1 else 'stay'} idle)" if idle else ""
    return f"1 × {used.device_kind}{others}"


def make_plan(run: Run) -> Plan:
    """Derives everything from a run. Compiles and runs nothing."""
    config = run.config
    count = sum(x.size for x in jax.tree.leaves(run.model.params))
    limit = run.prompt_length
    buckets = tuple(sorted({bucket_length(length, limit) for length in run.prompt_lengths}))
    lora = "" if run.lora is None else f"LoRA of rank {run.lora.rank} on {len(run.lora.targets)} kernels, "
    return Plan(
        title=f"{run.recipe.name} on {run.model.source} ({count / 1e6:,.1f} M parameters, {lora}"
        f"{config.model.dtype}) with {', '.join(reward.name for reward in run.rewards)}, "
        + _describe_devices(),
        num_prompts=run.config.num_prompts,
        group_size=config.algorithm.group_size,
        batch_size=config.training.batch_size,
        num_microbatches=config.training.num_microbatches,
        num_iterations=config.algorithm.num_iterations,
        num_steps=run.num_steps,
        num_examples=len(run.task.train),
        num_dropped=run.num_dropped,
        num_truncated=run.num_truncated,
        num_evaluation=len(run.task.evaluation),
        num_held_out=len(run.held_out),
        prompt_length=run.prompt_length,
        max_new_tokens=config.sampling.max_new_tokens,
        generate_shapes=buckets,
        num_compilations=_num_compilations(run, len(buckets)),
        num_evaluation_compilations=2,
        memory=_memory(run),
        endings=describe_endings(run.model),
        first_prompt=run.first_prompt,
        notes=run.notes,
    )
