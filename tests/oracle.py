"""The formulas of the papers as literal loops over rows and tokens, in NumPy float64.

Nothing here is vectorised, masked by multiplication or shared with the package: a token that is masked
out is skipped by `if`. Gradients are derivatives worked out by hand, beside the value they belong to.
"""

import math
from typing import NamedTuple

import numpy as np


# -------------------------------------------------------------------------------------------- recipes
class Paper(NamedTuple):
    """What a paper says, in the words of this file."""

    source: str
    scale: str  # of `advantages`
    level: str  # of `log_ratio_rows`
    surrogate: str
    clip: dict
    reduction: str  # of `weights`
    kl: tuple = ("k3", 0.0, "loss")  # estimator, coefficient, placement


PAPERS = {
    "grpo": Paper(
        "2402.03300", "std", "token", "clipped", {"clip_range": 0.2}, "sequence", ("k3", 0.04, "loss")
    ),
    "dr_grpo": Paper("2503.20783", "none", "token", "clipped", {"clip_range": 0.2}, "constant"),
    "dapo": Paper(
        "2503.14476", "std", "token", "clipped", {"clip_range": 0.2, "clip_range_high": 0.28}, "token"
    ),
    "bnpo": Paper("TRL", "std", "token", "clipped", {"clip_range": 0.2}, "local_token"),
    "gspo": Paper(
        "2507.18071", "std", "sequence", "clipped", {"clip_range": 3e-4, "clip_range_high": 4e-4}, "sequence"
    ),
    "gspo_token": Paper(
        "2507.18071",
        "std",
        "sequence_token",
        "clipped",
        {"clip_range": 3e-4, "clip_range_high": 4e-4},
        "sequence",
    ),
    "cispo": Paper("2506.13585", "std", "token", "cispo", {"cap": 5.0}, "token"),
    "sapo": Paper("2511.20347", "std", "token", "sapo", {"tau": 1.0, "tau_negative": 1.05}, "sequence"),
    "gmpo": Paper("2507.20673", "std", "token", "gmpo", {"log_clip_range": 0.4}, "sequence"),
    "rloo": Paper(
        "2402.14740", "leave_one_out", "sequence", "reinforce", {}, "sequence_sum", ("k1", 0.03, "reward")
    ),
    "reinforce": Paper("Williams 1992", "none", "token", "reinforce", {}, "token"),
}


def objective(paper, batch, *, max_length, num_microbatches=1, **choices):
    """From rewards to the gradient, as one optimizer batch: `loss` of everything the paper says.

    `batch` has rewards [N,G], valid [N,G] and, [B,T], log_probs, old, ref, mask; and where they are wanted
    factors (of the weights of the policy term), kls, entropies.
    """
    base = weights(
        batch["mask"], reduction=paper.reduction, max_length=max_length, num_microbatches=num_microbatches
    )
    groups = advantages(batch["rewards"], batch["valid"], scale=paper.scale)
    return loss(
        batch["log_probs"],
        batch["old"],
        [a for group in groups for a in group],
        batch["mask"],
        [
            [w * float(f) for w, f in zip(*rows, strict=True)]
            for rows in zip(base, batch["factors"], strict=True)
        ],
        penalty_weights=base,
        ref=batch["ref"],
        kls=batch.get("kls"),
        entropies=batch["entropies"],
        level=paper.level,
        name=paper.surrogate,
        **paper.clip,
        **choices,
    )


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


def reward_weights(valid, weights, *, missing, group=None):
    """What each function counts in one row, some being missing: (weights [R], whether the row counts).

    `group` is the valid [G,R] of all rows of its group. With `drop` a function that gave nothing to any of
    them takes no part, and a row that misses another one is out.
    """
    group = [valid] if group is None else group
    used = [r for r in range(len(weights)) if weights[r] != 0]
    if missing == "drop":
        used = [r for r in used if any(row[r] for row in group)]
    there = [r for r in used if valid[r]]
    if not there or (missing == "drop" and there != used):
        return [0.0] * len(weights), False
    factor = 1.0
    if missing == "renormalize":
        factor = math.fsum(abs(weights[r]) for r in used) / math.fsum(abs(weights[r]) for r in there)
    return [weights[r] * factor if r in there else 0.0 for r in range(len(weights))], True


