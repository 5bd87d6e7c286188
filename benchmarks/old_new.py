"""One working tree of this package against another: their step.py runs in turn, and each round gives a ratio.

    git worktree add --detach /tmp/old COMMIT
    python benchmarks/old_new.py /tmp/old --rows smallest first --rounds 5 --steps 10

The other tree begins in odd rounds and this one in even rounds, so a machine that slows down favours neither.
CPU seconds suffer less from other processes than seconds do.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from work import ROOT, ROWS, Work, environment, markdown_row, run_process

MEASURED = ("step", "generate", "score", "update", "cpu", "memory")


def time_tree(tree: Path, work: Work, steps: int) -> dict[str, float]:
    """Runs a tree's step.py once; returns seconds per phase, CPU seconds per step and peak bytes."""
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in vars(work).items()]
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        script = str(tree / "benchmarks" / "step.py")
        command = [sys.executable, script, *sizes, f"--steps={steps}", f"--json={file.name}"]
        _, peak = run_process(command, environment(PYTHONPATH=str(tree), JAX_PLATFORMS="cpu"))
        found = json.load(file)
    used = [step for step in found["steps"] if not step["compilations"]] or found["steps"]
    phases = {name: phase["median_s"] for name, phase in found["phases"].items()}
    return phases | {"cpu": statistics.median(step["cpu_s"] for step in used), "memory": peak}


def ratios(rounds: Sequence[tuple[dict[str, float], dict[str, float]]]) -> dict[str, list[float]]:
    """Returns this / other of every round (other, this), by what was measured: below 1 this needs less."""
    return {
        name: [this[name] / other[name] for other, this in rounds]
        for name in MEASURED
        if all(other.get(name) and name in this for other, this in rounds)
    }


def report(row: str, rounds: Sequence[tuple[dict[str, float], dict[str, float]]]) -> list[str]:
    """Returns the table's lines of one row: medians of each tree, and the ratios' median and range."""
    lines = []
    for name, values in ratios(rounds).items():
        other = statistics.median(each[name] for each, _ in rounds)
        this = statistics.median(each[name] for _, each in rounds)
        spread = f"{min(values):.3f} to {max(values):.3f}"
        lines.append(
            markdown_row(row, name, f"{other:.4g}", f"{this:.4g}", f"{statistics.median(values):.3f}", spread)
        )
    return lines


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("other", type=Path, help="the other working tree")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["smallest"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps to measure, after the first")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    arguments = parser.parse_args()
    trees = (arguments.other.resolve(), ROOT)
    measured = {}
    print(markdown_row("row", "measured", "other", "this", "this / other", "range"))
    print(markdown_row(*["---"] * 6), flush=True)
    for row in arguments.rows:
        rounds = []
        for number in range(arguments.rounds):
            order = trees if number % 2 == 0 else trees[::-1]
            found = {tree: time_tree(tree, ROWS[row], arguments.steps) for tree in order}
            rounds.append(tuple(found[tree] for tree in trees))
        measured[row] = rounds
        print("\n".join(report(row, rounds)), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
