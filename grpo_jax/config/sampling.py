"""The section `sampling` of the configuration: it says how tokens are sampled and what ends a completion."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_jax.config.checks import check_ranges, require

# Training and `generate` share these. Their temperatures differ: only `generate` may be greedy.
SAMPLING_RANGES = (
    ("max_new_tokens", lambda x: x >= 1, "at least 1"),
    ("top_k", lambda x: x >= 0, "0 (off) or more"),
    ("top_p", lambda x: 0 < x <= 1, "in (0, 1], where 1 is off"),
    ("min_p", lambda x: 0 <= x < 1, "in [0, 1), where 0 is off"),
)
_TRAINING_RANGES = (
    (
        "temperature",
        lambda x: 0 < x < math.inf,
        "finite and above 0, because greedy completions of a prompt are all equal and teach nothing",
    ),
)
_MAX_STOP_BYTES = 1000  # the table in `models.stops` has about one row of V entries per byte


def check_endings(
    section: str, *, eos_token_ids: Any = None, stop: Any = None, include_stop: bool = False
) -> None:
    """Checks the settings of what ends a completion, which training and `generate` share.

    Args:
        section: prefix of the names in the messages, such as `sampling.`.
        eos_token_ids: the tokens, as in `SamplingConfig`.
        stop: stop strings.
        include_stop: whether texts keep them.

    Raises:
        ValueError: the message names the value and says what is allowed.
    """
    name = f"{section}eos_token_ids"
    for token in as_list(eos_token_ids):
        # In Python a bool is an int, but it is not an id.
        right = isinstance(token, int | str) and not isinstance(token, bool)
        require(right, f"{name}: {token!r} is no token; give ids or the texts of tokens, such as [2, </s>]")
        require(token != "", f"{name}: one of the texts is empty; give ids or the texts of tokens")
        require(isinstance(token, str) or token >= 0, f"{name}: {token}; an id must be 0 or more")
    require(
        eos_token_ids is None or bool(as_list(eos_token_ids)) or bool(as_list(stop)),
        f"{name}: the list is empty, so no token would end a completion; leave it out for the model's own",
    )
    check_stop_strings(f"{section}stop", as_list(stop))
    require(
        not include_stop or bool(as_list(stop)),
        f"{section}include_stop: there is nothing to include; give {section}stop",
    )


def check_stop_strings(name: str, strings: Sequence[Any]) -> None:
    """Checks stop strings.

    Args:
        name: name of the setting in the messages.
        strings: the stop strings. The list may be empty.

    Raises:
        ValueError: a string is not text, is empty, or can never occur, or all together are too long.
    """
    for string in strings:
        require(isinstance(string, str), f"{name}: {string!r} is no text; give strings, such as [</answer>]")
        require(string != "", f"{name}: an empty string would end every completion at once; leave it out")
        broken = any(character == "\ufffd" or "\ud800" <= character <= "\udfff" for character in string)
        require(not broken, f"{name}: {string!r} has a character that no text of a model has; leave it out")
    size = sum(len(string.encode()) for string in strings)
    require(
        size <= _MAX_STOP_BYTES, f"{name}: {size:,} bytes in all; at most {_MAX_STOP_BYTES:,} are possible"
    )


def as_list(value: Any) -> list:
    """Returns a list unchanged, an empty list for None, and a list with one entry for any other value."""
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def endings(*, eos_token_ids: Any, stop: Any, include_stop: bool) -> dict[str, Any]:
    """Returns these settings as the keyword arguments of `load_model` and `set_endings`."""
    given = {"eos_token_ids": eos_token_ids, "stop": stop}
    tuples = {name: None if value is None else tuple(as_list(value)) for name, value in given.items()}
    return {**tuples, "include_stop": include_stop}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How completions are sampled, in training and in evaluation.

    Args:
        max_new_tokens: T, the largest number of completion tokens.
        temperature: divisor of the logits, above 0. Evaluation also decodes greedily.
        top_k: number of the most likely tokens that are kept. 0 keeps all.
        top_p: probability mass that is kept: the smallest set of tokens with at least this probability. 1
            keeps all.
        min_p: smallest probability of a kept token, as a fraction of the most likely token's. 0 keeps all.
        eos_token_ids: the tokens that end a completion, as ids or texts (`[2, "<|im_end|>"]`). `null` means
            all tokens that the model's generation_config.json, config.json and tokenizer name.
        stop: texts that end a completion (`["\\nQuestion:"]`, or a single text). A completion ends where it
            first contains one of them, counts as finished and is trained up to there. `null` means the texts
            of the model's generation_config.json, which seldom has any, and `[]` means none.
        include_stop: whether the text that rewards read keeps the stop text. By default the text ends right
            before it, as with `stop` in vLLM and the OpenAI API.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    eos_token_ids: list[int | str] | int | str | None = None
    stop: list[str] | str | None = None
    include_stop: bool = False

    @property
    def endings(self) -> dict[str, Any]:
        """The settings of what ends a completion, as keyword arguments of `load_model` and `set_endings`."""
        return endings(eos_token_ids=self.eos_token_ids, stop=self.stop, include_stop=self.include_stop)

    def __post_init__(self):
        check_ranges("sampling.", vars(self), (*SAMPLING_RANGES, *_TRAINING_RANGES))
        check_endings("sampling.", **self.endings)
