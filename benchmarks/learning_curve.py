"""The claim of learning: the main job for several seeds, its end points as a table, its curve as a picture.

    python benchmarks/learning_curve.py --seeds 0 1 2 --out benchmarks/learning_curve.png
    python benchmarks/learning_curve.py --finished full=runs/a lora=runs/b --out curve.png

Every run is the README's command with another seed, in a process of its own, timed from start to exit.
Needs the `notebooks` extra (matplotlib).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path


def run(config: str, seed: int, run_dir: Path, cold: bool, overrides: list[str]) -> tuple[list[dict], float]:
    """Trains once; returns (rows of metrics.jsonl, seconds from command to exit)."""
    environment = dict(os.environ)
    if cold:  # an empty compilation cache: what a fresh machine does
        environment["JAX_COMPILATION_CACHE_DIR"] = str(run_dir / "xla")
    command = [sys.executable, "-m", "grpo_jax.train", "--config", config, "--run_dir", str(run_dir)]
    started = time.perf_counter()
    seeded = [*command, "--training.seed", str(seed), *overrides]
    subprocess.run(seeded, check=True, env=environment, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    return read_rows(run_dir), seconds


def read_rows(run_dir: Path) -> list[dict]:
    """Returns the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def accuracies(rows: list[dict]) -> list[tuple[int, float, float]]:
    """Returns (step, greedy accuracy, sampled accuracy) of every held-out evaluation, in order."""
    evaluations = [row for row in rows if "eval/greedy_accuracy" in row]
    sampled = next(name for name in evaluations[0] if name.startswith("eval/mean@"))
    return [(row["step"], row["eval/greedy_accuracy"], row[sampled]) for row in evaluations]


def finished(text: str) -> tuple[str, Path]:
    """Reads LABEL=RUN_DIR."""
    label, found, directory = text.partition("=")
    if not (label and found and (Path(directory) / "metrics.jsonl").is_file()):
        raise argparse.ArgumentTypeError(f"{text!r}: LABEL=RUN_DIR, a directory with metrics.jsonl")
    return label, Path(directory)


def table(results: dict[str, tuple[list[dict], float | None]]) -> str:
    """Returns the end points as Markdown."""
    lines = [
        "| run | greedy before | sampled before | greedy after | sampled after | KL at the end | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (rows, seconds) in results.items():
        (_, *first), *_, (_, *last) = accuracies(rows)
        kl = [row["kl"] for row in rows if "kl" in row][-1]
        lines.append(
            f"| {name} | {first[0]:.1%} | {first[1]:.1%} | {last[0]:.1%} | {last[1]:.1%} "
            f"| {kl:.3f} | {'–' if seconds is None else f'{seconds:.0f}'} |"
        )
    return "\n".join(lines)


def draw(results: dict[str, tuple[list[dict], float | None]], path: Path) -> None:
    """Draws training reward and held-out accuracy against the update."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, (rows, _) in results.items():
        rewards = [(row["step"], row["reward"]) for row in rows if "reward" in row]
        left.plot(*zip(*rewards, strict=True), linewidth=0.8, label=name)
        steps, greedy, sampled = zip(*accuracies(rows), strict=True)
        line = right.plot(steps, sampled, "o-", label=f"sampled, {name}")
        right.plot(steps, greedy, "s--", color=line[0].get_color(), alpha=0.5, label=f"greedy, {name}")
    left.set(title="reward of training rollouts", xlabel="update")
    right.set(title="accuracy on held-out problems", xlabel="update")
    for axes in (left, right):
        axes.set_ylim(0, 1.02 * max(1.0, axes.get_ylim()[1] / 1.05))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="configs/grpo_config.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/learning_curve"), help="must not exist yet")
    parser.add_argument("--out", type=Path, help="PNG to write")
    parser.add_argument("--finished", type=finished, nargs="+", help="LABEL=RUN_DIR: trains nothing")
    parser.add_argument("--cold", action="store_true", help="start each run with an empty compilation cache")
    arguments, overrides = parser.parse_known_args()
    results = {}
    if arguments.finished:
        results = {label: (read_rows(run_dir), None) for label, run_dir in arguments.finished}
        print(table(results))
    else:
        arguments.runs.mkdir(parents=True)
        for seed in arguments.seeds:
            directory = arguments.runs / f"seed_{seed}"
            results[f"seed {seed}"] = run(arguments.config, seed, directory, arguments.cold, overrides)
            print(table(results), flush=True)
    if arguments.out:
        draw(results, arguments.out)


if __name__ == "__main__":
    main()
