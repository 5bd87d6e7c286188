"""Finds the bytes that each token adds to the text of a completion, by taking a tokenizer's decoder apart.

A decoder turns the tokens of a whole text into a string. Most decoders put the text together from one piece
per token, with three exceptions that matter here:

* The first token may be written differently (without its leading space).
* The first characters of the whole text may be taken off (`Strip`).
* Byte tokens such as `<0xE2>` (`ByteFallback`) become characters only as a whole run of valid UTF-8. Any
  other run becomes one U+FFFD per byte, its valid characters included.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORDPIECE_CLEANUP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


@dataclass(frozen=True)
class TokenTexts:
    """The pieces that the V tokens of a vocabulary add to a text.

    Args:
        first: bytes of each token as the first of a text. None means that it is left out, as special tokens
            are.
        later: bytes of each token after others, or None likewise.
        fallback: token -> byte, for the byte tokens whose runs become text as a whole.
        strip: the one character that is taken off the beginning of a text.
        num_strips: number of times that it is taken off at most.
    """

    first: list[bytes | None]
    later: list[bytes | None]
    fallback: dict[int, int]
    strip: bytes
    num_strips: int

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, which is what the tokenizer returns without special tokens."""
        text = b""
        run = b""  # byte tokens that have not become text yet

        def flushed(run: bytes) -> bytes:
            try:
                return run.decode().encode()
            except UnicodeDecodeError:
                return "\ufffd".encode() * len(run)

        shown = [token for token in tokens if self.later[token] is not None]
        for i, token in enumerate(shown):
            if token in self.fallback:
                run += bytes([self.fallback[token]])
                continue
            text += flushed(run) + (self.later if i else self.first)[token]
            run = b""
        text += flushed(run)
        for _ in range(self.num_strips):
            text = text.removeprefix(self.strip)
        return text.decode(errors="replace")


def token_texts(tokenizer: Any, *, vocab_size: int, source: str) -> TokenTexts:
    """Reads what each token adds to a text, and checks that against the tokenizer itself.

    Args:
        tokenizer: a fast tokenizer.
        vocab_size: number V of ids of the model. Ids that the tokenizer does not have add nothing.
        source: name of the model in messages.

    Raises:
        ValueError: its decoder is of a kind that does not put a text together from tokens.
    """
    backend = tokenizer.backend_tokenizer
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    names = [None if i in special else backend.id_to_token(i) for i in range(vocab_size)]
    texts = _take_apart(names, backend.decoder, f"sampling.stop: {source}")
    _check(texts, backend, f"sampling.stop: {source}")
    return texts


def _take_apart(names: list[str | None], decoder: Any, complaint: str) -> TokenTexts:
    """Applies a decoder's steps to the names of tokens."""
    first = list(names)
    later = list(names)
    fallback: dict[int, int] = {}
    strip = ""
    num_strips = 0
    fused = False
    as_bytes = None

    def each(change: Callable[[str, bool], str]) -> None:
        for pieces, is_first in ((first, True), (later, False)):
            pieces[:] = [
                piece if piece is None or i in fallback else change(piece, is_first)
                for i, piece in enumerate(pieces)
            ]

    if decoder is None:
        each(lambda piece, is_first: piece if is_first else " " + piece)
    for step in [] if decoder is None else _steps(json.loads(decoder.__getstate__())):
        kind = step["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "ByteFallback" and not fused:
            found = {i: _FALLBACK.fullmatch(piece) for i, piece in enumerate(later) if piece is not None}
            fallback |= {i: int(match[1], 16) for i, match in found.items() if match}
        elif kind == "Strip" and fused and step["stop"] == 0 and step["content"].isascii():
            strip = step["content"]
            num_strips = step["start"]
        elif fallback or as_bytes or fused:
            break
        elif kind == "Replace" and "String" in step["pattern"]:
            old = step["pattern"]["String"]
            each(lambda piece, _, old=old, new=step["content"]: piece.replace(old, new))
        elif kind == "Metaspace":
            mark = step["replacement"]
            kept = step["prepend_scheme"] == "never"
            each(lambda p, is_first, m=mark, kept=kept: p.replace(m, "" if is_first and not kept else " "))
        elif kind == "WordPiece":
            each(lambda piece, is_first, step=step: _wordpiece(piece, is_first, step))
        elif kind == "ByteLevel":
            as_bytes = _byte_level()
        else:
            break
    else:
        encode = _spelled_bytes(as_bytes) if as_bytes else str.encode
        pieces = ([None if piece is None else encode(piece) for piece in side] for side in (first, later))
        return TokenTexts(*pieces, fallback=fallback, strip=strip.encode(), num_strips=num_strips)
    raise ValueError(
        f"{complaint} has a tokenizer whose decoder ({kind}) does not put a text together from tokens; leave "
        "sampling.stop out, or end completions with sampling.eos_token_ids"
    )


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]


def _wordpiece(piece: str, is_first: bool, step: dict[str, Any]) -> str:
    if not is_first:
        inner = piece.startswith(step["prefix"])
        piece = piece.removeprefix(step["prefix"]) if inner else " " + piece
    for old, new in _WORDPIECE_CLEANUP if step["cleanup"] else ():
        piece = piece.replace(old, new)
    return piece


def _byte_level() -> dict[str, int]:
    """Returns the byte that each character stands for in a byte-level vocabulary, as GPT-2's has them."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _spelled_bytes(byte_of: dict[str, int]) -> Callable[[str], bytes]:
    def encode(piece: str) -> bytes:
        # An added token is plain text. It need not be spelled in these characters.
        spelled = all(character in byte_of for character in piece)
        return bytes(byte_of[character] for character in piece) if spelled else piece.encode()

    return encode


def _check(texts: TokenTexts, backend: Any, complaint: str) -> None:
    """Raises unless each token, alone and after another, has the text that the tokenizer itself gives."""
    shown = [i for i, piece in enumerate(texts.later) if piece is not None]
    before = next((i for i in shown if i not in texts.fallback and texts.later[i].strip()), None)
    sequences = [[i] for i in shown] + [[before, i] for i in shown if before is not None]
    decoded = backend.decode_batch(sequences, skip_special_tokens=True)
    for tokens, text in zip(sequences, decoded, strict=True):
        if texts.decode(tokens) != text:
            raise ValueError(
                f"{complaint} has a tokenizer that turns the tokens {tokens} into {text!r:.40}, where their "
                f"pieces are {texts.decode(tokens)!r:.40}: stop strings cannot be followed in its texts"
            )
