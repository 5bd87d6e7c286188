"""One GRPO step of ours, the way a run makes it, at any size: seconds and share of the peak by phase, memory.

    python benchmarks/step.py                                            # first row: mid, 8 × 8, 32 + 64
    python benchmarks/step.py --row 124m --steps 5 --json out.json
    python benchmarks/step.py --model small --prompt 16 --completion 32 --prompts 4 --group 8
    python benchmarks/step.py --lengths geometric:16                     # completions end by themselves
    python benchmarks/step.py --cold                                     # compile, whatever the cache holds
    python benchmarks/step.py --training.num_microbatches 4              # any key of a config

The recipe is `grpo` with k3, one AdamW update per rollout. A share is FLOPs (`work.step_flops`) by seconds by
the peak: the best of a few square matmuls, timed in this process before and after the steps.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from random_models import find_model
from work import Flops, Work, add_work_arguments, markdown_row, prompt_rows, step_flops, work_of

import grpo_jax
from grpo_jax.cli import enable_compilation_cache
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.cpu_tuning import use_huge_pages
from grpo_jax.models.loading import DTYPES, Model, load_model
from grpo_jax.run import loop as run_loop
from grpo_jax.run.build import Run, build
from grpo_jax.run.planning import make_plan
from grpo_jax.run.progress import Progress
from grpo_jax.run.progress import start as start_progress

PHASES = ("generate", "score", "update", "host", "step")


# The run.


def parse_lengths(text: str) -> float | None:
    """Returns the mean of `geometric:MEAN`; None for `full`: every completion has T tokens.

    Raises:
        ValueError: it is neither.
    """
    kind, _, mean = text.partition(":")
    if text == "full":
        return None
    if kind != "geometric" or not mean.replace(".", "", 1).isdecimal() or float(mean) <= 1:
        raise ValueError(f"lengths {text!r}: `full`, or `geometric:MEAN` with a mean above 1")
    return float(mean)


def end_with_hazard(model: Model, mean: float) -> Model:
    """Makes a model's completions end after any token with about the same probability, 1 / mean.

    The eos gets one constant logit in place of its own: the odds of 1 / mean over the normaliser of the other
    tokens, averaged over random text. On a fresh random model that normaliser hardly varies, so the hazard
    is constant to a few per cent, and no work is added to the model's: the matmuls are the same.

    Args:
        model: with one eos id.
        mean: tokens, the eos included, of a completion without a limit.
    """
    (eos,), policy = model.eos_ids, model.policy

    def is_eos(logits):
        return jnp.arange(logits.shape[-1]) == eos

    @jax.jit
    def log_normalizer(params, tokens):
        mask = jnp.ones(tokens.shape, bool)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = policy.forward(params, tokens, mask, positions, None)
        logits = policy.unembed(params, hidden)
        return jnp.mean(jax.nn.logsumexp(jnp.where(is_eos(logits), -jnp.inf, logits), axis=-1))

    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (16, 16))
    constant = float(log_normalizer(model.params, tokens)) - np.log(mean - 1)

    def unembed(params, hidden):
        logits = policy.unembed(params, hidden)
        return jnp.where(is_eos(logits), constant, logits)

    return replace(model, policy=policy.replace(unembed=unembed))


def make_config(
    work: Work, directory: Path, *, dtype: str, num_rollouts: int, overrides: list[str]
) -> Config:
    """Makes the config of a run on this work; its prompts are written into the directory."""
    rows = prompt_rows(work.prompts * num_rollouts, work.prompt)
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    settings = {
        "algorithm.name": "grpo",
        "algorithm.group_size": work.group,
        "algorithm.kl_coef": work.kl_coef,
        "model.hf_model_name": find_model(work.model),
        "model.dtype": dtype,
        "data.train_file": prompts,
        "rewards": json.dumps([{"function": f"{Path(__file__).parent / 'work.py'}:text_length"}]),
        "sampling.max_new_tokens": work.completion,
        "training.batch_size": work.batch,
        "training.num_steps": num_rollouts,
        "training.learning_rate": 1e-5,
        "run_dir": directory / "run",
    }
    argv = [f"--{name}={value}" for name, value in settings.items()]
    return parse_record(Config, argv + overrides, command="step.py", description="")


def start(config: Config, mean: float | None) -> tuple[Run, Progress]:
    """Builds what `grpo_jax.train.train` builds before its loop; nothing else keeps the parameters."""
    model = load_model(config.model.hf_model_name, dtype=config.model.dtype)
    model = replace(model, eos_ids=(), eos_origins=()) if mean is None else end_with_hazard(model, mean)
    run = build(config, model=model)
    progress = start_progress(run)
    shapes = jax.eval_shape(lambda params: params, model.params)
    return replace(run, model=replace(model, params=shapes)), progress


# Measuring.


class Compilations:
    """Notes what XLA compiles or reads from the cache: number of programs, seconds by name, cache traffic."""

    _EVENTS = (
        "/jax/core/compile/jaxpr_trace_duration",
        "/jax/core/compile/jaxpr_to_mlir_module_duration",
        "/jax/core/compile/backend_compile_duration",
    )

    def __init__(self):
        self.clear()
        jax.monitoring.register_event_duration_secs_listener(self._note)
        jax.monitoring.register_event_listener(self._note_cache)

    def clear(self) -> None:
        """Forgets all."""
        self.count, self.cache, self.seconds = 0, Counter(hits=0, misses=0), Counter()

    def _note(self, event: str, seconds: float, *, fun_name: str = "", **_):
        if event in self._EVENTS:
            self.seconds[fun_name.removeprefix("jit(").removesuffix(")").removeprefix("jit_")] += seconds
            self.count += event == self._EVENTS[-1]

    def _note_cache(self, event: str, **_):
        before, _, kind = event.rpartition("/cache_")
        if before == "/jax/compilation_cache" and kind in self.cache:
            self.cache[kind] += 1  # a miss is a program that was slow to compile, and is kept from now on

    def programs(self) -> dict[str, float]:
        """Returns the slowest programs, with the seconds of tracing, lowering and compiling together."""
        return {name: round(seconds, 2) for name, seconds in self.seconds.most_common(4) if seconds >= 0.1}


def matmul_peak(size: int, dtype: Any, *, repeats: int = 5) -> float:
    """Returns the FLOP/s of the fastest of a few size × size matmuls."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def peak_rss() -> int:
    """Returns the peak of this process's resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def block_parameters(params: Any) -> int:
    """Counts the parameters in the matrices of the blocks: every kernel but the head's."""
    named = jax.tree_util.tree_leaves_with_path(params)
    names = [([key.key for key in path], leaf) for path, leaf in named]
    return sum(leaf.size for path, leaf in names if path[-1] == "kernel" and path[0] != "lm_head")


