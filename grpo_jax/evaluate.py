"""Held-out evaluation of a model or a run: greedy accuracy, mean@k and pass@k.

python -m grpo_jax.evaluate --model runs/arithmetic
python -m grpo_jax.evaluate --model packaged:arithmetic --config configs/grpo_config.yaml
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.actor import bucket_length, judge
from grpo_jax.cli import enable_compilation_cache, parse_record, run_command
from grpo_jax.config import Config
from grpo_jax.data import Example
from grpo_jax.decoding import generate
from grpo_jax.experience import combine
from grpo_jax.models import Model, decode, encode, pad_prompts
from grpo_jax.rewards import Reward, reward_means
from grpo_jax.runs import Parts, build, load_model_or_run, read_config
from grpo_jax.types import Params

# Evaluation noise must not repeat any training step's: steps count up from 0 and never get here.
_NOISE_STEP = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Arguments of the command.

    Args:
        model: a local directory, a hub id, `packaged:<name>`, or a run directory.
        config: YAML config that names data and rewards; None: the run's own, or the defaults.
        num_prompts: held-out prompts; None: as in the config.
        num_samples: k; None: as in the config.
        max_new_tokens: completion tokens at most; None: as in the config.
        temperature: of the sampled completions; None: as in the config.
        seed: of the sampling noise; None: as in the config.
        json: print one JSON object instead of lines.
    """

    model: str
    config: str | None = None
    num_prompts: int | None = None
    num_samples: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    json: bool = False


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Estimates the chance that at least one of k samples is correct, without bias.

    https://arxiv.org/abs/2107.03374, equation 1: ``1 - C(n - c, k) / C(n, k)``, averaged over prompts.

    Args:
        correct: bool [N, n].
        k: 1 to n.

    Raises:
        ValueError: k is larger than n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples per prompt; there are {n}")
    wrong = n - correct.sum(axis=1)
    # C(w, k) / C(n, k) as a product of k factors; it is 0 as soon as w < k.
    factors = [np.clip(wrong - i, 0, None) / (n - i) for i in range(k)]
    return float(np.mean(1.0 - np.prod(factors, axis=0)))


