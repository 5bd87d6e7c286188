"""The text of an error in one line."""


def one_line(error: Exception | str, *, limit: int | None = 300) -> str:
    """Returns the text of an error without line breaks, or the name of its type if it has no text.

    Args:
        error: the error, or its text.
        limit: largest number of characters. A longer text is truncated. None means no limit.

    >>> one_line("no space\\nleft on device", limit=12)
    'no space ...'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if limit is None or len(text) <= limit else f"{text[: limit - 3]}..."
