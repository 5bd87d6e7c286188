"""The rewards that a config names, the rows that they can judge, and what counts as correct."""

from collections.abc import Sequence
from dataclasses import replace

from grpo_jax.config.in_memory import label_of
from grpo_jax.config.run import Config, RewardConfig
from grpo_jax.data.bad_rows import BadRow, settle
from grpo_jax.data.loading import Task
from grpo_jax.evaluation.verdicts import Correct, choose_correct, note_on_choice
from grpo_jax.rewards.loading import Reward, check_columns, check_rows, load_rewards
from grpo_jax.types import Example


def load_named_rewards(config: Config, task: Task) -> tuple[tuple[Reward, ...], tuple[Reward, ...]]:
    """Returns (the rewards that train, those of evaluation alone). All have different names."""
    specs = config.rewards or [
        RewardConfig(function=name, arguments=dict(task.reward_arguments.get(name, {})))
        for name in task.rewards
    ]
    if not specs:
        raise ValueError(
            "rewards: none are given, and prompts from a file have none of their own; "
            "name at least one, such as rewards: [{function: exact_match}]"
        )
    if not any(spec.weight for spec in specs):
        raise ValueError("rewards: every weight is 0, so nothing would be learned; give one another weight")
    only_logged = config.evaluation.rewards
    for spec in only_logged:
        if spec.weight != 1:
            raise ValueError(
                f"evaluation.rewards: {label_of(spec.function)} has the weight {spec.weight}, but "
                "these rewards are logged one by one and never added up; leave the weight out"
            )
    loaded = load_rewards([*specs, *only_logged])
    return loaded[: len(specs)], loaded[len(specs) :]


def check_data_columns(task: Task, rewards: Sequence[Reward], eval_rewards: Sequence[Reward]) -> None:
    """Checks that the data has the columns that the rewards ask for."""
    check_columns(rewards, task.train[0].columns)
    if task.evaluation:
        check_columns([*rewards, *eval_rewards], task.evaluation[0].columns)


def drop_bad_rows(
    config: Config, task: Task, rewards: Sequence[Reward], eval_rewards: Sequence[Reward], notes: list[str]
) -> Task:
    """Checks every row with the rewards that will judge it, and returns the task with the rows that are left.

    Rows that are dropped are noted.

    Raises:
        ValueError: a reward cannot judge a row, and data.on_bad_row is `error`.
    """
    sides = {
        "training": (task.train, rewards),
        "evaluation": (task.evaluation, (*rewards, *eval_rewards)),
    }
    kept: list[Sequence[Example]] = []
    for what, (examples, judges) in sides.items():
        reasons = dict(check_rows(judges, examples))
        bad = [
            BadRow(examples[index].place or f"{what} prompt {index}", reason)
            for index, reason in reasons.items()
        ]
        note = settle(bad, len(examples), on_bad_row=config.data.on_bad_row, what=what)
        notes += [note] if note else []
        kept.append([e for i, e in enumerate(examples) if i not in reasons] if bad else examples)
    return replace(task, train=kept[0], evaluation=kept[1])


def choose_rule(
    config: Config, task: Task, rewards: Sequence[Reward], eval_rewards: Sequence[Reward], notes: list[str]
) -> Correct:
    """Returns the rule of what counts as correct. A choice between several rewards is noted."""
    wanted = config.evaluation.correct
    correct = choose_correct(
        rewards,
        eval_rewards,
        columns=task.train[0].columns,
        name=wanted.reward,
        threshold=wanted.threshold,
    )
    evaluates = bool(task.evaluation) and config.evaluation.num_prompts > 0
    note = note_on_choice(correct, rewards, eval_rewards)
    if evaluates and wanted.reward is None and note is not None:
        notes.append(note)
    return correct
