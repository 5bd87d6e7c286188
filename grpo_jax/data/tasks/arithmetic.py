"""Two-digit addition: `12+34=` -> `46`, with a held-out split that depends on the problems alone."""

import hashlib

from grpo_jax.data.tasks.task import Task
from grpo_jax.types import Example

OPERANDS = range(10, 100)
NUM_HELD_OUT = 512


def _rank(a: int, b: int) -> bytes:
    """Returns the rank of a problem in a fixed pseudo-random order, the same in every run."""
    return hashlib.sha256(f"{a}+{b}".encode()).digest()


def split_problems() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Splits the 8100 two-digit additions into training and held-out problems.

    A sum and its commuted twin are one fact. So pairs a < b are held out in both orders, and no held-out
    problem occurs in training in either order.

    Returns:
        (train, held_out): 7588 and 512 pairs (a, b), disjoint. Any prefix of held_out is a random sample.
    """
    pairs = sorted(((a, b) for a in OPERANDS for b in OPERANDS if a < b), key=lambda pair: _rank(*pair))
    held_out = [twin for a, b in pairs[: NUM_HELD_OUT // 2] for twin in ((a, b), (b, a))]
    held_out.sort(key=lambda pair: _rank(*pair))
    excluded = set(held_out)
    train = [(a, b) for a in OPERANDS for b in OPERANDS if (a, b) not in excluded]
    return train, held_out


def make_arithmetic() -> Task:
    """Builds the task with the prompt `a+b=`, the column `answer` and a reward for an exact match."""

    def examples(problems: list[tuple[int, int]]) -> list[Example]:
        return [Example(f"{a}+{b}=", {"answer": str(a + b)}) for a, b in problems]

    train, held_out = split_problems()
    return Task("arithmetic", examples(train), examples(held_out), ("exact_match",))
