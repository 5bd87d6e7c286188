"""From rows to prompts: templates, solved examples, system messages."""

import datetime
import json

import pytest

from grpo_jax.data.chat_rows import read_prompt
from grpo_jax.data.prompts import complete_prompt, make_prompt_form, row_prompt

SHOTS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": "4"}]
USER = {"role": "user", "content": "3+3="}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2="},
    {"role": "assistant", "content": "4"},
]


def test_template():
    form = make_prompt_form(
        prompt_template="Q: {{ q | upper }}{% if hint %} ({{ hint.text }}){% endif %}\nA:\n"
    )
    assert row_prompt(form, {"q": "why?", "hint": {"text": "because"}}) == "Q: WHY? (because)\nA:\n"
    assert row_prompt(form, {"q": "why?", "hint": None}) == "Q: WHY?\nA:\n"
    assert row_prompt(make_prompt_form(), {"prompt": "as it is {{ q }}"}) == "as it is {{ q }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ quesion }}", r"data\.prompt_template: 'quesion' is undefined; the columns are: question, n"),
        ("{{ question.text }}", r"'str object' has no attribute 'text'"),
        ("{{ 1 // n }}", r"data\.prompt_template: ZeroDivisionError: "),
        ("{{ ''.__class__.__mro__ }}", r"unsafe"),
        ("  {% if n %}x{% endif %}\n", r"data\.prompt_template makes an empty prompt of this row"),
    ],
)
def test_template_that_fails_on_a_row(template, message):
    with pytest.raises(ValueError, match=message):
        row_prompt(make_prompt_form(prompt_template=template), {"question": "1?", "n": 0})


@pytest.mark.parametrize("template", ["Q:\n{{ question", "Q:\n{% if %}", "a\n{{ x | no_such_filter }}"])
def test_a_text_that_is_not_a_template(template):
    with pytest.raises(ValueError, match=r"data\.prompt_template, line 2: \w+") as caught:
        make_prompt_form(prompt_template=template)
    assert "\n" not in str(caught.value)


def test_plain_text_with_solved_examples():
    form = make_prompt_form(few_shot=SHOTS, few_shot_separator="\n")
    assert complete_prompt(form, "3+3=") == "1+1=2\n2+2=4\n3+3="
    form = make_prompt_form(few_shot=[{"q": "1+1", "completion": " 2"}], prompt_template="Q: {{ q }}\nA:")
    assert complete_prompt(form, row_prompt(form, {"q": "3+3"})) == "Q: 1+1\nA: 2\n\nQ: 3+3\nA:"


def test_chat():
    def completed(prompt, **settings):
        return complete_prompt(make_prompt_form(**settings), prompt)

    assert completed("3+3=") == "3+3=" and completed([USER]) == [USER]
    assert completed("3+3=", system_prompt="Be brief.") == completed([USER], system_prompt="Be brief.")
    assert completed("3+3=", system_prompt="Be brief.") == [SYSTEM, USER]
    assert completed([SYSTEM, USER], system_prompt="Other.") == [SYSTEM, USER]
    assert completed([USER], few_shot=SHOTS) == [*TURNS, USER]
    assert completed([SYSTEM, USER], few_shot=SHOTS) == [SYSTEM, *TURNS, USER]
    assert completed("3+3=", few_shot=SHOTS, system_prompt="Be brief.") == [SYSTEM, *TURNS, USER]


def test_the_row_is_not_changed():
    prompt = [SYSTEM, USER]
    complete_prompt(make_prompt_form(few_shot=SHOTS, system_prompt="x"), prompt)
    assert prompt == [SYSTEM, USER]


def test_solved_examples_lack_a_column():
    with pytest.raises(ValueError, match=r"data\.few_shot\[1\]: `prompt` is missing; the keys are: question"):
        make_prompt_form(few_shot=[SHOTS[0], {"question": "1", "completion": "2"}])
    with pytest.raises(ValueError, match=r"data\.few_shot\[0\]: .*'q' is undefined; the columns are: prompt"):
        make_prompt_form(few_shot=SHOTS, prompt_template="{{ q }}")