def normalize_then_sum(scores, weights, valid, *, scale="std", missing="drop"):
    """Advantages of each function [N,G,R] alone, then their weighted sum [N,G]."""
    groups, size, functions = np.shape(scores)
    rows = [
        [reward_weights(valid[n][g], weights, missing=missing, group=valid[n]) for g in range(size)]
        for n in range(groups)
    ]
    out = np.zeros((groups, size))
    for r in range(functions):
        values = [[scores[n][g][r] if valid[n][g][r] else 0.0 for g in range(size)] for n in range(groups)]
        there = [
            [valid[n][g][r] and rows[n][g][1] and weights[r] != 0 for g in range(size)] for n in range(groups)
        ]
        alone = advantages(values, there, scale=scale)
        for n in range(groups):
            for g in range(size):
                out[n, g] += rows[n][g][0][r] * alone[n, g]
    return out


def scale_by_batch(values, valid, *, epsilon=1e-4):
    """The values over the standard deviation of all that are there."""
    everything = [values[n][g] for n in range(len(values)) for g in range(len(values[n])) if valid[n][g]]
    divisor = std(everything, 1) + epsilon if everything else 1.0
    out = np.zeros(np.shape(values))
    for n in range(len(values)):
        for g in range(len(values[n])):
            out[n, g] = values[n][g] / divisor if valid[n][g] else 0.0
    return out


# -------------------------------------------------------------------------------------------- weights
def weights(mask, *, reduction, max_length=None, num_sequences=None, num_microbatches=1):
    """loss_weights, one token at a time."""
    mask = np.asarray(mask, bool)
    rows = len(mask) if num_sequences is None else num_sequences
    total = sum(bool(m) for row in mask for m in row)
    rows_of_a_slice = len(mask) // num_microbatches
    out = np.zeros(mask.shape)
    for i, row in enumerate(mask):
        length = sum(bool(m) for m in row)
        first = i // rows_of_a_slice * rows_of_a_slice
        local = sum(bool(m) for other in mask[first : first + rows_of_a_slice] for m in other)
        for t, m in enumerate(row):
            if m:
                out[i, t] = {
                    "sequence": 1 / (rows * length),
                    "token": 1 / total,
                    "constant": 1 / (rows * (max_length or mask.shape[1])),
                    "sequence_sum": 1 / rows,
                    "local_token": 1 / (num_microbatches * local),
                }[reduction]
    return out


# -------------------------------------------------------------------------------------------- shaping
def overlong(length, *, max_length, buffer):
    """DAPO, equation 13, its three cases."""
    if length <= max_length - buffer:
        return 0.0
    if length <= max_length:
        return (max_length - buffer - length) / buffer
    return -1.0


def kl_in_reward(log_probs, ref_log_probs, mask):
    """sum_t (log pi - log ref) of every row."""
    return [
        math.fsum(float(log_probs[i][t]) - float(ref_log_probs[i][t]) for t, m in enumerate(row) if m)
        for i, row in enumerate(mask)
    ]


def top_entropies(entropies, mask, share):
    """The tokens (row, column) of the highest entropies: `share`, a Fraction, of all; ties at the end too."""
    tokens = [(i, t) for i, row in enumerate(mask) for t, m in enumerate(row) if m]
    ranked = sorted((float(entropies[i][t]) for i, t in tokens), reverse=True)
    count = math.ceil(share * len(tokens))
    return {(i, t) for i, t in tokens if entropies[i][t] >= ranked[count - 1]}


def importance(log_prob, sampler_log_prob, cap):
    return min(math.exp(log_prob - sampler_log_prob), cap)


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
        shut = math.exp(-tau * (rho - 1)) * gate  # 1 - gate, with all its digits
        return -4 / tau * gate * advantage, -4 * gate * shut * rho * advantage, 0.0
    if name == "reinforce":
        return -advantage * log_prob, 0.0, -advantage
    raise KeyError(name)


