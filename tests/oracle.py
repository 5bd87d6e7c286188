"""The formulas of the papers as literal loops over rows and tokens, in NumPy float64.

Nothing here is vectorised, masked by multiplication or shared with the package: a token that is masked
out is skipped by `if`. Gradients are derivatives worked out by hand, beside the value they belong to.
"""

import math

import numpy as np


# ---------------------------------------------------------------------------------------- advantages
def advantages(rewards, valid=None, *, scale="std", ddof=1, epsilon=1e-4):
    """group_advantages, one group and one completion at a time; `scale` may be "leave_one_out"."""
    rewards = np.asarray(rewards, np.float64)
    valid = np.ones(rewards.shape, bool) if valid is None else np.asarray(valid, bool)
    out = np.zeros(rewards.shape)
    everything = [rewards[n, g] for n in range(len(rewards)) for g in range(rewards.shape[1]) if valid[n, g]]
    for n in range(len(rewards)):
        group = [rewards[n, g] for g in range(rewards.shape[1]) if valid[n, g]]
        if len(group) < 2 or all(r == group[0] for r in group):
            continue
        mean = math.fsum(group) / len(group)
        for g in range(rewards.shape[1]):
            if not valid[n, g]:
                continue
            if scale == "leave_one_out":
                others = [rewards[n, j] for j in range(rewards.shape[1]) if valid[n, j] and j != g]
                out[n, g] = rewards[n, g] - math.fsum(others) / len(others)
            else:
                divisor = {
                    "none": 1.0,
                    "std": std(group, ddof) + epsilon,
                    "batch": std(everything, ddof) + epsilon,
                }[scale]
                out[n, g] = (rewards[n, g] - mean) / divisor
    return out


def std(values, ddof):
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - ddof, 1))


# -------------------------------------------------------------------------------------------- weights
def weights(mask, *, reduction, max_length=None, num_sequences=None):
    """loss_weights, one token at a time."""
    mask = np.asarray(mask, bool)
    rows = len(mask) if num_sequences is None else num_sequences
    total = sum(bool(m) for row in mask for m in row)
    out = np.zeros(mask.shape)
    for i, row in enumerate(mask):
        length = sum(bool(m) for m in row)
        for t, m in enumerate(row):
            if m:
                out[i, t] = {
                    "sequence": 1 / (rows * length),
                    "token": 1 / total,
                    "constant": 1 / (rows * (max_length or mask.shape[1])),
                }[reduction]
    return out


# ----------------------------------------------------------------------- per token: (value, derivative)
def clipped(rho, advantage, *, clip_range=0.2, clip_range_high=None, delta=None, dual_clip=None):
    """One token's clipped surrogate and its derivative with respect to the log ratio."""
    low, high = 1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high)
    first = rho if delta is None else min(rho, delta)
    second = min(max(rho, low), high)
    if first * advantage <= second * advantage:
        value, moves = first * advantage, first == rho
    else:
        value, moves = second * advantage, low < rho < high
    slope = rho * advantage if moves else 0.0
    if dual_clip is not None and advantage < 0 and value < dual_clip * advantage:
        value, slope = dual_clip * advantage, 0.0
    return -value, -slope


def surrogate(name, rho, log_prob, advantage, **clip):
    """One token's surrogate: (value, derivative by the log ratio, derivative by the log-prob itself)."""
    if name == "clipped":
        return *clipped(rho, advantage, **clip), 0.0
    if name == "cispo":
        weight = min(rho, clip["cap"])
        return -weight * advantage * log_prob, 0.0, -weight * advantage
    if name == "sapo":
        tau = clip["tau"] if advantage > 0 else clip["tau_negative"]
        gate = 1 / (1 + math.exp(-tau * (rho - 1)))
        return -4 / tau * gate * advantage, -4 * gate * (1 - gate) * rho * advantage, 0.0
    if name == "reinforce":
        return -advantage * log_prob, 0.0, -advantage
    raise KeyError(name)


def kl(name, log_prob, ref_log_prob):
    """One token's KL estimate and its derivative with respect to log_prob."""
    d = ref_log_prob - log_prob
    if name == "k1":
        return -d, 1.0
    if name == "k2":
        return 0.5 * d * d, -d
    if name == "k3":
        return math.exp(d) - d - 1, 1 - math.exp(d)
    raise KeyError(name)