def test_rows_without_a_usable_prompt():
    for prompt, message in (("", "is empty"), ([], "empty list"), (3, "not int"), ([3], "not 3")):
        with pytest.raises(ValueError, match=message):
            read_prompt(prompt)


ROW = {
    "question": "12+34",
    "hint": None,
    "level": float("nan"),
    "extra": {"hint": None, "level": 2.0, "tags": ["a", None]},
    "rate": 0.5,
}


@pytest.mark.parametrize(
    ("template", "column"),
    [
        ("{{ question }} ({{ hint }})=", "`hint`, which is null"),
        ("{{ hint | upper }}", "`hint`, which is null"),
        ("{{ hint | trim }}", "`hint`, which is null"),
        ("{{ question ~ hint }}", "`hint`, which is null"),
        ("{{ question + hint }}", "`hint`, which is null"),
        ("{{ '%s' | format(hint) }}", "`hint`, which is null"),
        ("{{ '{}'.format(hint) }}", "`hint`, which is null"),
        ("{{ [question, hint] | join(' ') }}", "`hint`, which is null"),
        ("{{ hint | default('none') }}", "`hint`, which is null"),
        ("{{ extra.hint }}", "`extra.hint`, which is null"),
        ("{{ extra['hint'] | string }}", "`extra.hint`, which is null"),
        ("{{ extra.tags | join(', ') }}", r"`extra.tags\[1\]`, which is null"),
        ("{{ extra }}", "`extra.hint`, which is null"),
        ("{% for tag in extra.tags %}{{ tag }}{% endfor %}", r"`extra.tags\[1\]`, which is null"),
        ("{{ level }}", r"`level`, which is NaN \(not a number\)"),
        ("{% if level %}({{ level }}){% endif %}", "`level`, which is NaN"),
        ("{{ 'level ' ~ level }}", "`level`, which is NaN"),
        ("{{ level + 1 }}", "the result of an expression that is NaN"),
        ("{{ {'a': 1}.get('b') }}", "the result of an expression that is null"),
    ],
)
def test_null_is_not_printed(template, column):
    """Seen: the prompts were `12+34 (None)=` and `None (x)=` (case data-31)."""
    form = make_prompt_form(prompt_template=template)
    with pytest.raises(ValueError, match=rf"data\.prompt_template prints {column} .*; test it there"):
        row_prompt(form, ROW)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ question }}{% if hint %} ({{ hint }}){% endif %}=", "12+34="),
        ("{{ hint or 'none' }}", "none"),
        ("{{ hint | default('no', true) }}", "no"),
        ("{{ 'a' if hint is none else 'b' }}{{ 'c' if hint is not none else 'd' }}", "ad"),
        ("{{ 'a' if hint == none else 'b' }}{{ 'a' if none == hint else 'b' }}", "aa"),
        ("{{ 'a' if hint is defined and not hint else 'b' }}", "a"),
        ("{{ extra.hint or extra.level }}", "2.0"),
        ("{{ extra.tags | select | join }}{{ extra.tags | reject('none') | list | length }}", "a1"),
        ("{% if level == level %}{{ level }}{% else %}unknown{% endif %}", "unknown"),
        ("{{ extra | tojson }}", '{"hint": null, "level": 2.0, "tags": ["a", null]}'),
        ("{{ rate * 2 }} {{ rate }}", "1.0 0.5"),
    ],
)
def test_null_may_be_tested(template, text):
    assert row_prompt(make_prompt_form(prompt_template=template), ROW) == text


USER_SAYS = {"role": "user", "content": "83+26"}


@pytest.mark.parametrize(
    "prompt",
    [
        [USER_SAYS],
        json.dumps([USER_SAYS]),
        " " + json.dumps([USER_SAYS], indent=2) + "\n",
        [{**USER_SAYS, "tool_calls": None, "name": None}],
        [{"role": "user", "content": [{"type": "text", "text": "83+26"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "83+26", "image_url": None}]}],
    ],
)
def test_chats_of_other_projects_that_are_read(prompt):
    assert read_prompt(prompt) == [USER_SAYS]


