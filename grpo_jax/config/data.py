"""The section `data` of the configuration: where prompts come from and what is made of them."""

from dataclasses import dataclass, field
from typing import Any, Literal

DEFAULT_TASK = "arithmetic"


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where prompts come from.

    Args:
        task: `arithmetic`, `addition`, `countdown` and `reasoning_gym:<name>` make their own problems;
            `gsm8k` and `completion` read train_file or dataset. The default gives way to a train_file.
        task_arguments: keyword arguments of the task.
        train_file: file of rows, a glob such as `parts/*.jsonl`, or a list of these. The formats are .jsonl,
            .json, .csv and .tsv (with a header), .parquet, and .txt (a row per paragraph, column `text`).
            Text may be compressed, such as .jsonl.gz. Each row has `prompt` (a string or a list of chat
            messages); other columns go to the rewards.
        eval_file: held-out prompts, likewise.
        dataset: a data set of the Hugging Face hub, `owner/name`, or a local directory (extra `hub`).
        dataset_config: the data set's configuration, such as `main`.
        train_split: split of dataset to train on.
        eval_split: split of dataset that is held out.
        eval_fraction: about this share of the training prompts is held out, by their text alone; None: the
            task's own, none for a file.
        columns: new name of a column: its name in the file, such as `{prompt: question, answer: solution}`.
            A name with dots reaches into nested columns: `{answer: reward_model.ground_truth}`.
        prompt_template: jinja2 template that makes the prompt from the row's columns.
        system_prompt: system message; it turns string prompts into chat messages.
        few_shot: solved examples put before every prompt; each has `completion`, and `prompt` or the columns
            of prompt_template. Plain text is joined as it stands; chat prompts get user/assistant turns.
        few_shot_separator: stands after each example of a plain-text prompt.
        max_prompt_length: limit in tokens; None: whatever the model's positions leave for the prompt.
        over_length: what happens to a longer prompt: `error`, `drop`, or `truncate_left` (it loses its
            beginning, a chat its oldest turns); counted and printed.
        on_bad_row: what happens to a row that cannot be read, made a prompt of or judged by a reward:
            `error`, which names file and line, or `drop`; counted and printed with the first reasons.
    """

    task: str = DEFAULT_TASK
    task_arguments: dict[str, Any] = field(default_factory=dict)
    train_file: str | list[str] | None = None
    eval_file: str | list[str] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    eval_fraction: float | None = None
    columns: dict[str, str] = field(default_factory=dict)
    prompt_template: str | None = None
    system_prompt: str | None = None
    few_shot: list[dict[str, str]] = field(default_factory=list)
    few_shot_separator: str = "\n\n"
    max_prompt_length: int | None = None
    over_length: Literal["error", "drop", "truncate_left"] = "error"
    on_bad_row: Literal["error", "drop"] = "error"

    def __post_init__(self):
        n, fraction = self.max_prompt_length, self.eval_fraction
        require(n is None or n >= 1, f"data.max_prompt_length: {n}; at least 1 token")
        require(fraction is None or 0 <= fraction < 1, f"data.eval_fraction: {fraction}; in [0, 1)")
        require(
            self.train_file is None or self.dataset is None,
            "data.train_file and data.dataset are both given; prompts come from one of them",
        )
        require(
            self.eval_file is None or self.has_source,
            "data.eval_file is given without data.train_file; give both, or neither and a task",
        )
        unused = {"dataset_config": None, "train_split": "train", "eval_split": None}
        for name, default in unused.items():
            require(
                getattr(self, name) == default or self.dataset is not None,
                f"data.{name} is given without data.dataset; it names a part of one",
            )
        held_out = [
            name
            for name, given in (
                ("eval_file", self.eval_file is not None),
                ("eval_split", self.eval_split is not None),
                ("eval_fraction", bool(fraction)),
            )
            if given
        ]
        require(
            len(held_out) <= 1,
            f"{' and '.join(f'data.{name}' for name in held_out)} are both given; held-out prompts come from "
            "one of them",
        )
        for i, shot in enumerate(self.few_shot):
            require(
                "completion" in shot and len(shot) > 1,
                f"data.few_shot[{i}] needs `completion`, and `prompt` or the columns of "
                f"data.prompt_template; it has {', '.join(shot) or 'nothing'}",
            )

    @property
    def has_source(self) -> bool:
        """Whether prompts come from a file or a data set."""
        return self.train_file is not None or self.dataset is not None
