"""Breaks each formula in turn and shows that the tests notice: a table of mutants, all killed.

    python scripts/mutation_check.py                 # all of them, 25 minutes of one core
    python scripts/mutation_check.py --only kl       # those whose file or name contains a text

A mutant is one replacement in one file of a copy of the package; the test modules named for that file then
run against the copy until a test fails, and one has to. Without a mutation they all have to pass.
Of the 104, 103 were run together in 48 minutes, two jobs on cores shared with others, and the
last one alone: all are killed.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

# file -> the test modules that hold it, the quickest first: the run of a mutant ends with its first failure.
# nightly/test_every_recipe is not among them: it takes minutes, and no mutant needs it.
TESTS = {
    "objective/advantages.py": ("objective/advantages",),
    "objective/kl.py": ("objective/kl",),
    "objective/surrogates.py": ("objective/surrogates", "objective/losses"),
    "objective/losses.py": ("objective/losses", "objective/golden"),
    "objective/shaping.py": ("objective/shaping",),
    "training/experience.py": ("training/experience",),
    "training/dynamic_sampling.py": ("training/dynamic_sampling",),
    "training/metrics.py": ("training/metrics",),
    "policy/log_probs.py": ("policy/log_probs", "policy/packing"),
    "training/learner.py": ("training/learner",),
    "training/reference.py": ("training/learner",),
    "policy/lora.py": ("policy/lora",),
    "policy/decoding.py": ("policy/decoding",),
    "rewards/answers/equality.py": ("rewards/answers/answers",),
}

# file -> (what is broken, the text as `ast.unparse` writes it, its replacement), see `mutate`
MUTANTS = {
    "objective/advantages.py": [
        ("sign of the baseline", "jnp.where(valid & alive, rewards - mean, 0)", "jnp.where(valid & alive, rewards + mean, 0)"),
        ("no baseline", "jnp.where(valid & alive, rewards - mean, 0)", "jnp.where(valid & alive, rewards, 0)"),
        # Either guard alone keeps a dead group at 0: the rewards counted from the lowest, and `alive`.
        ("float noise of dead groups", "    rewards = _from_lowest(rewards, valid, axis=-1)\n    mean = jnp.sum(rewards, axis=-1, keepdims=True) / jnp.maximum(count, 1)\n    return jnp.where(valid & alive, rewards - mean, 0)", "    mean = jnp.sum(rewards, axis=-1, keepdims=True) / jnp.maximum(count, 1)\n    return jnp.where(valid, rewards - mean, 0)"),
        ("offsets lose digits", "    rewards = _from_lowest(rewards, valid, axis=-1)\n    mean", "    mean"),
        ("advantages of invalid rows", "jnp.where(valid & alive, rewards - mean, 0)", "jnp.where(alive, rewards - mean, 0)"),
        ("invalid rewards take part", "    rewards = jnp.where(valid, rewards, 0)\n", ""),
        ("ddof", "jnp.maximum(count - ddof, 1)", "jnp.maximum(count, 1)"),
        ("reward_std with ddof 0", "_std(centered, count, 1, axis=-1)", "_std(centered, count, 0, axis=-1)"),
        ("no epsilon", "divisor = std + epsilon", "divisor = std"),
        ("batch std of the group", "else _batch_std(rewards, valid, ddof)", "else _std(centered, count, ddof, axis=-1)"),
        ("signal decided by tolerance", "return highest > lowest", "return highest > lowest + 1e-3"),
        ("leave-one-out factor", "* count / jnp.maximum(count - 1, 1)", "* jnp.maximum(count - 1, 1) / count"),
        ("missing terms renormalised wrongly", "(abs(weights).sum() / (kept", "(1.0 / (kept"),
        ("drop keeps the row", "row_valid & (valid | ~applies).all(axis=-1)", "row_valid"),
        ("a function applies to every group", "applies = counts.any(axis=-2, keepdims=True)", "applies = weights != 0"),
        ("a function applies if any group has it", "counts.any(axis=-2, keepdims=True)", "counts.any(axis=tuple(range(counts.ndim - 1)), keepdims=True)"),
        ("dropped rows in the statistics", "valid & (row_weights != 0))", "valid)"),
    ],
    "objective/kl.py": [
        ("sign of k1", "    return log_probs - ref_log_probs\n", "    return ref_log_probs - log_probs\n"),
        ("k2 without the half", "0.5 * (log_probs", "1.0 * (log_probs"),
        ("direction of k3", "difference = ref_log_probs - log_probs", "difference = log_probs - ref_log_probs"),
        ("k3 without the -1", "bounded_exp(difference) - difference - 1.0", "bounded_exp(difference) - difference"),
        ("exponent unbounded", "jnp.exp(jnp.minimum(x, MAX_LOG_RATIO))", "jnp.exp(x)"),
        ("exact KL of the wrong distribution", "jnp.where(possible, jnp.exp(log_probs), 0)", "jnp.where(possible, jnp.exp(ref_log_probs), 0)"),
        ("controller pushes the wrong way", "1.0 + kl_adaptation", "1.0 - kl_adaptation"),
        ("controller not clipped", "jnp.clip(kl / kl_target - 1.0, -0.2, 0.2)", "kl / kl_target - 1.0"),
    ],
    "objective/surrogates.py": [
        ("clip on the wrong side", "-jnp.minimum(capped", "-jnp.maximum(capped"),
        ("sign of the clipped surrogate", "losses = -jnp.minimum(", "losses = jnp.minimum("),
        ("lower clip bound", "jnp.clip(ratios, 1.0 - clip_range,", "jnp.clip(ratios, 1.0 + clip_range,"),
        ("upper clip bound", "1.0 - clip_range, 1.0 + high)", "1.0 - clip_range, 1.0 + clip_range)"),
        ("delta on the wrong side", "jnp.minimum(ratios, delta)", "jnp.maximum(ratios, delta)"),
        ("dual clip for positive advantages", "jnp.where(advantages < 0, jnp.minimum(losses", "jnp.where(advantages > 0, jnp.minimum(losses"),
        ("cispo differentiates its weight", "jax.lax.stop_gradient(jnp.minimum(bounded_exp(log_ratios), cap))", "jnp.minimum(bounded_exp(log_ratios), cap)"),
        ("cispo without a cap", "jnp.minimum(bounded_exp(log_ratios), cap)", "bounded_exp(log_ratios)"),
        ("sapo's temperatures swapped", "jnp.where(advantages > 0, tau, tau_negative)", "jnp.where(advantages > 0, tau_negative, tau)"),
        ("sapo's slope at ratio 1", "-4.0 / taus", "-2.0 / taus"),
        ("gmpo clips the wrong side", "jnp.minimum(log_ratios, high), jnp.maximum(log_ratios, -log_clip_range)", "jnp.maximum(log_ratios, -log_clip_range), jnp.minimum(log_ratios, high)"),
        ("gmpo's mean over padding", "lengths = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1).astype(log_ratios.dtype)", "lengths = jnp.full(mask[:, :1].shape, mask.shape[1]).astype(log_ratios.dtype)"),
        ("sign of reinforce", "    return -advantages * log_probs\n", "    return advantages * log_probs\n"),
        ("exp before the mask", "    log_probs = jnp.where(mask, log_probs, 0)\n    differences", "    differences"),
        ("gradient into the old policy", "jax.lax.stop_gradient(jnp.where(mask, old_log_probs, 0))", "jnp.where(mask, old_log_probs, 0)"),
        ("sequence ratio not normalised", "jnp.sum(differences, axis=-1, keepdims=True) / lengths", "jnp.sum(differences, axis=-1, keepdims=True)"),
        ("sequence_token: gradient of the mean", "jax.lax.stop_gradient(_row_means(differences, mask))", "_row_means(differences, mask)"),
    ],
    "objective/losses.py": [
        ("sequence weights without B", "return counted / jnp.maximum(lengths, 1) / sizes.num_rows", "return counted / jnp.maximum(lengths, 1)"),
        ("token weights per row", "return counted / jnp.maximum(jnp.sum(lengths), 1)", "return counted / jnp.maximum(lengths, 1)"),
        ("constant weights by length", "(sizes.num_rows * sizes.max_length)", "(sizes.num_rows * lengths)"),
        ("sum over sequences, not mean", "return counted / sizes.num_rows\n", "return counted\n"),
        ("local weights not averaged", "jnp.maximum(per_row, 1) / slices", "jnp.maximum(per_row, 1)"),
        ("padding rows counted", "mask.shape[0] if num_sequences is None else jnp.maximum(num_sequences, 1)", "mask.shape[0]"),
        ("masked tokens in the loss", "jnp.where(mask & ~stale, surrogate", "jnp.where(~stale, surrogate"),
        ("stale sequences train", "jnp.where(mask & ~stale, surrogate", "jnp.where(mask, surrogate"),
        ("staleness of good sequences", "return (advantages < 0) &", "return (advantages > 0) &"),
        ("sign of the KL term", "loss = loss + kl_coef", "loss = loss - kl_coef"),
        ("KL weighed like the policy", "kl_coef * jnp.sum(penalty_weights * kls)", "kl_coef * jnp.sum(weights * kls)"),
        ("sign of the entropy bonus", "loss = loss - entropy_coef", "loss = loss + entropy_coef"),
        ("ratio correction dropped", "kls * bounded_exp(log_rho) if kl_ratio_corrected else kls", "kls"),
        ("gradient into the reference", "ref_log_probs = jax.lax.stop_gradient(jnp.where(mask, ref_log_probs, 0))", "ref_log_probs = jnp.where(mask, ref_log_probs, 0)"),
        ("gradient into advantages and weights", "= jax.lax.stop_gradient(\n        (old_log_probs, advantages[:, None], weights, penalty_weights)\n    )", "= (old_log_probs, advantages[:, None], weights, penalty_weights)"),
        ("clip fractions swapped", "clip_low=mean(clipped & (rho < 1))", "clip_low=mean(clipped & (rho > 1))"),
    ],
    "objective/shaping.py": [
        ("overlong penalty one buffer late", "(max_length - buffer - jnp", "(max_length - jnp"),
        ("KL penalty over padding", "jnp.where(mask, log_probs - ref_log_probs, 0)", "(log_probs - ref_log_probs)"),
        ("lowest entropies kept", "mask & (entropies >= descending[last])", "mask & (entropies <= descending[last])"),
        ("importance weights uncapped", "jnp.minimum(bounded_exp(difference), cap)", "bounded_exp(difference)"),
        ("importance weights inverted", "bounded_exp(difference), cap", "bounded_exp(-difference), cap"),
    ],
    "training/experience.py": [
        ("filled rows train", "jnp.asarray(rollout.mask) & live[:, None]", "jnp.asarray(rollout.mask)"),
        ("filled rows count", "num_sequences=int(live[part].sum())", "num_sequences=None"),
        ("truncated completions train", "return finished if recipe.mask_truncated else", "return"),
        ("truncated completions shift the baseline", "add_up(np.where(trains[:, None], scores, np.nan))", "add_up(scores)"),
        ("KL in the reward with the wrong sign", "penalty = -np.asarray(recipe.kl_coef", "penalty = np.asarray(recipe.kl_coef"),
        ("dead groups feel the KL", "base if recipe.kl_on_dead_groups else base * signal[part, None]", "base"),
        ("missing rewards of other groups count", "scores.reshape(-1, group_size or len(scores) or 1, len(weights))", "scores.reshape(-1, len(scores) or 1, len(weights))"),
        ("weights of the whole rollout", "np.split(np.arange(rows), num_minibatches)", "[np.arange(rows)]"),
    ],
    "training/dynamic_sampling.py": [
        ("a leftover group is lost", "range(count, live)", "range(count + 1, live)"),
        ("a group is used twice", "range(count, live)", "range(count - 1, live)"),
    ],
    "training/metrics.py": [
        ("slices averaged, not weighed", "share = tokens / jnp.maximum(jnp.sum(tokens), 1)", "share = jnp.ones_like(tokens) / tokens.shape[0]"),
    ],
    "policy/log_probs.py": [
        ("scored one token late", "return hidden[:, prompt_length - 1 :]", "return jnp.roll(hidden, -1, axis=1)[:, prompt_length - 1 :]"),
        ("sign of the entropy", "entropies = log_total - jnp.sum(", "entropies = log_total + jnp.sum("),
        ("gradient of the sampled token's logit", "(onehot - probs)", "-probs"),
        ("gradient of the entropy", "by_entropy * probs * surprise", "by_entropy * probs"),
        ("gradient into the reference's parameters", "    ref_params, ref_hidden = jax.lax.stop_gradient((ref_params, ref_hidden))\n", ""),
    ],
    "training/learner.py": [
        ("gradients of the last micro-batch", "return (jax.tree.map(jnp.add, total, grads), (loss, aux))", "return (grads, (loss, aux))"),
        ("non-finite updates applied", "jnp.where(finite & moving, new, old)", "jnp.where(moving, new, old)"),
        ("momentum moves without a gradient", "jnp.where(finite & moving, new, old)", "jnp.where(finite, new, old)"),
    ],
    "training/reference.py": [
        ("reference mixed the wrong way", "incremental_update(params, ref_params, alpha)", "incremental_update(ref_params, params, alpha)"),
        ("one equal parameter makes a reference", "jax.tree.reduce(jnp.logical_and, equal", "jax.tree.reduce(jnp.logical_or, equal"),
        ("a policy near its reference is it", "jnp.all(mine == theirs)", "jnp.allclose(mine, theirs)"),
        ("with adapters the base does not matter", "adds_nothing(params) & is_reference(frozen, ref_params)", "adds_nothing(params)"),
        ("adapters that add something do not matter", "adds_nothing(params) & is_reference(frozen, ref_params)", "is_reference(frozen, ref_params)"),
    ],
    "policy/lora.py": [
        ("scale upside down", "return self.alpha / self.rank", "return self.rank / self.alpha"),
        ("scale forgotten", "jnp.matmul(lora.scale * a, b", "jnp.matmul(a, b"),
        ("transposed where it should not be", "(delta.T if target.output_first else delta)", "(delta if target.output_first or delta.shape != kernel.shape[::-1] else delta.T)"),
        ("both factors start random", "jnp.zeros((lora.rank, target.outputs))", "jnp.ones((lora.rank, target.outputs))"),
        ("A starts by its rank", "bound = target.inputs ** (-0.5)", "bound = lora.rank ** (-0.5)"),
        ("one noise for all kernels", "zlib.crc32(target.module.encode())", "0"),
        ("the base is replaced", "merged.append(kernel + (", "merged.append(0 * kernel + ("),
        ("dropout is not made up for", "jnp.where(kept, a / (1.0 - lora.dropout), 0)", "jnp.where(kept, a, 0)"),
        ("keeps what it should drop", "bernoulli(_own_key(target, key), 1.0 - lora.dropout", "bernoulli(_own_key(target, key), lora.dropout"),
        ("dropout by number, not by row", "1.0 - lora.dropout, (target.inputs, 1))", "1.0 - lora.dropout, a.shape)"),
    ],
    "policy/decoding.py": [
        ("finished one token late", "finished=carry.finished.at[rows.row].set(done)", "finished=carry.finished.at[rows.row].set(rows.done)"),
        ("finished read from the mask", "finished=carry.finished)", "finished=~carry.mask[:, -1])"),
        ("finished of the wrong rows", "carry.finished.at[rows.row].set(done)", "carry.finished.at[: done.size].set(done)"),
    ],
    "rewards/answers/equality.py": [
        ("a tolerance for whole numbers", "if a.denominator == 1 and b.denominator == 1:", "if False:"),
        ("one whole number forbids a tolerance", "a.denominator == 1 and b.denominator == 1", "a.denominator == 1 or b.denominator == 1"),
        ("tolerance is absolute", "Fraction(tolerance) * abs(b)", "Fraction(tolerance)"),
        ("tolerance of what was given", "Fraction(tolerance) * abs(b)", "Fraction(tolerance) * abs(a)"),
    ],
}  # fmt: skip


def run_tests(package: Path, modules: tuple[str, ...]) -> tuple[bool, str]:
    """Runs test modules against the copy of the package: (whether all passed, the first failing test)."""
    paths = [f"tests/{Path(module).parent}/test_{Path(module).name}.py" for module in modules]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "--no-header", *paths]
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"pytest could not run {paths}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, failed[0].split(" - ")[0].removeprefix("FAILED ") if failed else ""


@contextlib.contextmanager
def copy_of_the_package():
    """Yields a directory with the package and its tests, which is gone afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        package = Path(directory)
        for part in ("grpo_jax", "tests"):
            shutil.copytree(ROOT / part, package / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", package)
        yield package


def check_unmutated(files: list[str]) -> tuple[bool, str]:
    """Runs every test module that holds one of the files, once: (whether all passed, the first failing test)."""
    with copy_of_the_package() as package:
        return run_tests(package, tuple(dict.fromkeys(module for file in files for module in TESTS[file])))


def check(file: str, name: str, old: str, new: str) -> tuple[str, str, bool, str, float]:
    """Tests one mutant in a copy of its own: (file, name, whether it survived, its first killer, seconds)."""
    started = time.perf_counter()
    with copy_of_the_package() as package:
        path = package / "grpo_jax" / file
        path.write_text(mutate(path.read_text(), old, new))
        passed, test = run_tests(package, TESTS[file])
    return file, name, passed, test, time.perf_counter() - started


def mutate(text: str, old: str, new: str) -> str:
    """Replaces the one place that the mutant means.

    The place is looked for in `ast.unparse` of the file, so comments, line breaks, trailing commas, the kind of
    quotes and parentheses that change nothing do not matter there. White space does not matter in `old` either.

    Returns:
        The unparsed file with the replacement.

    Raises:
        ValueError: the text does not occur exactly once.
    """
    plain = ast.unparse(ast.parse(text))
    tokens = re.findall(r"\w+|[^\w\s]", old)
    pattern = re.compile(r"\s*".join(map(re.escape, tokens)))
    count = len(pattern.findall(plain))
    if count != 1:
        raise ValueError(f"occurs {count} times, not once, in the unparsed file: {old!r}")
    return pattern.sub(lambda _: new.strip(), plain)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="text that the file or the name contains")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    chosen = [
        (file, *mutant)
        for file, mutants in MUTANTS.items()
        for mutant in mutants
        if arguments.only in f"{file} {mutant[0]}"
    ]
    files = list(dict.fromkeys(file for file, *_ in chosen))
    started = time.perf_counter()
    passed, test = check_unmutated(files)
    if not passed:
        sys.exit(f"a test fails without any mutation: {test}")
    print("| file | what is broken | killed by | s |\n|---|---|---|---|", flush=True)
    survivors = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for file, name, passed, test, seconds in pool.map(lambda mutant: check(*mutant), chosen):
            print(f"| {file} | {name} | {'SURVIVED' if passed else test} | {seconds:.0f} |", flush=True)
            survivors += [f"{file}: {name}"] if passed else []
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} mutants killed in {minutes:.0f} minutes")
    if survivors:
        sys.exit("survived: " + "; ".join(survivors))


if __name__ == "__main__":
    main()
