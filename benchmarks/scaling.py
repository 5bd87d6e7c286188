"""How a step grows: one size at a time is doubled, the others stay, each row is set against the one before.

    python benchmarks/scaling.py                                   # all five sizes, two doublings each
    python benchmarks/scaling.py --sizes prompt group --doublings 3 --json out.json

Where the FLOPs grow as the seconds do, a phase is bound by its matmuls; where the seconds grow less there is
a part that every row pays; where they grow more, something grows that is not counted.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from random_models import Shape
from work import Work, markdown_row, run_step

SHAPE = Shape(layers=4, width=256, heads=4, vocab=4096, positions=1024)
BASE = Work(model=str(SHAPE), prompt=32, completion=32, prompts=4, group=4)
SIZES = ("group", "prompt", "completion", "vocab", "layers")
PHASES = ("generate", "score", "update", "step")


def grown(size: str, factor: int) -> Work:
    """Returns the base with one of SIZES times a factor."""
    if size in ("vocab", "layers"):
        return replace(BASE, model=str(replace(SHAPE, **{size: factor * vars(SHAPE)[size]})))
    return replace(BASE, **{size: factor * vars(BASE)[size]})


def value_of(size: str, work: Work) -> int:
    """Returns a size of a work made by `grown`."""
    if size in ("vocab", "layers"):
        return vars(Shape(*map(int, work.model.split("x"))))[size]
    return vars(work)[size]


HEADER = ["size", "value", *(f"{name} s" for name in PHASES), "FLOPs", "peak MiB"]


def scaling_line(size: str, work: Work, now: dict[str, Any], before: dict[str, Any] | None) -> str:
    """Returns one line of the table: every number, and how many times the one before it is."""

    def cell(text: str, measure) -> str:
        return text if before is None else f"{text} ({measure(now) / measure(before):.2f}×)"

    cells = [size, value_of(size, work)]
    for name in PHASES:
        seconds = now["phases"][name]["median_s"]
        cells.append(cell(f"{seconds:.4f}", lambda result, name=name: result["phases"][name]["median_s"]))
    flops, memory = now["phases"]["step"]["flops"], now["memory"]["peak_rss"]
    cells.append(cell(f"{flops / 1e9:.1f} G", lambda result: result["phases"]["step"]["flops"]))
    cells.append(cell(f"{memory / 2**20:,.0f}", lambda result: result["memory"]["peak_rss"]))
    return markdown_row(*cells)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--doublings", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="steps after the first")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    arguments, options = parser.parse_known_args()
    print(f"{BASE}\n{markdown_row(*HEADER)}\n{markdown_row(*['---'] * len(HEADER))}", flush=True)
    base, results = run_step(BASE, *options, steps=arguments.steps), []
    for size in arguments.sizes:
        before = None
        for doubling in range(arguments.doublings + 1):
            work = grown(size, 2**doubling)
            now = base if doubling == 0 else run_step(work, *options, steps=arguments.steps)
            results.append({"size": size, "value": value_of(size, work)} | now)
            print(scaling_line(size, work, now, before), flush=True)
            before = now
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
