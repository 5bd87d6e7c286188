"""From rows to prompts: templates, solved examples, system messages."""

import pytest

from grpo_jax.prompts import check_prompt, complete_prompt, make_prompt_form, row_prompt

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
def test_template_that_is_none(template):
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


def test_what_is_no_prompt():
    for prompt, message in (("", "is empty"), ([], "empty list"), (3, "not int"), ([3], "not 3")):
        with pytest.raises(ValueError, match=message):
            check_prompt(prompt)
