"""Stop strings: the text of a completion ends where it first contains one of them.

Where a stop string ends has little to do with where a token ends: it may begin inside one token and end
inside another. So the search runs over bytes, by the automaton of Aho and Corasick (1975,
https://doi.org/10.1145/360825.360855). Its state is how much of which stop string the text now ends with.
The host computes beforehand what a token does to each state, in a table that decoding looks up.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from grpo_jax.models.token_texts import TokenTexts, token_texts

MATCH = -1  # the entry of a table for "the text now contains a stop string"


@dataclass(frozen=True, eq=False)
class Stops:
    """The stop strings of a model.

    Args:
        strings: the stop strings.
        included: whether texts keep the stop string that ended them.
        table: table int16 [states, V] of the search, see `stop_table`.
        unspellable: strings among them that no tokens of the model can write.
    """

    strings: tuple[str, ...]
    included: bool
    table: Array
    unspellable: tuple[str, ...] = ()

    def truncate(self, text: str) -> str:
        """Truncates a text at the stop string that ended it, right before it, or right after if included.

        That is the one that was complete first, the longest if several were. Characters behind it, which its
        last token may have, are dropped as well.
        """
        found = [(text.find(string) + len(string), -len(string)) for string in self.strings if string in text]
        if not found:
            return text
        end, length = min(found)
        return text[:end] if self.included else text[: end + length]


def make_stops(
    strings: Sequence[str], tokenizer: Any, *, vocab_size: int, source: str, included: bool = False
) -> Stops | None:
    """Makes stop strings ready for decoding.

    Args:
        strings: the stop strings, checked. If it is empty, there are none.
        tokenizer: the fast tokenizer of the model.
        vocab_size: number V of ids of the model.
        source: name of the model in messages.
        included: whether texts keep the stop string that ended them.

    Returns:
        the stop strings with their table, or None if there are none.

    Raises:
        ValueError: the tokenizer decodes in a way that cannot be followed.
    """
    strings = tuple(dict.fromkeys(strings))
    if not strings:
        return None
    texts = token_texts(tokenizer, vocab_size=vocab_size, source=source)
    table = stop_table(strings, texts)

    def can_be_spelled(string: str) -> bool:
        tokens = tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        # What encoding gives is one way to spell it. Only if that fails, all ways are tried.
        return string in texts.decode(tokens) or bool((stop_table([string], texts) == MATCH).any())

    unspellable = tuple(string for string in strings if not can_be_spelled(string))
    return Stops(strings=strings, included=included, table=jnp.asarray(table), unspellable=unspellable)


def stop_table(strings: Sequence[str], texts: TokenTexts) -> np.ndarray:
    """Computes what each token does to each state of the search.

    Args:
        strings: the stop strings, not empty.
        texts: the pieces that the V tokens add to a text.

    Returns:
        int16 [states, V], the state after a token, or MATCH if the text then contains a stop string. A
        completion begins in state 0. The states are padded to a power of two, at least 16, so that few
        programs are compiled.
    """
    return _Search([string.encode() for string in strings], texts).table()


def _byte_automaton(strings: Sequence[bytes]) -> np.ndarray:
    """Returns the automaton [A+1,256] with the state after a byte. State A is a match and stays one."""
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for string in strings:
        state = 0
        for byte in string:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                ends.append(False)
            state = children[state][byte]
        ends[state] = True
    moves = np.zeros((len(children) + 1, 256), np.int32)
    match = len(children)
    moves[match] = match
    # `fails` is the longest proper end of a state that is a state too. It is shorter, so its row is filled.
    fails = [0] * len(children)
    waiting = deque([0])
    while waiting:
        state = waiting.popleft()
        if state:
            ends[state] |= ends[fails[state]]
            moves[state] = moves[fails[state]]
        for byte, child in children[state].items():
            fails[child] = int(moves[fails[state], byte]) if state else 0
            waiting.append(child)
        for byte, child in children[state].items():
            moves[state, byte] = child
    return np.where(np.append(ends, True)[moves], match, moves)


# How far a text is, apart from the stop strings. Besides these two there are:
# ("begin", first, n): There is no text yet, and if `first` no token either. n characters may be stripped.
# ("part", low, high, n): Byte tokens have begun a character. n bytes are missing, the next in [low, high].
_TEXT = ("text",)  # There is text, and all characters are whole.
# A run of byte tokens is no UTF-8 any more. All of it is U+FFFD, until another token comes.
_BROKEN = ("broken",)


def _leading(byte: int) -> tuple | None:
    """Returns where a byte token that begins a character leads, or None if nothing begins with it."""
    if byte < 0x80:
        return _TEXT
    if not 0xC2 <= byte <= 0xF4:
        return None
    # Not every continuation may follow these four. Some would be too long, surrogates, or beyond Unicode.
    low, high = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}.get(
        byte, (0x80, 0xBF)
    )
    return ("part", low, high, 1 + (byte >= 0xE0) + (byte >= 0xF0))


class _Search:
    """The search through a text that comes in tokens. A state is (how far the text is, automaton state)."""

    def __init__(self, strings: Sequence[bytes], texts: TokenTexts):
        self.texts = texts
        self.moves = _byte_automaton(strings)
        self.match = len(self.moves) - 1
        self.silent = np.array([piece is None for piece in texts.later])
        self.ends: dict[tuple[bool, int, int], np.ndarray] = {}
        self.pieces: dict[tuple[bool, int], tuple] = {}

    def table(self) -> np.ndarray:
        """Visits every state that a text can reach, see `stop_table`."""
        numbers = {(("begin", True, self.texts.num_strips), 0): 0}
        waiting = deque(numbers)
        rows = []
        while waiting:
            state = waiting.popleft()
            codes, states = self._after_every_token(*state)
            for reached in states:
                if reached is not None and reached not in numbers:
                    numbers[reached] = len(numbers)
                    waiting.append(reached)
            ids = [MATCH if reached is None else numbers[reached] for reached in states]
            rows.append(np.where(self.silent, numbers[state], np.array(ids, np.int16)[codes]))
        table = np.zeros((max(16, 1 << (len(rows) - 1).bit_length()), len(self.silent)), np.int16)
        table[: len(rows)] = rows
        return table

    def _after_every_token(self, where: tuple, state: int) -> tuple[np.ndarray, list]:
        """Returns (codes [V], what each code means): the state after each token, None for a match."""
        first, strips = where[1:] if where[0] == "begin" else (False, 0)
        # A run of byte tokens that ends here is U+FFFD, which no stop string has.
        state_before = 0 if where[0] in ("part", "broken") else state
        ends, left = self._after_pieces(first, strips, state_before)
        codes = ends.copy()
        states: list = [*((_TEXT, i) for i in range(self.match)), None]
        if where[0] == "begin":
            # After a piece without any text, a beginning is still a beginning.
            codes = np.where(left < 0, ends, self.match + 1 + left)
            states += [(("begin", False, n), 0) for n in range(strips + 1)]
        for token, byte in self.texts.fallback.items():
            codes[token] = len(states)
            states.append(self._after_byte(where, state, byte))
        used, codes = np.unique(codes, return_inverse=True)
        return codes, [states[code] for code in used]

    def _after_byte(self, where: tuple, state: int, byte: int) -> tuple | None:
        """Returns the state after a byte token."""
        if where == _BROKEN:
            return (_BROKEN, 0)
        if where[0] == "part":
            _, low, high, missing = where
            if not low <= byte <= high:
                return (_BROKEN, 0)
            following = ("part", 0x80, 0xBF, missing - 1) if missing > 1 else _TEXT
        elif (following := _leading(byte)) is None:
            return (_BROKEN, 0)
        elif where[0] == "begin" and where[2] and bytes([byte]) == self.texts.strip:
            return (("begin", False, where[2] - 1), 0)
        state = int(self.moves[state, byte])
        return None if state == self.match else (following, state)

    def _after_pieces(self, first: bool, strips: int, state: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (the automaton's state after each token's piece [V], strips left [V]).

        The number of strips left is that of a piece without text. It is -1 where a piece has text.
        """
        if (first, strips) not in self.pieces:
            self.pieces[first, strips] = self._columns(first, strips)
        columns, order, left = self.pieces[first, strips]
        if (first, strips, state) not in self.ends:
            ends = np.full(len(order), state, np.int32)
            for column in columns:
                ends[: len(column)] = self.moves[ends[: len(column)], column]
            self.ends[first, strips, state] = ends[np.argsort(order)]
        return self.ends[first, strips, state], left

    def _columns(self, first: bool, strips: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Returns the pieces by the index of their bytes, the longest piece first.

        Returns:
            (for each index, the bytes of the pieces that reach it; order [V] of the tokens; strips left [V]).
        """
        pieces = []
        left = np.full(len(self.silent), -1)
        for token, shown in enumerate(self.texts.first if first else self.texts.later):
            piece = shown or b""
            remaining = strips
            while remaining and piece.startswith(self.texts.strip):
                piece = piece[len(self.texts.strip) :]
                remaining -= 1
            left[token] = -1 if piece else remaining
            pieces.append(piece)
        lengths = np.array([len(piece) for piece in pieces])
        order = np.argsort(-lengths, kind="stable")
        ordered = [pieces[i] for i in order]
        columns = [
            np.frombuffer(bytes(piece[i] for piece in ordered[: int((lengths > i).sum())]), np.uint8)
            for i in range(int(lengths.max()))
        ]
        return columns, order, left
