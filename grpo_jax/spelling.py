"""Finds the name that was probably meant by a misspelled one."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """Returns the known name that is most like a word, for `did you mean ...?`.

    Args:
        word: the word that the user wrote.
        known: all names that exist.
        likeness: smallest similarity ratio of `difflib` at which a name counts, 0 to 1.

    Returns:
        the name, or `None` if no name is similar enough.

    >>> nearest("adition", ["addition", "countdown"])
    'addition'
    """
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=likeness)), None)


def suggest(
    word: str, known: Iterable[str], otherwise: str, *, likeness: float = 0.6, quote: str = "`"
) -> str:
    """Returns `did you mean ...?` with the nearest name, or another hint if no name is near.

    Args:
        word: what the user wrote.
        known: the names there are.
        otherwise: the other hint, such as a list of the names.
        likeness: least ratio at which a name counts, as in `nearest`.
        quote: the mark around the name, that of the rest of the message.

    >>> suggest("adition", ["addition", "countdown"], "the tasks are addition and countdown")
    'did you mean `addition`?'
    """
    near = nearest(word, known, likeness=likeness)
    return otherwise if near is None else f"did you mean {quote}{near}{quote}?"