def flops_of(work: Work, run: Run, lengths: list[int]) -> Flops:
    """Counts the FLOPs of a step whose completions had these lengths."""
    config = run.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return step_flops(
        lengths,
        reference=run.needs_reference,
        prompt=work.prompt,
        prompts=work.prompts,
        block=block_parameters(run.model.params),
        head=config.vocab_size * config.hidden_size,
        attention=config.num_hidden_layers * config.num_attention_heads * head_dim,
    )


def phase_seconds(metrics: dict[str, float]) -> dict[str, float]:
    """Returns the seconds of PHASES in one step's metrics.

    The device scores while the host rewards, so that both are `score`; `host` is what remains of the step.
    """
    seconds = {
        "generate": metrics["time/generate"],
        "score": metrics["time/reward"] + metrics["time/score"],
        "update": metrics["time/update"],
    }
    step = metrics["step_time"]
    return seconds | {"host": step - sum(seconds.values()), "step": step}


def one_step(run: Run, actor, progress: Progress, key, compilations: Compilations) -> dict[str, Any]:
    """Makes one step; returns seconds by phase, lengths of the completions, CPU seconds, compilations."""
    compilations.clear()
    cpu = time.process_time()
    metrics = run_loop.one_step(run, actor, progress, key)
    cpu = time.process_time() - cpu
    return {
        "seconds": phase_seconds(metrics),
        "lengths": np.asarray(progress.experience.mask).sum(axis=1).tolist(),
        "cpu_s": cpu,
        "compilations": compilations.count,
    }


def summarize(work: Work, run: Run, steps: list[dict[str, Any]], peak: float) -> dict[str, dict[str, float]]:
    """Returns medians, rates and shares of each phase over steps.

    Steps that compiled something are left out, unless all did.
    """
    steps = [step for step in steps if not step["compilations"]] or steps
    counts = [flops_of(work, run, step["lengths"]) for step in steps]
    tokens = statistics.median(sum(step["lengths"]) for step in steps)
    phases = {}
    for name in PHASES:
        seconds = [step["seconds"][name] for step in steps]
        median = statistics.median(seconds)
        phases[name] = {
            "median_s": median,
            "min_s": min(seconds),
            "tokens_per_s": tokens / median if median > 0 else 0.0,
        }
        if name != "host":
            flops = [getattr(count, name) for count in counts]
            shares = [f / s / peak for f, s in zip(flops, seconds, strict=True)]
            phases[name] |= {"flops": statistics.median(flops), "share": statistics.median(shares)}
    return phases


