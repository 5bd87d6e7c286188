"""The metrics of a step about which there is nothing to say."""

CALM = {
    "reward": 0.5,
    "frac_reward_zero_std": 0.25,
    "reward_std": 0.4,
    "rewards/exact_match/mean": 0.5,
    "rewards/exact_match/missing": 0.0,
    "completions/clipped_ratio": 0.1,
    "sampling/logp_difference_max": 1e-5,
    "sampling/kept_mass": 1.0,
    "loss": 0.01,
    "policy_loss": 0.01,
    "kl": 0.1,
    "entropy": 0.4,
    "ratio/mean": 1.01,
    "ratio/max": 1.6,
    "clip_ratio/region_mean": 0.1,
    "stale_tokens": 0.0,
    "grad_norm": 1.0,
    "skipped_updates": 0.0,
    "skipped_updates_in_a_row": 0.0,
    "idle_updates": 0.0,
}
