"""Picks the held-out prompts of a run, and checks whether it trains on them as well."""

import hashlib
from collections.abc import Sequence

from grpo_jax.data.prompts import prompt_text
from grpo_jax.types import Example


def sample_held_out(examples: Sequence[Example], count: int) -> list[Example]:
    """Picks a fixed pseudo-random sample of the held-out examples, in the order of the file.

    A row's rank is a hash of its index alone. So the sample is the same for every seed, prompt template and
    reward, and runs can be compared. A larger sample contains a smaller one. Rows that are appended to a file
    can only replace others in the sample.

    Args:
        examples: N held-out examples.
        count: number of examples that are wanted.

    Returns:
        min(count, N) examples.
    """
    if count >= len(examples):
        return list(examples)
    chosen = sorted(range(len(examples)), key=_rank)[:count]
    return [examples[index] for index in sorted(chosen)]


def _rank(index: int) -> bytes:
    return hashlib.sha256(f"held-out row {index}".encode()).digest()


def note_on_overlap(
    train: Sequence[Example], held_out: Sequence[Example], used: Sequence[Example]
) -> str | None:
    """Returns a line on held-out prompts that are also training prompts, or None if there are none.

    Args:
        train: training examples.
        held_out: all held-out examples.
        used: held-out examples that are evaluated.
    """
    if not used:
        return None
    known = {prompt_text(example.prompt) for example in train}
    both = [example for example in held_out if prompt_text(example.prompt) in known]
    if not both:
        return None
    among = sum(prompt_text(example.prompt) in known for example in used)
    shown = f" ({among:,} of the {len(used):,} that are evaluated)" if len(used) < len(held_out) else ""
    where = f"; the first is {both[0].place}" if both[0].place else ""
    return (
        f"{len(both):,} of {len(held_out):,} held-out prompts{shown} are training prompts as well, white "
        f"space aside{where}: on these, evaluation measures memory"
    )
