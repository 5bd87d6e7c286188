"""Every recipe learns: held-out accuracy of the packaged model before and after 100 updates.

    python benchmarks/learning_table.py --out recipes.png

One seed each; everything but `algorithm.name` is configs/grpo_config.yaml, with the recipe's own numbers.
Needs the `notebooks` extra (matplotlib) for the picture.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import yaml
from learning_curve import accuracies, read_rows

from grpo_jax import RECIPES

ROOT = Path(__file__).parent.parent


def run(name: str, directory: Path, steps: int, seed: int) -> list[dict]:
    """Trains one recipe; returns the rows of metrics.jsonl."""
    config = yaml.safe_load((ROOT / "configs" / "grpo_config.yaml").read_text())
    config["algorithm"] = {"name": name, "group_size": config["algorithm"]["group_size"]}
    config["training"] |= {"num_steps": steps, "seed": seed}
    config["run_dir"] = str(directory / name)
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "grpo_jax.train", "--config", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_rows(directory / name)


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Draws the reward of the training rollouts, a mean over ten updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for number, (name, rows) in enumerate(results.items()):
        rewards = [row["reward"] for row in rows if "reward" in row]
        means = [sum(rewards[i : i + 10]) / len(rewards[i : i + 10]) for i in range(0, len(rewards), 10)]
        axes.plot(
            range(10, 10 * len(means) + 1, 10),
            means,
            color=f"C{number}",
            ls="-" if number < 10 else "--",
            label=name,
        )
    axes.set(xlabel="update", ylabel="reward of training rollouts", ylim=(0.5, 1.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/learning_table"), help="must not exist yet")
    parser.add_argument("--out", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True)
    results = {}
    print("| recipe | greedy before | greedy after | sampled before | sampled after | gain in points |")
    print("|---|---|---|---|---|---|")
    for name in arguments.recipes:
        rows = results[name] = run(name, arguments.runs, arguments.steps, arguments.seed)
        (_, *first), *_, (_, *last) = accuracies(rows)
        shares = [share for pair in zip(first, last, strict=True) for share in pair]
        cells = [name, *(f"{share:.1%}" for share in shares), f"{100 * (last[1] - first[1]):+.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    if arguments.out:
        draw(results, arguments.out)


if __name__ == "__main__":
    main()
