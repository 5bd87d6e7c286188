"""The name that a misspelled one was probably meant to be."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """Returns the known name that is most like a word, for `did you mean ...?`.

    Args:
        word: what the user wrote.
        known: the names there are.
        likeness: least ratio of `difflib`, 0 to 1, at which a name counts.

    Returns:
        the name; `None` if none is like it.

    >>> nearest("adition", ["addition", "countdown"])
    'addition'
    """
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=likeness)), None)
