"""GSM8K (https://arxiv.org/abs/2110.14168): word problems whose answers end in `#### 18`, read from rows."""

from typing import Any

from grpo_jax.data.tasks.task import HubData, RowTask
from grpo_jax.rewards.answers.extraction import find_numbers


def make_rows(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Uses the question as the prompt. The answer stays a column, with its derivation.

    Raises:
        ValueError: a column is missing, or the answer has no number after ####.
    """
    for name in ("question", "answer"):
        if name not in row:
            raise ValueError(
                f"gsm8k needs the column `{name}`; there are: {', '.join(row) or 'none'} (data.columns "
                f"names it: {{{name}: ...}})"
            )
        if not isinstance(row[name], str):
            raise ValueError(f"`{name}` must be text, not {type(row[name]).__name__}")
    _, mark, result = row["answer"].rpartition("####")
    if not mark or not find_numbers(result):
        raise ValueError(f"`answer` needs a number after ####, got {row['answer'][-60:]!r}")
    columns = {name: value for name, value in row.items() if name not in ("question", "prompt")}
    return [{"prompt": row["question"], **columns}]


GSM8K = RowTask(
    name="gsm8k",
    make_rows=make_rows,
    rewards=("numeric_answer",),
    hub=HubData(dataset="openai/gsm8k", config="main", train_split="train", eval_split="test"),
    eval_fraction=0.1,
)
