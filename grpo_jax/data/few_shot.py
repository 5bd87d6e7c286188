"""Finds held-out prompts that the few-shot examples of every prompt solve."""

from collections.abc import Sequence

from grpo_jax.data.prompts import prompt_text
from grpo_jax.types import Example, Prompt


def note_on_few_shot(shots: Sequence[tuple[Prompt, str]], held_out: Sequence[Example]) -> str | None:
    """Returns a line on held-out prompts that are few-shot examples as well, or `None` if there are none.

    Args:
        shots: (prompt, completion) of the few-shot examples.
        held_out: all held-out examples, before the few-shot examples are put into their prompts.
    """
    solved = {_question(prompt) for prompt, _ in shots}
    both = [example for example in held_out if _question(example.prompt) in solved]
    if not both:
        return None
    where = f"; the first is {both[0].place}" if both[0].place else ""
    return (
        f"{len(both):,} of {len(held_out):,} held-out prompts are data.few_shot examples as well, white "
        f"space aside{where}: their own prompts show an answer, so evaluation measures copying there"
    )


def _question(prompt: Prompt) -> str:
    """Returns the text that tells whether two prompts ask the same, as text or as a message of the user.

    A system message does not count, because a few-shot example has none of its own.
    """
    if isinstance(prompt, str):
        return prompt_text(prompt)
    turns = [message for message in prompt if message["role"] != "system"]
    if len(turns) == 1 and turns[0]["role"] == "user":
        return prompt_text(turns[0]["content"])
    return prompt_text(turns)
