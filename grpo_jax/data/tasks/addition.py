"""Addition after solved examples, for models that only continue: `Q: What is 2 + 5?\\nA:` -> ` 7`."""

import hashlib

from grpo_jax.data.tasks.task import Task, check_argument_ranges
from grpo_jax.types import Example

MAX_PAIRS = 4096  # unordered pairs of operands that are used at most, for any number of digits
MAX_HELD_OUT = 256  # unordered pairs that are held out at most


def _number(text: str) -> int:
    """Returns a fixed pseudo-random number of a text, the same in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _pairs(digits: int) -> list[tuple[int, int]]:
    """Returns the unordered pairs a <= b of the task, in a fixed pseudo-random order."""
    low, high = (0, 10) if digits == 1 else (10 ** (digits - 1), 10**digits)
    size = high - low
    if size * (size + 1) // 2 <= MAX_PAIRS:
        pairs = [(a, b) for a in range(low, high) for b in range(a, high)]
        return sorted(pairs, key=lambda pair: _number(f"{pair[0]}+{pair[1]}"))
    sampled: dict[tuple[int, int], None] = {}
    index = 0
    while len(sampled) < MAX_PAIRS:
        a, b = (low + _number(f"{digits} digits, pair {index}, {side}") % size for side in "ab")
        sampled[min(a, b), max(a, b)] = None
        index += 1
    return list(sampled)


def split_problems(digits: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Splits the additions of two numbers with this many digits into training and held-out problems.

    A sum and its commuted twin are one fact, so both are in the same split. With one digit there are 55 pairs
    of numbers from 0 to 9, of which 20 are held out. With more than two digits, a fixed sample is used.

    Returns:
        (train, held_out): ordered pairs (a, b), disjoint. Any prefix of held_out is a random sample.
    """
    pairs = _pairs(digits)
    count = min(MAX_HELD_OUT, len(pairs) * 4 // 11)

    def ordered(pairs):
        both = dict.fromkeys(twin for a, b in pairs for twin in ((a, b), (b, a)))
        return sorted(both, key=lambda pair: _number(f"{pair[0]}+{pair[1]}="))

    return ordered(pairs[count:]), ordered(pairs[:count])


def _prompt(problem: tuple[int, int], train: list[tuple[int, int]], shots: int) -> str:
    """Returns a prompt of solved training problems, never the problem or its twin, and then the problem."""
    a, b = problem
    chosen: list[tuple[int, int]] = []
    used = {frozenset(problem)}
    attempt = 0
    while len(chosen) < shots:
        shot = train[_number(f"{a}+{b}, shot {attempt}") % len(train)]
        attempt += 1
        if frozenset(shot) not in used:
            used.add(frozenset(shot))
            chosen.append(shot)
    solved = "".join(f"Q: What is {x} + {y}?\nA: {x + y}\n\n" for x, y in chosen)
    return f"{solved}Q: What is {a} + {b}?\nA:"


_RANGES = (
    ("digits", lambda x: 1 <= x <= 9, "1 to 9"),
    ("shots", lambda x: 0 <= x <= 16, "0 to 16"),
)


def make_addition(*, digits: int = 1, shots: int = 4) -> Task:
    """Builds the task with the column `answer`. The first number of the completion must equal it.

    Args:
        digits: number of digits of each operand, 1 to 9. With 1, operands are 0 to 9.
        shots: number of solved examples in every prompt, 0 to 16. They come from the training problems.
    """
    check_argument_ranges({"digits": digits, "shots": shots}, _RANGES)
    train, held_out = split_problems(digits)

    def examples(problems):
        return [Example(_prompt((a, b), train, shots), {"answer": str(a + b)}) for a, b in problems]

    rewards = ("numeric_answer",)
    arguments = {"numeric_answer": {"which": "first"}}
    return Task("addition", examples(train), examples(held_out), rewards, arguments)
