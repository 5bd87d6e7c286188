"""The section `data` of the configuration: it says where prompts come from and how they are built."""

from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_jax.config.checks import check_ranges, require

DEFAULT_TASK = "arithmetic"
IN_MEMORY = "python:prompts"  # stands for prompts that a Python program gave as objects


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prompts: where they come from and how they are built.

    Args:
        task: name of a task. `arithmetic`, `addition`, `countdown` and `reasoning_gym:<name>` make their own
            problems. `gsm8k` and `completion` read train_file or dataset. A train_file alone replaces the
            default task. A task of your own is `package.module:name` or `path/file.py:name`, a function
            that returns a `grpo_jax.data.Task`.
        task_arguments: keyword arguments of the task.
        train_file: a file of rows, a glob such as `parts/*.jsonl`, or a list of these. The formats are
            .jsonl, .json, .csv and .tsv (with a header), .parquet, and .txt (one row per paragraph, in the
            column `text`). Text may be compressed, such as .jsonl.gz. Each row has a `prompt` (a string or a
            list of chat messages), and the other columns go to the rewards.
        eval_file: the held-out prompts, in the same formats.
        dataset: a data set of the Hugging Face hub, `owner/name`, or a local directory (extra `hub`).
        dataset_config: the data set's configuration, such as `main`.
        train_split: split of the data set that is trained on.
        eval_split: split of the data set that is held out.
        eval_fraction: approximate share of the training prompts that is held out. The text of a prompt alone
            decides whether it is. `null` means the task's own share, which is none for a file.
        columns: new names of columns, each with the name in the file: `{prompt: question, answer: solution}`.
            A name with dots reaches into nested columns: `{answer: reward_model.ground_truth}`.
        prompt_template: jinja2 template that makes the prompt from the row's columns.
        system_prompt: content of the system message. It turns string prompts into chat messages.
        few_shot: solved examples that are put before every prompt. Each has `completion`, and `prompt` or the
            columns of prompt_template. In plain text, prompt and completion are joined without further
            characters. In a chat they become turns of user and assistant.
        few_shot_separator: text after each example of a plain-text prompt.
        max_prompt_length: largest number of tokens of a prompt. `null` means as many as the model's positions
            leave for it.
        over_length: what happens to a longer prompt: `error`, `drop`, or `truncate_left` (a text loses its
            beginning, a chat its oldest turns). Dropped and truncated prompts are counted and reported.
        on_bad_row: what happens to a row that cannot be read, made into a prompt or judged by a reward:
            `error`, which names file and line, or `drop`, which counts such rows and reports the first
            reasons.
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
        check_ranges("data.", vars(self), _RANGES)
        require(
            self.train_file is None or self.dataset is None,
            "data.train_file and data.dataset are both given; prompts can come from only one of them",
        )
        require(
            self.eval_file is None or self.has_source,
            "data.eval_file is given without data.train_file; give both, or neither and a task",
        )
        unused = {"dataset_config": None, "train_split": "train", "eval_split": None}
        for name, default in unused.items():
            require(
                getattr(self, name) == default or self.dataset is not None,
                f"data.{name} is given without data.dataset; it selects a part of a data set",
            )
        held_out = [
            name
            for name, given in (
                ("eval_file", self.eval_file is not None),
                ("eval_split", self.eval_split is not None),
                ("eval_fraction", bool(self.eval_fraction)),
            )
            if given
        ]
        require(
            len(held_out) <= 1,
            f"{' and '.join(f'data.{name}' for name in held_out)} are both given; held-out prompts can "
            "come from only one of them",
        )
        for i, shot in enumerate(self.few_shot):
            require(
                "completion" in shot and len(shot) > 1,
                f"data.few_shot[{i}] needs `completion`, and `prompt` or the columns of "
                f"data.prompt_template; it has {', '.join(shot) or 'nothing'}",
            )

    @property
    def has_source(self) -> bool:
        """Says whether prompts come from a file or a data set."""
        return self.train_file is not None or self.dataset is not None


_RANGES = (
    ("max_prompt_length", lambda x: x >= 1, "at least 1 token"),
    ("eval_fraction", lambda x: 0 <= x < 1, "in [0, 1)"),
)