def measure(
    work: Work, *, steps: int, lengths: str, dtype: str, matmul_size: int, overrides: list[str]
) -> dict[str, Any]:
    """Makes a first step, then `steps` more; returns everything that there is to know about them.

    Args:
        work: sizes of the step.
        steps: to measure.
        lengths: as in `parse_lengths`.
        dtype: compute dtype, of the peak too.
        matmul_size: rows of the matmuls that the peak is measured with.
        overrides: options of a config.
    """
    mean, before, compilations = parse_lengths(lengths), peak_rss(), Compilations()
    with tempfile.TemporaryDirectory() as directory:
        config = make_config(work, Path(directory), dtype=dtype, num_rollouts=steps + 1, overrides=overrides)
        run, progress = start(config, mean)
    plan, actor, key = make_plan(run), run.actor(), jax.random.key(config.training.seed)
    peaks = [matmul_peak(matmul_size, DTYPES[dtype])]
    first = one_step(run, actor, progress, key, compilations)
    first |= {"cache": dict(compilations.cache), "programs": compilations.programs()}
    later = [one_step(run, actor, progress, key, compilations) for _ in range(steps)]
    peaks.append(matmul_peak(matmul_size, DTYPES[dtype]))
    device = jax.devices()[0]
    device_memory = device.memory_stats() or {}
    return {
        "impl": "grpo_jax",
        "work": vars(work),
        "lengths": lengths,
        "dtype": dtype,
        "overrides": overrides,
        "package": str(Path(grpo_jax.__file__).parent),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "device": device.device_kind,
        "cpu_count": os.cpu_count(),
        "load": os.getloadavg()[0],
        "peak_flops": {"before": peaks[0], "after": peaks[1], "matmul_size": matmul_size},
        "phases": summarize(work, run, later, max(peaks)),
        "mean_length": float(np.mean([n for step in later for n in step["lengths"]])),
        "first": first,
        "steps": later,
        "memory": {
            "peak_rss": peak_rss(),
            "rss_before_model": before,
            "device_peak": device_memory.get("peak_bytes_in_use", 0),
            "plan": plan.total_memory,
            "plan_parts": plan.memory,
        },
    }


def report(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    work, phases, first, memory = Work(**result["work"]), result["phases"], result["first"], result["memory"]
    peak = result["peak_flops"]
    used = [step for step in result["steps"] if not step["compilations"]]
    lines = [
        f"{work}; lengths {result['lengths']} (mean {result['mean_length']:.1f}), {result['dtype']}, "
        f"{result['device']}, {result['package']}",
        markdown_row("phase", "median s", "fastest s", "completion tokens/s", "share of peak"),
        markdown_row(*["---"] * 5),
    ]
    for name, phase in phases.items():
        share = f"{phase['share']:.1%}" if phase.get("share") else "–"
        rate = f"{phase['tokens_per_s']:,.0f}" if name != "host" else "–"
        lines.append(markdown_row(name, f"{phase['median_s']:.4f}", f"{phase['min_s']:.4f}", rate, share))
    cpu = statistics.median(step["cpu_s"] for step in used or result["steps"])
    programs = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in first["programs"].items())
    lines += [
        f"{len(used)} of {len(result['steps'])} steps compiled nothing and count; {cpu:.3f} CPU s per step, "
        f"load {result['load']:.1f}",
        f"matmul {peak['matmul_size']}³: {peak['before'] / 1e9:,.0f} GFLOP/s before, "
        f"{peak['after'] / 1e9:,.0f} after",
        f"first step {first['seconds']['step']:.1f} s, {first['compilations']} compilations, "
        f"{first['cache']['hits']} of them from the cache: {programs}",
        f"memory: peak {memory['peak_rss'] / 2**20:,.0f} MiB, {memory['rss_before_model'] / 2**20:,.0f} "
        f"before the model; the plan says {memory['plan'] / 2**20:,.0f}"
        + (f"; device {memory['device_peak'] / 2**20:,.0f}" if memory["device_peak"] else ""),
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_work_arguments(parser)
    parser.add_argument("--steps", type=int, default=5, help="steps to measure, after the first")
    parser.add_argument("--lengths", default="full", help="full, or geometric:MEAN")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="compute dtype")
    parser.add_argument("--num-microbatches", type=int, default=1)
    parser.add_argument("--matmul-size", type=int, default=2048, help="rows of the peak's matmuls")
    parser.add_argument("--cold", action="store_true", help="do without the compilation cache")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    arguments, overrides = parser.parse_known_args(argv)
    if not arguments.cold:
        enable_compilation_cache()
    use_huge_pages()
    result = measure(
        work_of(arguments),
        steps=arguments.steps,
        lengths=arguments.lengths,
        dtype=arguments.dtype,
        matmul_size=arguments.matmul_size,
        overrides=[f"--training.num_microbatches={arguments.num_microbatches}", *overrides],
    )
    print(report(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
