"""The reward functions of a config of `trl grpo`, as ours."""

from typing import Any

from grpo_jax.config.translation import Translation

# TRL's think_format_reward matches this at the start of the completion, with dots that match newlines.
_THINK = r"(?s)\A<think>(?!.*<think>)(.*?)</think>"
# What `trl grpo` passes to get_soft_overlong_punishment: the longest completion, and the tokens before.
_OVERLONG = (1280, 256)


def reward_entries(out: Translation) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Returns the entries of our `rewards`, and the renamed columns that they need."""
    names = out.get("reward_funcs") or []
    names = [names] if isinstance(names, str) else list(names)
    model = out.get("reward_model_name_or_path")
    functions = [model, *names] if model is not None else names
    weights = out.get("reward_weights")
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions):
        said = f"reward_weights: {len(weights)} weights for {len(functions)} reward functions"
        out.problems.append(("reward_weights", said))
        return [], {}
    if not functions:
        out.problems.append(("reward_funcs", "reward_funcs is missing; without a reward there is no signal"))
        return [], {}
    entries = []
    solution_readers = [name for name in names if name in ("accuracy_reward", "reasoning_accuracy_reward")]
    for name, weight in zip(functions, weights, strict=True):
        entry = {"function": "reward_model", "arguments": {"model": model}} if name is model else None
        entry = entry or _entry(out, str(name), float(weight))
        if entry is not None:
            entries.append(entry if float(weight) == 1.0 else {**entry, "weight": float(weight)})
    if not entries and not out.problems:
        said = "reward_funcs: no function is left that has a counterpart, so there would be no signal"
        out.problems.append(("reward_funcs", said))
    # Ours reads the column `answer`; functions of the user's own may still read `solution`.
    own = any(":" in entry["function"] for entry in entries)
    columns = {"answer": "solution"} if solution_readers else {}
    return entries, {**columns, "solution": "solution"} if columns and own else columns


def _entry(out: Translation, name: str, weight: float) -> dict[str, Any] | None:
    """Returns the entry of one reward function of TRL, or None if it has none."""
    if name == "accuracy_reward":
        out.differs.append(
            "reward_funcs: accuracy_reward; math_answer also accepts what its own rules accept, "
            'and needs the extra: pip install "grpo-jax[math]"'
        )
        return {"function": "math_answer"}
    if name == "reasoning_accuracy_reward":
        out.differs.append(
            "reward_funcs: reasoning_accuracy_reward; math_answer does not ask for a closed </think> before "
            'the answer, and needs the extra: pip install "grpo-jax[math]"'
        )
        return {"function": "math_answer"}
    if name == "think_format_reward":
        return {"function": "regex_format", "arguments": {"pattern": _THINK, "search": True}}
    if name == "get_soft_overlong_punishment":
        _overlong(out, weight)
        return None
    if "." in name and ":" not in name:  # a dotted path of Python
        module, _, function = name.rpartition(".")
        return {"function": f"{module}:{function}"}
    if name in ("get_cosine_scaled_reward", "get_repetition_penalty_reward"):
        said = f"reward_funcs: {name} makes a reward function; `trl grpo` refuses the name, too"
    else:
        said = f"reward_funcs: {name} is no function that `trl grpo` knows, and no dotted path"
    out.problems.append(("reward_funcs", said))
    return None


def _overlong(out: Translation, weight: float) -> None:
    longest, buffer = _OVERLONG
    limit = out.number("max_completion_length", int) or 512
    name = "reward_funcs: get_soft_overlong_punishment"
    if limit == longest and weight == 1.0:
        out.settings["algorithm.overlong_buffer"] = buffer
    elif limit <= longest - buffer:
        out.differs.append(
            f"{name}; it begins at {longest - buffer} tokens, and a completion has at most {limit}, so it is "
            "left out"
        )
    else:
        out.missing.append(
            f"{name}; algorithm.overlong_buffer ends at sampling.max_new_tokens ({limit}), with weight "
            f"1, and TRL's ends at {longest}"
        )
