"""Makes the prompt that the model sees from a row: template, solved examples, system message."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.data.chat_rows import check_text, read_prompt
from grpo_jax.data.templates import Template, compile_template, render
from grpo_jax.types import Prompt


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """The form of every prompt: its template, and what is put before it.

    Args:
        template: template that makes the prompt from the row's columns. None means that the prompt is the
            column `prompt`.
        system_prompt: content of the system message. None adds none.
        shots: (prompt, completion) of the solved examples.
        separator: text after each example of a plain-text prompt.
    """

    template: Template | None = None
    system_prompt: str | None = None
    shots: tuple[tuple[Prompt, str], ...] = field(default=())
    separator: str = "\n\n"


def make_prompt_form(
    *,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    few_shot: Sequence[Mapping[str, str]] = (),
    few_shot_separator: str = "\n\n",
) -> PromptForm:
    """Compiles the template and renders the examples.

    Args:
        prompt_template: jinja2 source.
        system_prompt: content of the system message.
        few_shot: examples. Each has `completion` and the columns that make its prompt.
        few_shot_separator: text after each example of a plain-text prompt.

    Raises:
        ValueError: the template is broken, or an example lacks one of its columns.
    """
    template = None if prompt_template is None else compile_template(prompt_template)
    form = PromptForm(template=template, system_prompt=system_prompt, separator=few_shot_separator)
    shots: list[tuple[Prompt, str]] = []
    for i, shot in enumerate(few_shot):
        columns = {name: value for name, value in shot.items() if name != "completion"}
        try:
            shots.append((row_prompt(form, columns), shot["completion"]))
        except ValueError as error:
            raise ValueError(f"data.few_shot[{i}]: {error}") from None
    return PromptForm(
        template=template, system_prompt=system_prompt, shots=tuple(shots), separator=few_shot_separator
    )


def row_prompt(form: PromptForm, row: Mapping[str, Any]) -> Prompt:
    """Returns the prompt of a row, without examples and system message.

    Args:
        form: the form of the prompt, with or without a template.
        row: columns by name.

    Raises:
        ValueError: a column is missing, the template fails, or the result is not text.
    """
    if form.template is None:
        if "prompt" not in row:
            raise ValueError(
                f"`prompt` is missing; the keys are: {', '.join(row) or 'none'} (data.columns names one of "
                f"them{_likely_column(row)}, data.prompt_template makes it from them)"
            )
        prompt = read_prompt(row["prompt"])
    else:
        prompt = render(form.template, row)
        if not prompt.strip():
            raise ValueError("data.prompt_template makes an empty prompt of this row")
        check_text(prompt)
    return prompt


def prompt_text(prompt: Prompt) -> str:
    """Returns a text that is the same for prompts that are equal apart from white space."""
    parts = (
        [prompt] if isinstance(prompt, str) else [part for m in prompt for part in (m["role"], m["content"])]
    )
    return "\0".join(" ".join(part.split()) for part in parts)


def _likely_column(row: Mapping[str, Any]) -> str:
    """Returns a hint that names the column that is probably the prompt, or an empty string."""
    names = ("question", "problem", "messages", "conversations", "instruction", "query", "input")
    found = [name for name in names if name in row]
    return f", such as {{prompt: {found[0]}}}" if len(found) == 1 else ""


def complete_prompt(form: PromptForm, prompt: Prompt) -> Prompt:
    """Puts the solved examples and the system message before a prompt.

    Plain text becomes ``prompt + completion + separator`` of every example, then the prompt, and nothing else
    is inserted. In a chat, each example becomes a turn of the user and one of the assistant, after the system
    message. A chat that has a system message keeps it.

    Args:
        form: the form, which says what is added.
        prompt: text or messages, which are not changed.

    Returns:
        text, or messages if there is a system message or the prompt is a list.
    """
    if isinstance(prompt, str) and form.system_prompt is None:
        return "".join(q + a + form.separator for q, a in form.shots) + prompt
    messages = [_message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    system = [messages.pop(0)] if messages[0]["role"] == "system" else []
    if not system and form.system_prompt is not None:
        system = [_message("system", form.system_prompt)]
    turns = [_message(role, text) for q, a in form.shots for role, text in (("user", q), ("assistant", a))]
    return system + turns + messages


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
