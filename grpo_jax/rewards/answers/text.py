r"""Removes from an answer what LaTeX, Markdown and typography put around its content.

`\boxed{18\,\text{dollars}}`, `**18 dollars**` and `$18$ dollars` are one answer. `equality.py` decides
whether two cleaned answers are equal. Every pattern runs in linear time, because the texts come from a model.
"""

import re

MAX_CHARACTERS = 1000  # limit for cleaning: a longer answer is compared unchanged

_DASHES = dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d", "-")
_SPACES = dict.fromkeys(
    "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "
)
_NOTHING = dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", "")
_WIDE = {chr(0xFF10 + digit): str(digit) for digit in range(10)}
_SIGNS = {
    "~": " ", "×": "*", "⋅": "*", "·": "*", "∙": "*", "÷": "/", "⁄": "/", "∕": "/", "∶": ":", "％": "%",
    "，": ",", "°": r"^\circ ", "º": r"^\circ ", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ",
    "∅": r"\emptyset ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "ℝ": r"\mathbb{R}", "√": r"\sqrt ",
    "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3",
    "⅔": " 2/3", "⅛": " 1/8", "⅜": " 3/8", "⅝": " 5/8", "⅞": " 7/8", "⅕": " 1/5", "⅖": " 2/5", "⅗": " 3/5",
    "⅘": " 4/5", "⅙": " 1/6", "⅚": " 5/6",
}  # fmt: skip
_CHARACTERS = str.maketrans(_DASHES | _SPACES | _NOTHING | _WIDE | _SIGNS)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")

CURRENCY = "\u00a4"  # stands for the dollar, because `$` also marks mathematics in LaTeX
_COMMAND = re.compile(r"\\(?:\\|[A-Za-z]+\*?|.)", re.S)
_COMMANDS = {
    r"\!": "", r"\,": " ", r"\;": " ", r"\:": " ", r"\>": " ", "\\ ": " ", "\\\n": " ", r"\quad": " ",
    r"\qquad": " ", r"\enspace": " ", r"\thinspace": " ", r"\space": " ", r"\displaystyle": " ",
    r"\textstyle": " ", r"\limits": "", r"\left": "", r"\right": "", r"\middle": "", r"\big": "",
    r"\Big": "", r"\bigl": "", r"\bigr": "", r"\Bigl": "", r"\Bigr": "", r"\bigg": "", r"\Bigg": "",
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\leq": r"\le", r"\leqslant": r"\le",
    r"\geq": r"\ge", r"\geqslant": r"\ge", r"\lt": "<", r"\gt": ">", r"\neq": r"\ne", r"\cdot": "*",
    r"\times": "*", r"\ast": "*", r"\div": "/", r"\%": "%", r"\$": CURRENCY, r"\#": "#", r"\&": "&",
    r"\_": "_", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\degree": r"^\circ", r"\varnothing": r"\emptyset",
    r"\infin": r"\infty", r"\lvert": "|", r"\rvert": "|", r"\vert": "|", r"\mid": "|", r"\langle": "(",
    r"\rangle": ")", r"\ldots": "...", r"\dots": "...", r"\cdots": "...", r"\rm": " ", r"\bf": " ",
    r"\it": " ", r"\(": "$", r"\)": "$", r"\[": "$", r"\]": "$", r"\lor": " or ", r"\land": " and ",
    r"\bar": r"\overline", r"\colon": ":", r"\bmatrix": r"\pmatrix", r"\dollar": CURRENCY,
}  # fmt: skip
_WORDS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textup|textnormal|texttt|textsf|mathrm|mathbf|mathit|mathsf|mathtt|mathnormal|boldsymbol|bm"
    r"|mbox|hbox|operatorname|emph|underline|unit|fbox|framebox|boxed)\s*\{([^{}]*)\}"
)
_WRAPPERS = (
    ("**", "**"),
    ("__", "__"),
    ("$$", "$$"),
    ("$", "$"),
    ("`", "`"),
    ('"', '"'),
    ("'", "'"),
    ("*", "*"),
)
_LEAD = re.compile(
    r"[*_]{0,2}(?:(?:so|thus|hence|therefore|finally)\b[, ]*)?(?:the |my |our )?(?:final |correct )?"
    r"(?:answer|ans|result|solution)\s*(?:is\s*:?|are\s*:?|=|:|would be)[*_]{0,2}:?\s*",
    re.I,
)
_LAST_MATHS = re.compile(r"\b(?:is|are|equals|be)\s*:?\s*\$([^$]{1,200})\$\s*\.?\s*$")
_LAST_WORDS = re.compile(r"\banswer is\s*:?\s*([^\n]{1,100})$", re.I)


