"""Reward functions: loading them, calling them, and those that come with the package.

The names below can be imported from here. Each loads its module when it is asked for.
"""

from grpo_jax.lazy_names import lazy_names

_MODULES = {
    "check_columns": "loading",
    "check_rows": "loading",
    "close_rewards": "loading",
    "load_rewards": "loading",
    "call_rewards": "calling",
    "score": "calling",
    "Reward": "reward",
    "RewardError": "reward",
    "REWARDS": "builtin",
}
__getattr__, __all__ = lazy_names(__name__, _MODULES)