def test_prompts_that_are_kept_unchanged():
    for text in ("[1, 2] sorted is", "[{", "[{}]", '[{"a": 1}]', "['role'] is", "  x\n", "\U0001f600"):
        assert read_prompt(text) == text
    calls = [{"name": "add", "arguments": {"a": 1, "b": [2.5, True]}}]
    chat = [
        USER_SAYS,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "1"},
    ]
    assert read_prompt(chat) == chat and read_prompt([SYSTEM, *TURNS, USER]) == [SYSTEM, *TURNS, USER]
    row = [{**USER_SAYS, "name": None}]
    read_prompt(row)
    assert row == [{**USER_SAYS, "name": None}]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            [USER_SAYS, {"role": "assistant", "content": "109"}],
            "ends with a turn of the assistant, so it holds",
        ),
        ([USER_SAYS, {"role": "model", "content": "109"}], "ends with a turn of the model, so it holds"),
        (
            json.dumps([USER_SAYS, {"role": "assistant", "content": "109"}]),
            "ends with a turn of the assistant",
        ),
        ([SYSTEM], "has only system messages, and nothing to answer; add the user's turn"),
        ([SYSTEM, {"role": "developer", "content": "x"}], "has only developer messages"),
        ({"role": "user", "content": "83+26="}, "not dict; put the one message into a list"),
        (
            [{"from": "human", "value": "83+26="}],
            r"`prompt\[0\]` has `from` and `value`, the form of ShareGPT",
        ),
        (json.dumps([{"from": "human", "value": "x"}]), "the form of ShareGPT"),
        ([{"role": "user", "content": None}], r"`prompt\[0\]` needs a string `content`, got None"),
        ([{"role": None, "content": "x"}], r"`prompt\[0\]` needs a string `role`, got None"),
        ([{"role": "user", "content": ["a", "b"]}], r"got a list of 2 parts; a list of one part of text is"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"got a list of 1 parts; .*images are not supp"),
        (str([USER_SAYS]), r"the text of a Python list of messages; write it as JSON"),
        ([{**USER_SAYS, "at": datetime.datetime(2026, 1, 1)}], r"`prompt\[0\]\.at` is of type datetime; mes"),
        ([{**USER_SAYS, "raw": b"x"}], r"`prompt\[0\]\.raw` is of type bytes; messages hold text"),
        ([{**USER_SAYS, "calls": [{"a": {1}}]}], r"`prompt\[0\]\.calls\[0\]\.a` is of type set"),
        (b"83+26=", "must be a string or a list of messages, not bytes"),
        ("cut \ud83d", r"`prompt` holds half a character .*a lone surrogate, at position 4\)"),
        ([{"role": "user", "content": "\udc00"}], r"`prompt\[0\]\.content` holds half a character"),
        ([{**USER_SAYS, "calls": [{"\ud800": 1}]}], r"`prompt\[0\]\.calls\[0\]` holds half a character"),
    ],
)
def test_prompts_that_are_refused_in_one_line(prompt, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_prompt(prompt)
    assert "\n" not in str(caught.value) and str(caught.value).encode()  # a message that can be printed


def test_half_a_character_from_a_template():
    form = make_prompt_form(prompt_template="Q: {{ q }}")
    with pytest.raises(ValueError, match="half a character"):
        row_prompt(form, {"q": "\ud83d"})
    assert row_prompt(form, {"q": "x", "other": "\ud83d"}) == "Q: x"


def test_the_column_that_is_probably_the_prompt():
    with pytest.raises(ValueError, match=r"names one of them, such as {prompt: conversations}, data\.prompt"):
        row_prompt(make_prompt_form(), {"conversations": [], "answer": "1"})
    with pytest.raises(ValueError, match=r"data\.columns names one of them, data\.prompt_template"):
        row_prompt(make_prompt_form(), {"question": "", "input": ""})
