"""Asks math-verify (extra `math`) whether two texts give the same mathematics."""

import re
import threading

_MATH_SECONDS = 5  # time limit of math-verify for one text, where it can set one


def load_math_verify():
    """Imports math-verify, which decides whether two expressions are equal.

    Raises:
        ImportError: it is not installed. The message says how to install it.
    """
    try:
        import math_verify
    except ImportError as error:
        raise ImportError(
            f'comparing expressions needs the package math-verify ({error}): pip install "grpo-jax[math]"'
        ) from None
    return math_verify


def math_equal(text: str, answer: str) -> bool | None:
    r"""Says whether a text gives the expected answer as mathematics, such as ``\frac{1}{2}`` for ``0.5``.

    Args:
        text: a completion. math-verify looks for LaTeX (``\boxed{}`` first) and plain expressions in it.
        answer: the expected answer, plain, in ``$...$``, or in a ``\boxed{}``.

    Returns:
        whether they are equal, or `None` if math-verify finds no mathematics in the expected answer.
    """
    math_verify = load_math_verify()
    # Its time limits are alarms, which only the main thread may set. In other threads, the reward's timeout
    # limits it.
    seconds = _MATH_SECONDS if threading.current_thread() is threading.main_thread() else None
    if not re.search(r"\$|\\boxed|\\\(|\\\[", answer):  # it reads LaTeX only in an environment
        answer = f"\\boxed{{{answer}}}"
    expected = math_verify.parse(answer, parsing_timeout=seconds)
    if not expected:
        return None
    given = math_verify.parse(text, parsing_timeout=seconds)
    return bool(math_verify.verify(expected, given, timeout_seconds=seconds))