def sample_texts(
    model: Model,
    params: Params,
    examples: Sequence[Example],
    *,
    group_size: int,
    prompt_length: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    sampling: Mapping[str, float],
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Samples group_size completions of each example, a fixed number of prompts at a time.

    Returns:
        (texts [N*G] prompt-major, lengths [N*G] in tokens, finished [N*G] bool).
    """
    key = jax.random.fold_in(jax.random.key(seed), _NOISE_STEP)
    sequences = encode(model, [example.prompt for example in examples])
    size = min(max(1, batch_size // group_size), len(sequences))
    texts, lengths, finished = [], [], []
    for start in range(0, len(sequences), size):
        part = sequences[start : start + size]
        rows = len(part) * group_size
        # The last part is filled up to the one compiled shape; its extra rows are dropped.
        filled = part + [part[0]] * (size - len(part))
        rollout = generate(
            model.policy,
            params,
            pad_prompts(filled, prompt_length),
            key,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            eos_ids=jnp.asarray(model.eos_ids, jnp.int32),
            first_row=start * group_size,
            **sampling,
        )
        mask = np.asarray(rollout.mask)[:rows]
        texts += decode(model, np.asarray(rollout.tokens)[:rows], mask)
        lengths.append(mask.sum(axis=1))
        finished.append(np.asarray(rollout.finished)[:rows])
    return texts, np.concatenate(lengths), np.concatenate(finished)


def evaluate(
    model: Model,
    params: Params,
    examples: Sequence[Example],
    rewards: Sequence[Reward],
    *,
    num_samples: int,
    max_new_tokens: int,
    sampling: Mapping[str, float],
    batch_size: int = 256,
    prompt_length: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Evaluates on held-out examples, once greedily and with num_samples samples per prompt.

    A completion is correct when the *first* reward function gives it at least 1. The noise depends on
    the seed alone, so evaluations of two models, or of two steps of one run, are paired.

    Args:
        model: functions and tokenizer.
        params: parameters to evaluate.
        examples: held-out prompts with their columns; at least one.
        rewards: reward functions, of which the first decides what is correct.
        num_samples: k.
        max_new_tokens: T.
        sampling: temperature, top_k, top_p, min_p of the sampled part.
        batch_size: completions decoded at once.
        prompt_length: longest prompt in tokens; None: found out.
        seed: of the noise.

    Returns:
        `eval/greedy_accuracy`, `eval/mean@k`, `eval/pass@k`, `eval/reward` (mean weighted reward of the
        samples), `eval/rewards/<name>/mean`, `eval/mean_length` (tokens), `eval/clipped_ratio`.

    Raises:
        ValueError: no examples. RewardError: a reward function failed.
    """
    if not examples:
        raise ValueError("evaluation needs at least one held-out prompt; there are none")
    if prompt_length is None:
        prompt_length = max(len(s) for s in encode(model, [example.prompt for example in examples]))
    room = max(prompt_length, (model.max_positions or 10**9) - max_new_tokens)
    settings = {
        "prompt_length": bucket_length(prompt_length, room),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
    }
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    texts, _, _ = sample_texts(model, params, examples, group_size=1, sampling=greedy, **settings)
    greedy_scores = judge(rewards, examples, texts)

    texts, lengths, finished = sample_texts(
        model, params, examples, group_size=num_samples, sampling=sampling, **settings
    )
    repeated = [example for example in examples for _ in range(num_samples)]
    scores = judge(rewards, repeated, texts)
    totals, valid = combine(scores, [reward.weight for reward in rewards])
    correct = (np.nan_to_num(scores[:, 0], nan=0.0) >= 1).reshape(len(examples), num_samples)
    means = reward_means(rewards, scores).items()
    return {
        "eval/greedy_accuracy": float(np.mean(np.nan_to_num(greedy_scores[:, 0], nan=0.0) >= 1)),
        f"eval/mean@{num_samples}": float(correct.mean()),
        f"eval/pass@{num_samples}": pass_at_k(correct, num_samples),
        "eval/reward": float(totals[valid].mean()) if valid.any() else 0.0,
        **{f"eval/{name}": value for name, value in means if name.endswith("/mean")},
        "eval/mean_length": float(lengths.mean()),
        "eval/clipped_ratio": float(1.0 - finished.mean()),
    }


def evaluate_parts(parts: Parts, params: Params) -> dict[str, float]:
    """Evaluates params on a run's held-out prompts, as its config says; {} if it has none."""
    evaluation = parts.config.evaluation
    if not parts.task.evaluation:
        return {}
    return evaluate(
        parts.model,
        params,
        parts.task.evaluation,
        parts.rewards,
        num_samples=evaluation.num_samples,
        max_new_tokens=parts.config.sampling.max_new_tokens,
        sampling=parts.sampling,
        batch_size=evaluation.batch_size,
        prompt_length=parts.eval_prompt_length,
        seed=parts.config.training.seed,
    )


def _resolve(arguments: EvaluateArguments) -> Config:
    """Returns the config that says what to evaluate on."""
    if arguments.config is not None:
        config = parse_record(Config, ["--config", arguments.config], command="", description="")
    elif (Path(arguments.model) / "config.yaml").is_file():
        config = read_config(arguments.model)
    else:
        config = Config()
    evaluation = {"num_prompts": arguments.num_prompts, "num_samples": arguments.num_samples}
    changed = {name: value for name, value in evaluation.items() if value is not None}
    config = replace(config, evaluation=replace(config.evaluation, **changed))
    sampling = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    changed = {name: value for name, value in sampling.items() if value is not None}
    config = replace(config, sampling=replace(config.sampling, **changed))
    if arguments.seed is not None:
        config = replace(config, training=replace(config.training, seed=arguments.seed))
    return config


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    arguments = parse_record(
        EvaluateArguments,
        argv,
        command="python -m grpo_jax.evaluate",
        description="Evaluate a model or a run on held-out prompts.",
        config_option=False,
    )
    enable_compilation_cache()
    config = _resolve(arguments)
    named = config.model
    model = load_model_or_run(arguments.model, dtype=named.dtype, chat_template=named.chat_template)
    parts = build(config, model=model)
    if not parts.task.evaluation:
        raise ValueError("there are no held-out prompts: give data.eval_file, and num_prompts above 0")
    results = evaluate_parts(parts, model.params)
    if arguments.json:
        print(json.dumps({"model": arguments.model, "num_prompts": len(parts.task.evaluation), **results}))
    else:
        print(f"{arguments.model} on {len(parts.task.evaluation)} held-out prompts")
        for name, value in results.items():
            print(f"  {name.removeprefix('eval/'):<28} {value:.4f}")
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