def gmpo(log_ratios, advantage, *, log_clip_range=0.4, log_clip_range_high=None):
    """One row's GMPO: (value, its derivative by each token's log ratio).

    value = -A exp(mean_t c_t), c_t the log ratio clipped where that lowers A times it; so a token that is not
    clipped has the derivative value / n.
    """
    high = log_clip_range if log_clip_range_high is None else log_clip_range_high
    clipped = [min(d, high) if advantage > 0 else max(d, -log_clip_range) for d in log_ratios]
    value = -advantage * math.exp(math.fsum(clipped) / len(clipped))
    return value, [value / len(clipped) if c == d else 0.0 for c, d in zip(clipped, log_ratios, strict=True)]


def row_surrogate(name, log_ratios, log_probs, advantage, weights, **clip):
    """The surrogates of one row's tokens.

    Returns:
        (sum of weights times values; its derivative by each log ratio; its derivative by each log-prob
        itself; for each token whether no gradient passes it).
    """
    if name == "gmpo":  # the value of the row stands at each of its tokens
        value, slopes = gmpo(log_ratios, advantage, **clip)
        total = math.fsum(weights)
        return total * value, [total * s for s in slopes], [0.0] * len(slopes), [s == 0 for s in slopes]
    terms = [
        surrogate(name, math.exp(d), log_prob, advantage, **clip)
        for d, log_prob in zip(log_ratios, log_probs, strict=True)
    ]
    return (
        math.fsum(w * value for w, (value, _, _) in zip(weights, terms, strict=True)),
        [w * slope for w, (_, slope, _) in zip(weights, terms, strict=True)],
        [w * direct for w, (_, _, direct) in zip(weights, terms, strict=True)],
        [slope + direct == 0 for _, slope, direct in terms],
    )


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


# --------------------------------------------------------------------- distributions: (value, gradient)
def softmax(logits):
    """(probabilities, log-probs) of one row of logits; -inf is probability 0."""
    top = max(logits)
    log_total = top + math.log(math.fsum(math.exp(z - top) for z in logits))
    return [math.exp(z - log_total) for z in logits], [z - log_total for z in logits]


def token_log_prob(logits, token):
    """log p_token and its gradient by the logits: [v = token] - p_v."""
    probs, log_probs = softmax(logits)
    return log_probs[token], [(v == token) - p for v, p in enumerate(probs)]


def entropy(logits):
    """H = -sum p log p and its gradient by the logits: -p_v (log p_v + H)."""
    probs, log_probs = softmax(logits)
    value = -math.fsum(p * x for p, x in zip(probs, log_probs, strict=True) if p > 0)
    return value, [-p * (x + value) if p > 0 else 0.0 for p, x in zip(probs, log_probs, strict=True)]


