"""From the tokens of prompts to the texts of completions, by a loaded model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array

from grpo_jax.models.endings import end_arguments
from grpo_jax.models.loading import Model
from grpo_jax.models.text import decode
from grpo_jax.policy.decoding import generate, pad_prompts
from grpo_jax.types import Params, Rollout


def complete(
    model: Model,
    params: Params,
    sequences: Sequence[Sequence[int]],
    key: Array,
    *,
    prompt_length: int,
    **settings: Any,
) -> tuple[list[str], Rollout]:
    """Samples completions of prompts.

    Args:
        model: functions, tokenizer and what ends a completion. Its own params are not used.
        params: parameters to sample with.
        sequences: token ids of N prompts.
        key: PRNG key of the sampling noise.
        prompt_length: length S that the prompts are padded to.
        settings: the other arguments of `generate`, such as group_size and temperature.

    Returns:
        (N*G texts, prompt-major, and the rollout).

    Raises:
        ValueError: a prompt is longer than prompt_length.
    """
    prompts = pad_prompts(sequences, prompt_length)
    rollout = generate(model.policy, params, prompts, key, **end_arguments(model), **settings)
    return decode(model, np.asarray(rollout.tokens), np.asarray(rollout.mask)), rollout