# ----------------------------------------------------------------------------------------- the loss
def log_ratio_rows(log_probs, old_log_probs, mask, level):
    """The log ratio of every token, 0 where masked; a row's own mean at the two sequence levels."""
    out = np.zeros(np.shape(mask))
    for i, row in enumerate(mask):
        tokens = [t for t, m in enumerate(row) if m]
        d = {t: float(log_probs[i][t]) - float(old_log_probs[i][t]) for t in tokens}
        for t in tokens:
            out[i, t] = d[t] if level == "token" else math.fsum(d.values()) / len(tokens)
    return out


def loss(
    log_probs,
    old_log_probs,
    advantages,
    mask,
    weights,
    *,
    ref=None,
    level="token",
    name="clipped",
    estimator="k3",
    kl_coef=0.0,
    **clip,
):
    """grpo_loss: (loss, gradient [B,T], metrics). `ratio_k1` and `ratio_k3` are times the ratio."""
    mask = np.asarray(mask, bool)
    log_ratios = log_ratio_rows(log_probs, old_log_probs, mask, level)
    gradient = np.zeros(mask.shape)
    policy_loss = kl_loss = 0.0
    kls, ratios, cut_low, cut_high = [], [], 0, 0
    for i, row in enumerate(mask):
        tokens = [t for t, m in enumerate(row) if m]

        def move_ratio(t, slope, i=i, tokens=tokens):
            """Adds a derivative by the log ratio: at the sequence level every token moves the row's mean."""
            for s in tokens if level == "sequence" else [t]:
                gradient[i, s] += slope / len(tokens) if level == "sequence" else slope

        for t in tokens:
            rho, w, log_prob = math.exp(log_ratios[i, t]), float(weights[i][t]), float(log_probs[i][t])
            value, by_ratio, direct = surrogate(name, rho, log_prob, float(advantages[i]), **clip)
            policy_loss += w * value
            ratios.append(rho)
            if by_ratio + direct == 0 and advantages[i] != 0:
                cut_low, cut_high = cut_low + (rho < 1), cut_high + (rho > 1)
            move_ratio(t, w * by_ratio)
            gradient[i, t] += w * direct
            if ref is not None:
                value, slope = kl(estimator.removeprefix("ratio_"), log_prob, float(ref[i][t]))
                if estimator.startswith("ratio_"):
                    move_ratio(t, kl_coef * w * rho * value)
                    value, slope = rho * value, rho * slope
                kls.append(value)
                kl_loss += w * value
                gradient[i, t] += kl_coef * w * slope
    n = len(ratios)
    metrics = {
        "policy_loss": policy_loss,
        "kl": sum(kls) / n if kls else 0.0,
        "ratio_mean": sum(ratios) / n if n else 0.0,
        "ratio_max": max(ratios, default=0.0),
        "clip_low": cut_low / n if n else 0.0,
        "clip_high": cut_high / n if n else 0.0,
        "num_tokens": n,
    }
    return policy_loss + kl_coef * kl_loss, gradient, metrics


# --------------------------------------------------------------------------------------------- sampling
def kept_tokens(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The tokens process_logits keeps of one row [V], by sorting; a set of indices.

    Ties with the last token kept by top-k or top-p are kept as well.
    """
    # The scaled logits are float32 by contract; ties are decided on them.
    scaled = np.asarray(logits, np.float32)
    if temperature == 0:
        return {int(np.argmax(scaled))}
    scaled = (scaled / np.float32(temperature)).astype(np.float64)
    order = sorted((i for i in range(len(scaled)) if scaled[i] > -np.inf), key=lambda i: -scaled[i])
    if top_k:
        last = scaled[order[min(top_k, len(order)) - 1]]
        order = [i for i in order if scaled[i] >= last]
    if top_p < 1:
        probs = np.exp(scaled - scaled[order[0]])
        total, mass = math.fsum(probs[i] for i in order), 0.0
        for i in order:
            mass += probs[i] / total
            if mass >= top_p:
                order = [j for j in order if scaled[j] >= scaled[i]]
                break
    if min_p:
        order = [i for i in order if math.exp(scaled[i] - scaled[order[0]]) >= min_p]
    return set(order)


def inverse_cdf(logits, uniform):
    """The first token whose cumulative probability exceeds `uniform`, and how far `uniform` is from the
    nearest edge between two tokens."""
    logits = np.asarray(logits, np.float64)
    probs = np.exp(logits - logits.max())
    cumulative = np.cumsum(probs / probs.sum())
    token = next(
        (i for i in range(len(probs)) if probs[i] > 0 and cumulative[i] > uniform),
        int(np.flatnonzero(probs)[-1]),
    )
    return token, float(np.min(np.abs(cumulative - uniform)))
