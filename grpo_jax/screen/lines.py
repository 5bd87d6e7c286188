"""Lines that fit a terminal: what counts comes first, and what does not fit is left out."""

import re
import textwrap
from collections.abc import Sequence

Figures = Sequence[tuple[str, str]]  # (name, value), those that count most first

# The command at the end of a message, which has to be copied in one piece.
_COMMAND = re.compile(r"(?:^| )((?:wandb sync|pip install|python -m|grpo-jax) .*)$")


def clock_text(seconds: float) -> str:
    """Returns a duration as hours, minutes and seconds.

    >>> clock_text(3725.4)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def fit_items(items: Sequence[str], width: int) -> str:
    """Joins the first items that fit into a line.

    >>> fit_items(["step 1/9", "reward 0.5", "kl 0.01"], 24)
    'step 1/9  reward 0.5'
    """
    line = ""
    for item in items:
        longer = f"{line}  {item}" if line else item
        if len(longer) > width:
            break
        line = longer
    return line or items[0][:width]


def wrap_text(text: str, width: int) -> str:
    """Breaks lines between words, and indents what follows. A command at the end stays in one piece.

    >>> print(wrap_text("note: a line of words. Upload it with: wandb sync a/very/long/path", 24))
    note: a line of words.
      Upload it with:
      wandb sync a/very/long/path
    """
    return "\n".join(piece for line in text.split("\n") for piece in _wrap_line(line, width))


def _wrap_line(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip(" ")) + 2)
    found = _COMMAND.search(line)
    text = line[: found.start()] if found else line
    pieces = textwrap.wrap(
        text,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
    return [*pieces, indent + found[1]] if found else pieces
