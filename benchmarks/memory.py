"""Peak memory of one step against what the plan predicts, for each setting that trades memory for time.

    python benchmarks/memory.py                               # row `memory`: 124m, 4 × 8, 64 + 128 tokens
    python benchmarks/memory.py --row first --steps 1
    python benchmarks/memory.py --setting "--training.num_microbatches 4" --setting "--training.batch_size 32"

Each setting runs in a fresh process, with every program in the compilation cache. From its peak of resident
memory that before the model (the interpreter and its libraries) is taken off, and the rest is set against the
plan. On an accelerator the device's own peak is taken instead.
"""

import argparse
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from work import Work, add_work_arguments, markdown_row, run_step, work_of

# key of a config -> values to compare, the rest as it is
SWEEPS: dict[str, tuple[Any, ...]] = {
    "training.num_microbatches": (1, 2, 4, 8),
    "model.remat": ("dots", "full"),
}


def default_settings(batch: int) -> Iterator[list[str]]:
    """Yields options of a config, one setting each: those of SWEEPS that a batch divides into."""
    for key, values in SWEEPS.items():
        for value in values:
            if key != "training.num_microbatches" or batch % value == 0:
                yield [f"--{key}={value}"]


def measured_bytes(result: dict[str, Any]) -> int:
    """Returns the peak that the plan's total stands for."""
    memory = result["memory"]
    return memory["device_peak"] or memory["peak_rss"] - memory["rss_before_model"]


HEADER = ["setting", "peak MiB", "without libraries", "plan MiB", "measured / plan", "step s"]


def setting_line(setting: list[str], result: dict[str, Any]) -> str:
    """Returns one line of the table."""
    memory, measured = result["memory"], measured_bytes(result)
    return markdown_row(
        " ".join(option.removeprefix("--") for option in setting),
        f"{memory['peak_rss'] / 2**20:,.0f}",
        f"{measured / 2**20:,.0f}",
        f"{memory['plan'] / 2**20:,.0f}",
        f"{measured / memory['plan']:.2f}",
        f"{result['phases']['step']['median_s']:.2f}",
    )


def measure(work: Work, setting: list[str], steps: int) -> dict[str, Any]:
    """Runs one setting; a second time if it had to compile, which takes memory that a later run does not."""
    result = run_step(work, *setting, steps=steps)
    if result["first"]["cache"]["misses"]:
        result = run_step(work, *setting, steps=steps)
    return result


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_work_arguments(parser)
    parser.set_defaults(row="memory")
    parser.add_argument("--setting", action="append", help="options of a config; may be given several times")
    parser.add_argument("--steps", type=int, default=1, help="steps after the first")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    arguments = parser.parse_args()
    work = work_of(arguments)
    settings = [shlex.split(text) for text in arguments.setting or ()] or list(default_settings(work.batch))
    print(f"{work}\n{markdown_row(*HEADER)}\n{markdown_row(*['---'] * len(HEADER))}", flush=True)
    results = []
    for setting in settings:
        results.append(measure(work, setting, arguments.steps) | {"setting": setting})
        print(setting_line(setting, results[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
