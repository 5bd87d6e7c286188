"""One printed line when a run is in a state that people ask about. It says what that means and what to do.

Names and formulas of the metrics are in `grpo_jax.training.metrics`. Their healthy ranges
are in `grpo_jax/training/README.md`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from grpo_jax.trackers.jsonl import Metrics
from grpo_jax.types import Silence

_REPEAT = 100  # steps before the same line may be printed again


class _Notice(NamedTuple):
    applies: Callable[[Metrics], bool]
    text: str  # a format string over the metrics, `silent`, `slow` and their first rows, see `about`
    once: bool = False


class Notices:
    """Decides which lines are due. Its state is the step at which each line was printed last."""

    def __init__(self):
        self._printed: dict[str, int] = {}
        self._is_first = True

    def about(self, step: int, metrics: Metrics, silences: Sequence[Silence] = ()) -> list[str]:
        """Returns the lines that are due after this step, each at most every 100 steps.

        Args:
            step: number of optimizer steps so far.
            metrics: metrics of the last step.
            silences: rewards that said nothing about the last rollout. A reward that is the same for all
                completions is reported only at the first step, because later it may simply be bad luck.
        """
        facts = {
            **metrics,
            "silent": ", ".join(_silent(metrics)),
            "slow": _slow(metrics),
            "first_silent": _first(silences, "none"),
            "first_slow": _first(silences, "lost"),
        }
        lines = []
        for applies, text, once in _NOTICES:
            last = self._printed.get(text)
            if applies(metrics) and (last is None or (not once and step - last >= _REPEAT)):
                self._printed[text] = step
                lines.append(f"step {step}: {text.format_map(facts)}")
        told = [s for s in silences if s.kind == "some" or (s.kind == "lowest" and self._is_first)]
        for silence in told:
            if (key := f"{silence.kind} {silence.reward}") not in self._printed:
                self._printed[key] = step
                lines.append(f"step {step}: {silence.text}")
        self._is_first = False
        return lines


def _first(silences: Sequence[Silence], kind: str) -> str:
    """Returns a sentence with the first row of each silence of a kind."""
    return "".join(f". First of {s.reward}: {s.first}" for s in silences if s.kind == kind)


def _silent(m: Metrics) -> list[str]:
    """Lists the reward functions that gave no value for any completion."""
    names = (name for name, value in m.items() if name.endswith("/missing") and value == 1)
    return [name.removeprefix("rewards/").removesuffix("/missing") for name in names]


def _slow(m: Metrics) -> str:
    """Lists the reward functions that lost rows to their timeout, with the share of the rows."""
    lost = {name: value for name, value in m.items() if name.endswith("/timeouts") and value > 0}
    shares = (f"{k.removeprefix('rewards/').removesuffix('/timeouts')} ({v:.1%})" for k, v in lost.items())
    return ", ".join(shares)


def _masked_signal(m: Metrics) -> bool:
    """Says whether rewards differ only if completions that do not train are counted as well."""
    return m["frac_reward_zero_std"] == 1 and m["reward_std"] > 0


def _all_dead(m: Metrics) -> bool:
    # A KL term in the reward (policy_loss is not 0) still teaches something.
    dead = m["frac_reward_zero_std"] == 1 and m["policy_loss"] == 0 and not _masked_signal(m)
    return dead and "dynamic_sampling/rounds" not in m and not _silent(m)


def _on_policy(m: Metrics) -> bool:
    fresh = abs(m["ratio/max"] - 1) < 1e-3 and m["clip_ratio/region_mean"] == 0
    moving = m["grad_norm"] > 0 and m["frac_reward_zero_std"] < 1
    return fresh and moving and abs(m["policy_loss"]) < 1e-2


def _nothing_but_truncated(m: Metrics) -> bool:
    return m["completions/clipped_ratio"] == 1 and m["reward"] <= 0


def _miscorrected(m: Metrics) -> bool:
    far = abs(m.get("sampling/importance_mean", 1) - 1) > 0.05
    return far or m.get("sampling/importance_capped", 0) > 0.01


_EQUAL = "every group's rewards are equal: no completion is better than its siblings"
_UNEQUAL = (
    "Easier prompts, a larger algorithm.group_size, a higher sampling.temperature or a reward with more "
    "grades help"
)

_NOTICES = (
    _Notice(
        lambda m: _all_dead(m) and m["grad_norm"] == 0,
        f"{_EQUAL}, so this update teaches nothing and nothing moved ({{idle_updates:.0f}} idle updates so "
        f"far). {_UNEQUAL}",
    ),
    _Notice(
        lambda m: _all_dead(m) and m["grad_norm"] > 0,
        f"{_EQUAL}, so they teach nothing: only the KL term, or an entropy bonus, moved the policy. "
        f"{_UNEQUAL}",
    ),
    _Notice(
        lambda m: bool(_silent(m)),
        "no value for any completion from the reward {silent}, which is therefore left out, because None is "
        "not 0. Perhaps it looks for a column or a format that the data does not have{first_silent}",
    ),
    _Notice(
        lambda m: bool(_slow(m)),
        "some completions have no reward, as the call ran over its timeout or its worker died: {slow}. Raise "
        "the `timeout` of that reward, or lower its `rows_per_call`, so that a slow completion takes fewer "
        "others down with it{first_slow}",
    ),
    _Notice(
        _nothing_but_truncated,
        "every completion was cut off at max_new_tokens and none has a reward above 0: the model never ends "
        "its answers. Raise sampling.max_new_tokens, check the prompt format, or set what ends a completion "
        "with sampling.eos_token_ids (tokens) or sampling.stop (texts). The plan shows what ends it now",
    ),
    _Notice(
        lambda m: m["completions/clipped_ratio"] >= 0.5 and not _nothing_but_truncated(m),
        "{completions/clipped_ratio:.0%} of the completions were cut off at max_new_tokens, and their "
        "rewards judge unfinished text. Raise sampling.max_new_tokens, end completions with sampling.stop or "
        "sampling.eos_token_ids, leave truncated ones out with algorithm.mask_truncated, or penalise length "
        "with algorithm.overlong_buffer",
    ),
    _Notice(
        lambda m: m.get("dynamic_sampling/missing_groups", 0) > 0,
        "dynamic sampling found {dynamic_sampling/missing_groups:.0f} groups too few in "
        "{dynamic_sampling/rounds:.0f} rounds, and their rows in the batch are masked. Raise "
        "algorithm.max_sampling_rounds or algorithm.group_size, or choose prompts that the model solves "
        "sometimes",
    ),
    _Notice(
        lambda m: m.get("sampling/logp_difference_max", 0) > 1e-1 and "sampling/importance_mean" not in m,
        "sampler and scorer disagree by {sampling/logp_difference_max:.2g} nats on a sampled token "
        "(in float32, rounding explains less than 1e-3); algorithm.importance_cap corrects for it",
    ),
    _Notice(
        _miscorrected,
        "sampler and scorer are not the same policy: the importance weights average "
        "{sampling/importance_mean:.3f}, and {sampling/importance_capped:.1%} of the tokens are above "
        "algorithm.importance_cap. Look for the cause, such as model.dtype, before the cap hides it",
    ),
    _Notice(
        lambda m: m["skipped_updates_in_a_row"] > 0,
        "the loss or the gradient was not finite: the update was skipped ({skipped_updates:.0f} so far). "
        "Five skipped updates in a row stop the run. A lower training.learning_rate may help",
    ),
    _Notice(
        lambda m: m["grad_norm"] == 0 and (m["frac_reward_zero_std"] < 1 or _masked_signal(m)),
        "the gradient is exactly 0 and nothing moved ({idle_updates:.0f} idle updates so far): all that "
        "could train is masked as truncated, clipped, stale, or in groups of equal rewards",
    ),
    _Notice(
        lambda m: m["kl"] > 3,
        "the policy is {kl:.2g} nats per token from the reference, where less than 1 is usual (with k3, one "
        "outlier token is enough for this). If the rewards fall too, raise algorithm.kl_coef, set "
        "algorithm.kl_target, or lower training.learning_rate",
    ),
    _Notice(
        lambda m: m["ratio/max"] > 10,
        "the largest ratio pi / pi_old is {ratio/max:.3g}: the policy has moved far since the rollout, and "
        "where the advantage is negative the clip does not bound it. Lower algorithm.num_iterations, "
        "algorithm.num_minibatches or training.learning_rate, or set algorithm.dual_clip",
    ),
    _Notice(
        lambda m: m["stale_tokens"] > 0.2,
        "{stale_tokens:.0%} of the tokens are in completions dropped as stale. To keep them, lower "
        "algorithm.num_iterations, algorithm.num_minibatches or training.learning_rate, or raise "
        "algorithm.max_staleness",
    ),
    _Notice(
        lambda m: m["entropy"] < 0.01 and m["ratio/max"] > 0,  # in a batch without any token both are 0
        "the policy is all but deterministic ({entropy:.2g} nats per token): the completions of a prompt "
        "become equal and teach nothing. If that is too early, raise algorithm.clip_range_high or "
        "algorithm.entropy_coef, or lower training.learning_rate, so that it explores longer",
    ),
    _Notice(
        lambda m: m["sampling/kept_mass"] < 0.999,
        "top_k/top_p/min_p keep {sampling/kept_mass:.3f} of the probability: log-probs, ratios and KL are "
        "those of the full distribution, not those of the truncated one that is sampled from",
        once=True,
    ),
    _Notice(
        _on_policy,
        "a policy loss near 0 and a clip_ratio of 0 are no bugs: the ratio is 1 on a fresh rollout, so "
        "nothing is clipped and centred advantages cancel; the gradient does not (grad_norm {grad_norm:.2g})",
        once=True,
    ),
)
