"""The toy policy again, as a literal float64 NumPy loop: one sequence, no padding, no cache, no mask."""

import numpy as np


def full_logits(params, tokens) -> np.ndarray:
    """Computes the logits [L,V] of one unpadded sequence of tokens [L]."""
    params = {name: np.asarray(x, np.float64) for name, x in params.items()}
    width = params["embed"].shape[1]
    x = params["embed"][np.asarray(tokens)] + params["position"][: len(tokens)]
    attended = np.zeros_like(x)
    query, key, value = np.split(_norm(x) @ params["qkv"], 3, axis=-1)
    for here in range(len(tokens)):
        scores = np.array([query[here] @ key[there] / width**0.5 for there in range(here + 1)])
        attended[here] = softmax(scores) @ value[: here + 1]
    x = x + attended @ params["out"]
    up = _norm(x) @ params["up"]
    gelu = 0.5 * up * (1 + np.tanh((2 / np.pi) ** 0.5 * (up + 0.044715 * up**3)))
    return _norm(x + gelu @ params["down"]) @ params["head"]


def completion_logits(params, rollout, row: int) -> np.ndarray:
    """Computes the logits [n,V] that predict each of the n real completion tokens of a row."""
    prompt = np.asarray(rollout.prompt_tokens[row])[np.asarray(rollout.prompt_mask[row])]
    completion = np.asarray(rollout.tokens[row])[np.asarray(rollout.mask[row])]
    logits = full_logits(params, np.concatenate([prompt, completion]))
    return logits[len(prompt) - 1 : len(prompt) + len(completion) - 1]


def softmax(x) -> np.ndarray:
    """Computes the softmax over the last axis."""
    exps = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return exps / np.sum(exps, axis=-1, keepdims=True)


def _norm(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
