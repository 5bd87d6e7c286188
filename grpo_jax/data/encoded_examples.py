"""Examples with the tokens of their prompts. Each prompt is rendered and encoded once per run."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from grpo_jax.data.bad_rows import BadRow
from grpo_jax.models.loading import Model, encode
from grpo_jax.models.text import try_encode
from grpo_jax.types import Example

_AT_ONCE = 4096  # number of prompts that are held while they are encoded


class EncodedExamples(Sequence):
    """A sequence of examples, each with its `tokens`.

    The tokens are in one array, with 4 bytes each. The examples are not copied, so a task that makes its
    problems on request is not held in memory.

    Args:
        examples: N examples.
        tokens: the token ids of all prompts, one prompt after the other.
        ends: end of each prompt in `tokens`.
        rows: indices of the examples that are included, in this order. None means all.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokens: np.ndarray,
        ends: np.ndarray,
        rows: np.ndarray | None = None,
    ):
        self._examples = examples
        self._tokens = tokens
        self._ends = ends
        self._rows = np.arange(len(ends)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = int(self._rows[index])
        start = int(self._ends[row - 1]) if row else 0
        tokens = tuple(self._tokens[start : self._ends[row]].tolist())
        return replace(self._examples[row], tokens=tokens)

    def __eq__(self, other: object) -> bool:
        """Says whether the examples are equal, from which it follows that their tokens are."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(
            mine == theirs for mine, theirs in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]  # as Python's documentation has it

    @property
    def lengths(self) -> np.ndarray:
        """The token counts [N] of the prompts."""
        return np.diff(self._ends, prepend=0)[self._rows]

    def chosen(self, indices: Iterable[int]) -> "EncodedExamples":
        """Returns some of the examples, by index."""
        rows = self._rows[np.fromiter(indices, np.int64)]
        return EncodedExamples(self._examples, self._tokens, self._ends, rows)


def encode_examples(
    examples: Sequence[Example], model: Model, what: str
) -> tuple[EncodedExamples, list[BadRow]]:
    """Encodes every prompt.

    Args:
        examples: the examples. There may be none.
        model: model whose tokenizer encodes them.
        what: `training` or `evaluation`, for messages.

    Returns:
        (the examples that could be encoded, the others with the reasons).
    """
    tokens: list[np.ndarray] = []
    lengths: list[int] = []
    bad: list[BadRow] = []
    for start in range(0, len(examples), _AT_ONCE):
        part = [examples[i] for i in range(start, min(start + _AT_ONCE, len(examples)))]
        found = try_encode(model, [example.prompt for example in part], ["the prompt"] * len(part))
        for index, (example, result) in enumerate(zip(part, found, strict=True), start):
            if isinstance(result, ValueError):
                bad.append(BadRow(example.place or f"{what} prompt {index}", str(result)))
                result = []
            lengths.append(len(result))
            tokens.append(np.asarray(result, np.int32))
    flat = np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
    encoded = EncodedExamples(examples, flat, np.cumsum(lengths, dtype=np.int64))
    return encoded.chosen(np.flatnonzero(encoded.lengths)) if bad else encoded, bad


def tokens_of(model: Model, examples: Sequence[Example]) -> list[Sequence[int]]:
    """Returns the token ids of prompts, which are encoded only if that was not done before."""
    new = [i for i, example in enumerate(examples) if example.tokens is None]
    fresh = dict(zip(new, encode(model, [examples[i].prompt for i in new]) if new else [], strict=True))
    return [fresh[i] if example.tokens is None else example.tokens for i, example in enumerate(examples)]
