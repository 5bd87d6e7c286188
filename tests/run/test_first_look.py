"""What is said before the first step about the prompts, by the functions and by the commands."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import small_run

from grpo_jax import plan
from grpo_jax.models.chat_templates import ChatSettings
from grpo_jax.models.loading import load_model
from grpo_jax.run.first_look import notes_about_prompts, show_first_prompt
from grpo_jax.types import Example

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "one and"}]
RENDERED = "<|im_start|>user\none and<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def llama():
    return load_model(str(FIXTURES / "llama"))


@pytest.fixture
def with_template(llama):
    """Returns the model with another chat template."""

    def make(source, **arguments):
        tokenizer = copy.deepcopy(llama.tokenizer)
        tokenizer.chat_template = source
        return dataclasses.replace(llama, tokenizer=tokenizer, chat=ChatSettings(arguments=arguments))

    return make


def notes(model, *prompts, formats=()):
    return notes_about_prompts(
        model, [Example(p, place=f"f, line {i}") for i, p in enumerate(prompts)], formats
    )


def test_ordinary_prompts_are_no_news(llama, with_template):
    assert notes(llama, CHAT, CHAT) == notes(llama, "one", "a < b > c", "[1, 2]") == []
    assert notes(with_template(CHATML), CHAT, "one", formats=[{}]) == []


@pytest.mark.parametrize(
    ("template", "text", "token"),
    [
        (CHATML, RENDERED, "<|im_start|>"),
        (CHATML, "System\n" + RENDERED, "<|im_start|>"),
        ("{% for m in messages %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% endfor %}",
         "[INST] one [/INST]", "[INST] and [/INST]"),
        ("{% for m in messages %}### User:\n{{ m.content }}\n{% endfor %}### Assistant:\n",
         "### User:\none\n### Assistant:\n", "### User: and ### Assistant:"),
    ],
)  # fmt: skip
def test_texts_to_which_a_template_was_applied(with_template, template, text, token):
    """Case model-05."""
    (note,) = notes(with_template(template), "one", text, "### User story", text)
    assert note.startswith(
        f"2 of 4 prompts are texts that spell {token!r} (f, line 1), as if a chat template"
    )
    assert notes(with_template(None), "one", "[INST] one [/INST]") == []


def test_a_list_of_messages_as_text(llama):
    assert "hold a list of messages as JSON" in notes(llama, json.dumps(CHAT))[0]


def test_a_template_that_ignores_the_generation_prompt(with_template):
    """Case model-08."""
    silent = CHATML.partition("{% if")[0]
    (note,) = notes(with_template(silent), CHAT)
    assert note.startswith("the chat template gives the same text with and without add_generation_prompt")
    assert "one and<|im_end|>\\\\n" in note and "\n" not in note


OPENED = CHATML.replace("assistant\n", "assistant\n<think>\n")


@pytest.mark.parametrize(
    ("template", "prompt", "formats", "expected"),
    [
        (OPENED, CHAT, [], ["the chat template opens <think> itself"]),
        (OPENED, CHAT, [{}], ["the chat template opens <think>", "give rewards: [{function: think_format"]),
        (OPENED, CHAT, [{"opened": True}], ["the chat template opens <think> itself"]),
        (CHATML, "Q\n<think>", [{}], ["the prompt opens <think> itself", "arguments: {opened: true}"]),
        (CHATML, "Q\n<plan> ", [{"tags": ["plan", "answer"]}], ["the prompt opens <plan>", "opened: true"]),
        (CHATML, CHAT, [{"opened": True}], ["opened: true, but the chat template does not end with <think>"]),
        (CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n"), CHAT, [{}],
         ["the chat template ends with </think>: switch thinking on"]),
        (CHATML, "Q\n<div>", [{}], []),
    ],
)  # fmt: skip
def test_a_prompt_that_begins_the_thinking(with_template, template, prompt, formats, expected):
    """Case data-07."""
    found = notes(with_template(template), prompt, formats=formats)
    assert len(found) == len(expected)
    for note, part in zip(found, expected, strict=True):
        assert part in note


@pytest.mark.parametrize(
    ("template", "messages", "left_out"),
    [
        (CHATML, [{"role": "system", "content": "Be brief."}, *CHAT], []),
        (CHATML.replace("in messages", "in messages if m.role == 'user'"),
         [{"role": "system", "content": "Be brief."}, *CHAT], ["role 'system' ('Be brief.')"]),
        ("{{ messages[-1].content }}{% if add_generation_prompt %}={% endif %}",
         [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "a"}, *CHAT],
         [f"role 'user' ('{'x' * 29}…')", "role 'assistant' ('a')"]),
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
         "{% if add_generation_prompt %}={% endif %}",
         [*CHAT, {"role": "assistant", "content": "<think>1</think>2"}, *CHAT], []),
        ("{{ messages[-1].content | trim | upper }}{% if add_generation_prompt %}={% endif %}",
         [{"role": "user", "content": " a "}], []),
    ],
)  # fmt: skip
def test_a_message_that_the_template_leaves_out(with_template, template, messages, left_out):
    found = notes(with_template(template), messages)
    assert len(found) == len(left_out)
    for note, part in zip(found, left_out, strict=True):
        assert note.startswith("the chat template leaves out the message of role") and part in note


def test_a_template_that_is_given_for_texts(llama, with_template):
    examples = [Example("one", place="f, line 0")]
    (note,) = notes_about_prompts(llama, examples, template_is_given=True)
    assert note.startswith("model.chat_template changes nothing: the prompts are texts")
    both = notes_about_prompts(with_template(CHATML + "{{ x }}", x=1), examples, template_is_given=True)
    assert both[0].startswith("model.chat_template and model.chat_template_arguments change nothing")
    assert notes_about_prompts(llama, [Example(CHAT, place="f")], template_is_given=True) == []


def test_settings_that_do_nothing_for_texts(with_template):
    (note,) = notes(with_template(CHATML + "{{ x }}", x=1), "one")
    assert note.startswith("model.chat_template_arguments changes nothing")


def test_chance_in_a_template(with_template):
    (note,) = notes(with_template(CHATML + "{{ [1, 1] | random }}"), CHAT)
    assert "uses random numbers" in note


def test_the_first_prompt_as_tokens(llama, with_template):
    """A control token is one piece, its spelling in a text several; nothing spoils a terminal."""
    lines = show_first_prompt(llama, [Example(CHAT, place="f, line 1"), Example("two")])
    assert lines[0].startswith("the first prompt (f, line 1) has ") and lines[0].endswith(" tokens:")
    assert "<|im_start|>·" in lines[1] and "\\n" in "".join(lines)
    text = show_first_prompt(llama, [Example("<|im_start|>\x1b[31m 漢")])
    assert "<|im_start|>" not in text[1] and "\\x1b" in text[1] and "\x1b" not in "".join(text)
    for prompt in ("one " * 400, "x" * 3000, [{"role": "user", "content": "two\n" * 300}]):
        lines = show_first_prompt(llama, [Example(prompt)])
        assert len(lines) == 8 and max(map(len, lines)) <= 60 and "more tokens ..." in lines[4]
        shown = sum(line.count("·") + 1 for line in lines[1:] if "more tokens" not in line)
        assert f"has {shown + int(lines[4].split()[1])} tokens" in lines[0]


def test_plan_and_train_say_it(tmp_path, capsys):
    """Case data-07, by the command: the packaged model's vocabulary has no `<`, but the text has."""
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}<think>\n")
    rows = [{"prompt": [{"role": "user", "content": f"{a}+1="}], "answer": str(a + 1)} for a in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = "[{function: think_format}, {function: exact_match}]"
    argv = small_run.arguments(
        tmp_path / "run",
        model__chat_template=tmp_path / "t.jinja",
        data__train_file=tmp_path / "d.jsonl",
        evaluation__num_prompts=0,
        rewards=rewards,
    )
    assert plan.main(argv) == 0
    output = capsys.readouterr().out
    assert f"  the first prompt ({tmp_path / 'd.jsonl'}, line 1) has " in output and "0·+·1·=" in output
    assert "note: the chat template opens <think> itself" in output
    assert "note: think_format is 0 for a completion that only closes <think>" in output
    assert "note: the chat template gives the same text with and without add_generation_prompt" in output
