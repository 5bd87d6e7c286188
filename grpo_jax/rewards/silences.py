"""Finds rewards that say nothing, and shows what such a reward compared in one row.

A reward that is 0 or None for every completion may be right. It may also look for a column, a format or a
type that the data does not have, and a mean of 0 does not show that.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from grpo_jax.rewards.answers.extraction import extract_answer, extract_number
from grpo_jax.rewards.builtin import REWARDS
from grpo_jax.rewards.reward import Reward, takes
from grpo_jax.types import Example, Silence

_SHOWN = 60  # characters that are shown of a value
_NUM_COLUMNS = 3  # columns that are shown of a row
_PENALTIES = ("length_penalty", "repetition_penalty")  # their 0 is the best value, not the lowest


def lost_rows(rewards: Sequence[Reward]) -> list[Mapping[int, str]]:
    """Returns for each reward the rows that it lost in its last batch, with the reason."""
    return [{} if reward.pool is None else reward.pool.last_lost for reward in rewards]


def find_silences(
    rewards: Sequence[Reward],
    examples: Sequence[Example],
    texts: Sequence[str],
    scores: np.ndarray,
    lost: Sequence[Mapping[int, str]],
) -> list[Silence]:
    """Finds the rewards that say nothing about all completions, or that lack a value for some.

    Args:
        rewards: R reward functions.
        examples: B examples, one per completion.
        texts: B completions.
        scores: [B,R], NaN where a reward is missing.
        lost: for each reward, the rows that a timeout or a dead worker lost, with the reason.
    """
    found = []
    for r, reward in enumerate(rewards):
        column = scores[:, r]
        gone = lost[r]
        missing = [int(row) for row in np.flatnonzero(np.isnan(column)) if int(row) not in gone]
        values = column[~np.isnan(column)]
        if gone:
            row = min(gone)
            text = f"lost {len(gone)} of {len(texts)} completions, as {gone[row]}"
            found.append(_silence(reward, "lost", text, examples, texts, row))
        if missing and len(missing) == len(texts):
            text = f"gives no value (None) for any of {len(texts)} completions and takes no part"
            found.append(_silence(reward, "none", text, examples, texts, 0))
        elif missing:
            text = f"gives no value (None) for {len(missing)} of {len(texts)} completions"
            found.append(_silence(reward, "some", text, examples, texts, missing[0]))
        best = values.size and values.max() == 0 and reward.function in [REWARDS[n] for n in _PENALTIES]
        if values.size > 1 and values.min() == values.max() <= 0 and not best:
            row = int(np.flatnonzero(~np.isnan(column))[0])
            share = f"every completion ({values.size} of {len(texts)})"
            text = f"is {values[0]:.4g} for {share}{_reason(reward, examples[row], texts)}"
            found.append(_silence(reward, "lowest", text, examples, texts, row))
    return found


def _silence(reward, kind, text: str, examples, texts, row: int) -> Silence:
    example = examples[row]
    compared = [f"{name} {_short(example.columns[name])}" for name in _columns(reward, example)]
    told = ", ".join([*compared, f"completion {_short(texts[row])}"])
    where = example.place or f"prompt {_short(example.prompt)}"
    return Silence(reward.name, kind, text, f"{where}: {told}")


def _columns(reward: Reward, example: Example) -> list[str]:
    """Returns the columns of a row that a reward reads, as far as its signature shows."""
    if reward.one_of:  # only the first of these counts
        return [name for name in reward.one_of if name in example.columns][:1]
    if reward.arguments.get("columns") and reward.function is REWARDS["http_score"]:
        return list(reward.arguments["columns"])[:_NUM_COLUMNS]
    taken = [name for name in example.columns if takes(reward, name)]
    code = getattr(reward.function, "__code__", None)
    named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code else ()
    return ([name for name in taken if name in named] or taken)[:_NUM_COLUMNS]


def _reason(reward: Reward, example: Example, texts: Sequence[str]) -> str:
    """Returns the reason why a reward is the same for all completions, if they show one."""
    arguments = dict(reward.arguments)
    if where := arguments.get("where"):
        tag = arguments.get("tag", "answer")
        if all(extract_answer(text, where=where, tag=tag) is None for text in texts):
            mark = {"boxed": r"\boxed{}", "hashes": "####", "tag": f"<{tag}>...</{tag}>"}.get(where, where)
            return f": none of them has an answer at `{where}` ({mark})"
    if reward.function is REWARDS["numeric_answer"] and all(extract_number(text) is None for text in texts):
        return ": none of them has a number"
    if reward.source != "built in" and not reward.one_of and not isinstance(example.prompt, str):
        return (
            ". The prompts are messages, so a completion is a list of messages: its text is "
            'completion[0]["content"]'
        )
    return ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