def clean_answer(text: str) -> str:
    r"""Returns an answer without the formatting of its content.

    It removes the wrappers ``$ $``, ``\( \)``, ``\[ \]``, ``** **``, quotes and backticks, sizes such as
    ``\left``, a full stop at the end, and commands such as ``\text{}`` around words. Spaces of every kind
    become one plain space, and Unicode signs become their ASCII or LaTeX form. A dollar becomes the sign ¤.

    >>> clean_answer(r"$18\,\text{cm}$."), clean_answer("**\u22123**")
    ('18 cm', '-3')
    """
    if len(text) > MAX_CHARACTERS:
        return text.strip()
    text = re.sub(r"\\+$", "", text.strip())  # the rest of a space `\ ` at the end
    text = _RAISED.sub(lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
    text = text.translate(_CHARACTERS).replace("{,}", ",")
    for _ in range(4):  # commands may be nested
        text, changed = _WORDS.subn(r" \1 ", text)
        if not changed:
            break
    text = _COMMAND.sub(lambda match: _COMMANDS.get(match[0], match[0]), text)
    text = re.sub(r"\\(begin|end)\{[bBvp]?(?:matrix|array)\}(?:\{[clr|]*\})?", _matrix, text)
    text = re.sub(r"(?<![0-9A-Za-z)}])\*\*|\*\*(?![0-9A-Za-z({])", "", text)
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", _dollars(_unwrap(text))).strip()


def _matrix(match: re.Match) -> str:
    # \begin{vmatrix} is a determinant, so it is kept.
    return match[0] if "{v" in match[0] else f"\\{match[1]}{{matrix}}"


def _unwrap(text: str) -> str:
    """Removes wrappers of the whole text, and punctuation at its end, until there are none."""
    for _ in range(8):
        before = text
        text = text.strip().rstrip(".,;:") if not text.endswith("...") else text.strip()
        for start, end in _WRAPPERS:
            inside = text[len(start) : -len(end)]
            if text.startswith(start) and text.endswith(end) and inside and start not in inside:
                text = inside
        if text.startswith("{") and text.endswith("}") and "}" not in text[1:-1]:
            text = text[1:-1]
        if text == before:
            break
    return text


def _dollars(text: str) -> str:
    """Marks the dollar of an amount such as `$18`, and removes the `$` of LaTeX, which come in pairs."""
    if text.count("$") % 2:
        text = re.sub(r"\$(?= ?[-+]?\.?[0-9])", CURRENCY, text, count=1)
        if CURRENCY not in text:
            text = re.sub(r"(?<=[0-9]) ?\$$", CURRENCY, text)
    return text.replace("$", "")


def without_lead(text: str) -> str:
    """Returns an answer without words such as `The answer is` before it.

    >>> without_lead("The final answer is: 18.")
    '18.'
    """
    text = text.strip()
    return text[match.end() :] if (match := _LEAD.match(text)) and match.end() < len(text) else text


def stated_answer(text: str) -> str | None:
    """Returns the answer that a sentence or a solution states at its end, or `None` if it states none.

    Args:
        text: a text that may end in `... is $18$.` or in `... the answer is 18.`.

    >>> stated_answer("Then $2x=36$, so the price is $18$.")
    '18'
    """
    text = text.strip()
    match = _LAST_MATHS.search(text[-300:]) or _LAST_WORDS.search(text[-150:])
    return None if match is None else match[1].strip()


def for_math(text: str) -> str:
    r"""Returns a cleaned answer as LaTeX for math-verify."""
    return clean_answer(text).replace("*", r"\cdot ").replace(CURRENCY, "")
