"""The task Countdown: reach a target with a few numbers, each used at most once. It is always possible."""

import hashlib
import random
from dataclasses import dataclass
from fractions import Fraction

from grpo_jax.data.tasks.task import Task, check_argument_ranges
from grpo_jax.types import Example

_ATTEMPTS = 100  # problems that are generated at most per problem that is wanted


@dataclass(frozen=True)
class Problem:
    """The numbers in the order in which they are shown, the target, and one solution."""

    numbers: tuple[int, ...]
    target: int
    solution: str

    @property
    def key(self) -> str:
        """A name of the problem that does not depend on the order of its numbers."""
        return f"{sorted(self.numbers)} -> {self.target}"


def _make_problem(rng: random.Random, num_numbers: int, max_number: int) -> Problem | None:
    """Combines random numbers by random operations. Returns None if a step is not a positive whole number."""

    def below(n: int) -> int:
        return int(rng.random() * n)  # `random` alone gives the same numbers in every version of Python

    numbers = [1 + below(max_number) for _ in range(num_numbers)]
    terms = [(Fraction(number), str(number)) for number in numbers]
    while len(terms) > 1:
        (a, left), (b, right) = (terms.pop(below(len(terms))) for _ in range(2))
        sign = "+-*/"[below(4)]
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
        if value <= 0 or value.denominator != 1:
            return None
        terms.append((value, f"({left} {sign} {right})"))
    value, solution = terms[0]
    return Problem(tuple(numbers), int(value), solution[1:-1])


def generate_problems(*, count: int, num_numbers: int, max_number: int, max_target: int) -> list[Problem]:
    """Generates different problems, the same ones in every run, in a fixed pseudo-random order.

    Raises:
        ValueError: there are not enough such problems, or they are too rare.
    """
    rng = random.Random(0)
    problems: dict[str, Problem] = {}
    for _ in range(_ATTEMPTS * count):
        problem = _make_problem(rng, num_numbers, max_number)
        if problem and problem.target <= max_target and problem.target not in problem.numbers:
            problems.setdefault(problem.key, problem)
            if len(problems) == count:
                return sorted(problems.values(), key=lambda p: hashlib.sha256(p.key.encode()).digest())
    raise ValueError(
        f"data.task_arguments: only {len(problems)} of {count} countdown problems (size + held_out) were "
        "found; lower these or raise max_number, max_target or num_numbers"
    )


_RANGES = (
    ("num_numbers", lambda x: 2 <= x <= 6, "2 to 6"),
    ("max_number max_target size", lambda x: x >= 1, "at least 1"),
    ("held_out", lambda x: x >= 0, "0 or more"),
)


def make_countdown(
    *,
    num_numbers: int = 3,
    max_number: int = 25,
    max_target: int = 100,
    size: int = 4096,
    held_out: int = 512,
) -> Task:
    """Builds the task with the columns `numbers`, `target` and one `solution`.

    Args:
        num_numbers: number of numbers in a problem, 2 to 6. Its solution uses all of them.
        max_number: largest of these numbers. The smallest is 1.
        max_target: largest target. The smallest is 1.
        size: number of training problems.
        held_out: number of held-out problems. No problem appears in both splits, not even with its numbers
            reordered.
    """
    arguments = {
        "num_numbers": num_numbers,
        "max_number": max_number,
        "max_target": max_target,
        "size": size,
        "held_out": held_out,
    }
    check_argument_ranges(arguments, _RANGES)
    problems = generate_problems(
        count=size + held_out, num_numbers=num_numbers, max_number=max_number, max_target=max_target
    )
    examples = [_example(problem) for problem in problems]
    return Task("countdown", examples[held_out:], examples[:held_out], ("countdown",))


def _example(problem: Problem) -> Example:
    shown = ", ".join(map(str, problem.numbers))
    prompt = (
        f"Use the numbers {shown}, each at most once, with + - * / and parentheses to make "
        f"{problem.target}.\nExpression:"
    )
    columns = {"numbers": list(problem.numbers), "target": problem.target, "solution": problem.solution}
    return Example(prompt, columns)
