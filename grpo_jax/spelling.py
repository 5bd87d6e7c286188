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