def kl_exact(logits, ref_logits):
    """KL = sum p (log p - log q) and its gradient by the logits of p: p_v (log p_v - log q_v - KL)."""
    probs, log_probs = softmax(logits)
    _, ref_log_probs = softmax(ref_logits)
    d = [x - y if p > 0 else 0.0 for p, x, y in zip(probs, log_probs, ref_log_probs, strict=True)]
    value = math.fsum(p * x for p, x in zip(probs, d, strict=True))
    return value, [p * (x - value) for p, x in zip(probs, d, strict=True)]


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
    kls=None,
    entropies=None,
    entropy_coef=0.0,
    penalty_weights=None,
    max_staleness=None,
    **clip,
):
    """grpo_loss: (loss, gradient [B,T] by log_probs, metrics). `ratio_k1` and `ratio_k3` are times the ratio.

    `kls` and `entropies` enter the loss as values; what they add to a gradient by logits is in
    `loss_of_logits`.
    """
    mask = np.asarray(mask, bool)
    penalty_weights = weights if penalty_weights is None else penalty_weights
    log_ratios = log_ratio_rows(log_probs, old_log_probs, mask, level)
    gradient = np.zeros(mask.shape)
    policy_loss = kl_loss = bonus = 0.0
    used_kls, ratios, cut_low, cut_high, num_stale = [], [], 0, 0, 0
    for i, row in enumerate(mask):
        tokens = [t for t, m in enumerate(row) if m]
        if not tokens:
            continue

        def move_ratio(t, slope, i=i, tokens=tokens):
            """Adds a derivative by the log ratio: at the sequence level every token moves the row's mean."""
            for s in tokens if level == "sequence" else [t]:
                gradient[i, s] += slope / len(tokens) if level == "sequence" else slope

        fallen = math.fsum(float(old_log_probs[i][t]) - float(log_probs[i][t]) for t in tokens) / len(tokens)
        stale = max_staleness is not None and advantages[i] < 0 and fallen > max_staleness
        row_loss, by_ratio, direct, cut = row_surrogate(
            name,
            [float(log_ratios[i, t]) for t in tokens],
            [float(log_probs[i][t]) for t in tokens],
            float(advantages[i]),
            [float(weights[i][t]) for t in tokens],
            **clip,
        )
        if stale:
            num_stale += len(tokens)
        else:
            policy_loss += row_loss
            for k, t in enumerate(tokens):
                move_ratio(t, by_ratio[k])
                gradient[i, t] += direct[k]
        for k, t in enumerate(tokens):
            rho, w = math.exp(log_ratios[i, t]), float(penalty_weights[i][t])
            ratios.append(rho)
            if cut[k] and advantages[i] != 0:
                cut_low, cut_high = cut_low + (rho < 1), cut_high + (rho > 1)
            if entropies is not None:
                bonus += w * float(entropies[i][t])
            if kls is not None:
                used_kls.append(float(kls[i][t]))
                kl_loss += w * used_kls[-1]
            elif ref is not None:
                value, slope = kl(estimator.removeprefix("ratio_"), float(log_probs[i][t]), float(ref[i][t]))
                if estimator.startswith("ratio_"):
                    move_ratio(t, kl_coef * w * rho * value)
                    value, slope = rho * value, rho * slope
                used_kls.append(value)
                kl_loss += w * value
                gradient[i, t] += kl_coef * w * slope
    n = len(ratios)
    metrics = {
        "policy_loss": policy_loss,
        "kl": sum(used_kls) / n if used_kls else 0.0,
        "ratio_mean": sum(ratios) / n if n else 0.0,
        "ratio_max": max(ratios, default=0.0),
        "clip_low": cut_low / n if n else 0.0,
        "clip_high": cut_high / n if n else 0.0,
        "stale": num_stale / n if n else 0.0,
        "num_tokens": n,
    }
    return policy_loss + kl_coef * kl_loss - entropy_coef * bonus, gradient, metrics


def loss_of_logits(logits, ref_logits, tokens, old_log_probs, advantages, mask, weights, **choices):
    """grpo_loss as a function of the logits [B,T,V] of pi and the reference: (loss, gradient [B,T,V])."""
    exact = choices.get("estimator") == "exact"
    kl_coef, entropy_coef = choices.get("kl_coef", 0.0), choices.get("entropy_coef", 0.0)
    penalty_weights = choices.get("penalty_weights", weights)
    log_probs, ref, kls, entropies = (np.zeros(np.shape(mask)) for _ in range(4))
    gradient, by_log_prob = np.zeros(np.shape(logits)), np.zeros(np.shape(logits))
    for i, row in enumerate(mask):
        for t, m in enumerate(row):
            if not m:
                continue
            z, token, w = [float(x) for x in logits[i][t]], tokens[i][t], float(penalty_weights[i][t])
            log_probs[i, t], by_log_prob[i, t] = token_log_prob(z, token)
            ref[i, t], _ = token_log_prob([float(x) for x in ref_logits[i][t]], token)
            entropies[i, t], slopes = entropy(z)
            gradient[i, t] -= [entropy_coef * w * s for s in slopes]
            kls[i, t], slopes = kl_exact(z, [float(x) for x in ref_logits[i][t]])
            if exact:
                gradient[i, t] += [kl_coef * w * s for s in slopes]
    value, by_token, metrics = loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        weights,
        ref=ref,
        kls=kls if exact else None,
        entropies=entropies,
        **choices,
    )
    for i, row in enumerate(mask):
        for t, m in enumerate(row):
            if m:
                gradient[i, t] += by_token[i, t] * by_log_prob[i, t]
    return value, gradient, metrics


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
