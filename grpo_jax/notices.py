"""One printed line when a run is in a state that people ask about."""

from collections.abc import Callable, Mapping

_REPEAT = 100  # steps before the same line may be printed again

_ALL_DEAD = (
    "every group's rewards are equal: no completion is better than its siblings, so this update teaches "
    "nothing (the policy loss and its gradient are exactly 0). Easier prompts, a larger group_size, a higher "
    "temperature or a reward with more grades help"
)
_TRUNCATED = (
    "every completion was cut off at max_new_tokens and every reward is 0: the model never ends its answers. "
    "Raise sampling.max_new_tokens, or check the model's eos id and prompt format"
)
_DISAGREE = (
    "sampler and scorer disagree by {sampling/logp_difference_max:.2g} nats on a sampled token "
    "(rounding is below 1e-3 in float32)"
)
_SKIPPED = "loss or gradient was not finite: the update was skipped ({skipped_updates:.0f} so far)"
_KEPT = (
    "top_k/top_p/min_p keep {sampling/kept_mass:.3f} of the probability: log-probs, ratios and KL are those "
    "of the full distribution, not of the truncated one that is sampled"
)
_LOSS_ZERO = (
    "a loss of 0 is not a bug: advantages are centred and the ratio is 1 on a fresh rollout, so the value "
    "cancels while the gradient (grad_norm) does not"
)


class Notices:
    """Decides which lines are due. State: when each was printed last."""

    def __init__(self):
        self._printed: dict[str, int] = {}

    def about(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Returns the lines due after this step's metrics; each at most every 100 steps."""
        lines = []
        for text, applies, once in _NOTICES:
            last = self._printed.get(text)
            if applies(metrics) and (last is None or (not once and step - last >= _REPEAT)):
                self._printed[text] = step
                lines.append(f"step {step}: {text.format_map(metrics)}")
        return lines


_NOTICES: tuple[tuple[str, Callable[[Mapping[str, float]], bool], bool], ...] = (
    (_ALL_DEAD, lambda m: m["frac_reward_zero_std"] == 1, False),
    (_TRUNCATED, lambda m: m["completions/clipped_ratio"] == 1 and m["reward"] == 0, False),
    (_DISAGREE, lambda m: m["sampling/logp_difference_max"] > 1e-1, False),
    (_SKIPPED, lambda m: m["skipped_updates_in_a_row"] > 0, False),
    (_KEPT, lambda m: m["sampling/kept_mass"] < 0.999, True),
    (
        _LOSS_ZERO,
        lambda m: abs(m["loss"]) < 1e-4 and m["grad_norm"] > 0 and m["frac_reward_zero_std"] < 1,
        True,
    ),
)
