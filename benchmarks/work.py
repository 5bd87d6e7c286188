"""The work that is timed: its sizes, its rows by name, its prompts and reward, and the least FLOPs it takes.

One GRPO step: G completions of each of N prompts, their log-probs under the reference, one AdamW update.
Imports neither JAX nor the package: who starts processes and compares them should itself be small.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Work:
    """Sizes of one step.

    Args:
        model: a name or five numbers of `random_models.parse_shape`, or a directory.
        prompt: S, tokens of every prompt.
        completion: T, the limit of a completion in tokens.
        prompts: N.
        group: G.
        kl_coef: of the k3 term; 0: no reference.
    """

    model: str = "mid"
    prompt: int = 32
    completion: int = 64
    prompts: int = 8
    group: int = 8
    kl_coef: float = 0.1

    @property
    def batch(self) -> int:
        """B = N * G."""
        return self.prompts * self.group

    def __str__(self) -> str:
        return f"{self.model}, {self.prompts} × {self.group}, {self.prompt} + {self.completion} tokens"


# The rows of the comparison.
ROWS = {
    "first": Work(),
    "prompt256": Work(prompt=256),
    "124m": Work(model="124m", completion=32, prompts=2, group=4),
    "smallest": Work(model="small", prompt=16, completion=32, prompts=4),
    "memory": Work(model="124m", prompt=64, completion=128, prompts=4),
}


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --row, and one option for each field of Work that overrides it."""
    parser.add_argument("--row", choices=ROWS, default="first", help="sizes by name (default: first)")
    helps = {
        "model": "small, mid, 124m, LAYERSxWIDTHxHEADSxVOCABxPOSITIONS, or a directory",
        "prompt": "S, tokens of every prompt",
        "completion": "T, limit of a completion",
        "prompts": "N, prompts of a step",
        "group": "G, completions of a prompt",
        "kl_coef": "of the KL term; 0: no reference",
    }
    for name, text in helps.items():
        kind = type(getattr(Work(), name))
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=text)


def work_of(arguments: argparse.Namespace) -> Work:
    """Returns what the options of `add_work_arguments` say."""
    row = vars(ROWS[arguments.row])
    given = {name: getattr(arguments, name) for name in row}
    return Work(**{name: row[name] if value is None else value for name, value in given.items()})


# What is given to the model, and what it is rewarded for: as in the scripts that time TRL.


def prompt_rows(num_rows: int, length: int, seed: int = 0) -> list[str]:
    """Makes prompts of exactly `length` words, each one token of a model of `random_models`."""
    chooser = random.Random(seed)
    return [" ".join(f"t{chooser.randrange(90)}" for _ in range(length)) for _ in range(num_rows)]


def text_length(completions, **_) -> list[float]:
    """Rewards a completion with its length in characters modulo 7: cheap, and never the same for a group."""
    return [float(len(text) % 7) for text in completions]


# The least work.


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of one step, by phase."""

    generate: float
    score: float
    update: float

    @property
    def step(self) -> float:
        """All of it."""
        return self.generate + self.score + self.update


def forward_flops(
    lengths: Iterable[int], *, prompt: int, prompts: int, block: int, head: int, attention: int
) -> float:
    """Counts the matmuls of one pass over prompts and completions, each prompt run once.

    With M parameters in the blocks' matrices, V·D in the head, and A the width of all heads of all layers:

        2·M · (N·S + Σ_i (t_i - 1))                      the last token of a completion is never run
      + 2·V·D · Σ_i t_i                                  logits where a token is drawn, and only there
      + 4·A · (N·S(S+1)/2 + Σ_i (t_i - 1)(S + t_i/2))    each query with the keys that it sees: q·k, and w·v

    Norms, activations, softmax and everything else that is no matmul are not counted.

    Args:
        lengths: t_i, tokens of each completion.
        prompt: S.
        prompts: N.
        block: M.
        head: V·D.
        attention: A.
    """
    lengths = list(lengths)
    run = prompts * prompt + sum(t - 1 for t in lengths)
    seen = prompts * prompt * (prompt + 1) / 2 + sum((t - 1) * (prompt + t / 2) for t in lengths)
    return 2 * block * run + 2 * head * sum(lengths) + 4 * attention * seen


def step_flops(lengths: Sequence[int], *, reference: bool, **sizes: int) -> Flops:
    """Counts the least that one step must do.

    Generation is one pass (`forward_flops`), token by token. Scoring is one pass of the reference: the old
    log-probs of the only update come with the update. The update is three: forward, and backward twice that.
    Nothing is counted for recomputation, padding, or prompts run once per completion: they lower the share.
    """
    forward = forward_flops(lengths, **sizes)
    return Flops(generate=forward, score=forward if reference else 0.0, update=3 * forward)


# Processes.

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "XLA_FLAGS")


def environment(*, ours: bool = True, **changes: str) -> dict[str, str]:
    """Returns the environment of a timed process: every library is free to use every core.

    Args:
        ours: whether the package of this checkout is on the path.
        changes: variables to set.
    """
    kept = {name: value for name, value in os.environ.items() if name not in (*_THREADS, "PYTHONPATH")}
    return kept | {"HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(ROOT)} if ours else {}) | changes


def run_process(command: Sequence[str], env: dict[str, str]) -> tuple[str, int]:
    """Runs a command to its end; returns (stdout, peak of its resident memory in bytes).

    Raises:
        RuntimeError: it failed; with the end of what it wrote to stderr.
    """
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(list(command), env=env, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            tail = "".join(errors.readlines()[-20:])
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{tail}")
        return output.read(), usage.ru_maxrss * 1024


def run_step(work: Work, *options: str, steps: int, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs step.py in a process of its own; returns what it measured.

    Args:
        work: sizes of the step.
        options: further options of step.py.
        steps: to measure, after the first.
        env: environment; None: `environment()`.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        sizes = [f"--{name.replace('_', '-')}={value}" for name, value in vars(work).items()]
        script = str(ROOT / "benchmarks" / "step.py")
        command = [sys.executable, script, *sizes, f"--steps={steps}", f"--json={file.name}", *options]
        _, peak = run_process(command, environment() if env is None else env)
        return json.load(file) | {"process_peak": peak}


def markdown_row(*cells: Any) -> str:
    """Returns one line of a table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"
