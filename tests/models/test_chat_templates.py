"""Chat templates: what they are given, and that a prompt is a function of the data, not of the clock."""

import dataclasses
import datetime
import importlib
import json
import shutil
from pathlib import Path

import pytest
import small_run
import transformers.utils.chat_template_utils
import yaml

from grpo_jax import train
from grpo_jax.models import chat_templates
from grpo_jax.models.chat_templates import check_arguments
from grpo_jax.models.loading import encode, load_model
from grpo_jax.rewards.classifier import encode_texts
from grpo_jax.run.directory import load_run, read_config
from grpo_jax.score import main as score

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
MESSAGES = "{% for m in messages %}{{ m.content }}{% endfor %}"
# The vocabulary of the packaged model has digits and `+ =`.
DAILY = "{{ strftime_now('%d%m') }}+" + MESSAGES + "{% if add_generation_prompt %}={% endif %}"
# As Llama 3.2 does, and as Qwen 3 does.
DATE_STRING = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ date_string }}\n" + MESSAGES
)
THINKING = (
    "{{ bos_token }}"
    + MESSAGES
    + "{% generation %}{% if enable_thinking is defined and enable_thinking is false %}0{% endif %}"
    + "{% endgeneration %}"
)


def chat(text="1+2"):
    return [{"role": "user", "content": text}]


@pytest.fixture
def template(tmp_path):
    """Writes a template and returns its path."""

    def write(source, name="template.jinja"):
        (tmp_path / name).write_text(source)
        return str(tmp_path / name)

    return write


@pytest.fixture
def day(monkeypatch):
    """Sets the clock, for us and for transformers."""

    def set_day(text):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(text)

        for module in (chat_templates, transformers.utils.chat_template_utils):
            monkeypatch.setattr(module, "datetime", Clock)

    return set_day


def test_a_prompt_is_the_same_on_every_day(template, day):
    """Case data-23."""
    day("2026-04-30T23:59:00")
    model = load_model("packaged:arithmetic", chat_template=template(DAILY))
    first = encode(model, [chat()])
    assert model.tokenizer.decode(first[0]) == "3004+1+2="
    for later in ("2026-05-01", "2026-08-31", "2026-09-01"):
        day(later)
        assert encode(model, [chat()]) == first
    fixed = load_model("packaged:arithmetic", chat_template=template(DAILY), chat_template_date="2026-04-30")
    assert encode(fixed, [chat()]) == first
    with pytest.raises(
        ValueError, match=r"model\.chat_template_date: 'tomorrow' is no date; write it as 2026-"
    ):
        load_model("packaged:arithmetic", chat_template_date="tomorrow")


@pytest.fixture
def argv(tmp_path, template):
    """Arguments of a run of chats through a template that prints the date."""
    rows = [{"prompt": chat(f"{a}+{a}"), "answer": str(2 * a)} for a in range(1, 9)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(run_dir, steps, **changes):
        settings = {
            "model__chat_template": template(DAILY),
            "data__train_file": tmp_path / "chat.jsonl",
            "rewards": "[{function: exact_match}]",
            "training__num_steps": steps,
            "checkpoints__every": 2,
            "tracking__completions_every": 1,
            "evaluation__num_prompts": 0,
        }
        return small_run.arguments(tmp_path / run_dir, **(settings | changes))

    return make


@pytest.mark.slow
@pytest.mark.usefixtures("shared_compilations")
def test_a_run_keeps_the_date_of_its_first_start(argv, day, tmp_path, capsys):
    """Case model-04: continued on another day, a run is the run of one day, bit for bit."""
    day("2026-11-28T09:30:00.123")
    assert train.main(argv("whole", 4)) == 0
    assert train.main(argv("cut", 2)) == 0
    assert read_config(tmp_path / "cut").model.chat_template_date == "2026-11-28T09:30:00"
    capsys.readouterr()
    assert score([*argv("cut", 4), "--num_prompts=1", "--num_samples=2", "--json=true"]) == 0
    assert "it is 2026-11-28" in capsys.readouterr().out
    day("2027-01-01")
    assert train.main(argv("cut", 4)) == 0
    assert "it is 2026-11-28" in capsys.readouterr().out
    for name in ("metrics", "completions"):
        assert small_run.rows(tmp_path / "cut", name) == small_run.rows(tmp_path / "whole", name)
    # Whoever uses the run renders as it did, and a run that goes on elsewhere as well.
    model, _ = load_run(tmp_path / "cut")
    assert model.tokenizer.decode(encode(model, [chat()])[0]) == "2811+1+2="
    assert train.main(argv("other", 6, checkpoints__resume=tmp_path / "cut")) == 0
    assert read_config(tmp_path / "other").model.chat_template_date == "2026-11-28T09:30:00"
    with pytest.raises(
        ValueError, match=r"model\.chat_template_date is '2026-11-28T09:30:00' there and '2027"
    ):
        train.main(argv("cut", 4, model__chat_template_date="2027-01-01"))


def test_a_date_of_the_config_is_read_as_it_is_written(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {chat_template_date: 2026-11-28}\nrun_dir: run\n")
    config = small_run.parse_record(
        small_run.Config, ["--config", str(tmp_path / "c.yaml")], command="test", description=""
    )
    assert config.model.chat_template_date == "2026-11-28"


@pytest.mark.parametrize("where", ["file", "command line"])
def test_arguments_are_read_as_they_are_written(tmp_path, where):
    text = '{a: "x: y", b: "007", c: false, d: 3, e: [1, "2"], f: 26 Jul 2024, g: 2026-11-28}'
    wanted = {
        "a": "x: y",
        "b": "007",
        "c": False,
        "d": 3,
        "e": [1, "2"],
        "f": "26 Jul 2024",
        "g": "2026-11-28",
    }
    (tmp_path / "c.yaml").write_text(f"model: {{chat_template_arguments: {text}}}")
    argv = ["--config", str(tmp_path / "c.yaml")]
    if where == "command line":
        argv = [f"--model.chat_template_arguments={text}", "--model.chat_template_arguments.h=false"]
        wanted["h"] = False
    config = small_run.parse_record(small_run.Config, argv, command="test", description="")
    assert config.model.chat_template_arguments == wanted


def test_the_date_of_a_model_of_rewards_does_not_move(template, day):
    day("2026-11-28")
    model = load_model(str(FIXTURES / "llama"), chat_template=template(DATE_STRING))
    first = encode_texts(model, [chat("one")], [[{"role": "assistant", "content": "two"}]])
    day("2027-01-01")
    assert encode_texts(model, [chat("one")], [[{"role": "assistant", "content": "two"}]]) == first


def test_arguments_reach_the_template(template):
    path = template(THINKING)
    plain = load_model(str(FIXTURES / "llama"), chat_template=path)
    off = load_model(
        str(FIXTURES / "llama"), chat_template=path, chat_template_arguments={"enable_thinking": False}
    )
    on = load_model(
        str(FIXTURES / "llama"), chat_template=path, chat_template_arguments={"enable_thinking": True}
    )
    text = off.tokenizer.decode(encode(off, [chat("one")])[0])
    assert text == plain.tokenizer.decode(encode(plain, [chat("one")])[0]) + "0"
    assert encode(on, [chat("one")]) == encode(plain, [chat("one")])
    dated = load_model(
        str(FIXTURES / "llama"),
        chat_template=template(DATE_STRING),
        chat_template_arguments={"date_string": "26 Jul 2024"},
    )
    assert dated.tokenizer.decode(encode(dated, [chat("one")])[0]) == "26 Jul 2024\none"


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (THINKING, {"enable_thinkin": 0}, "not use 'enable_thinkin'; did you mean 'enable_thinking'? it"),
        (THINKING, {"date_string": "x"}, "does not use 'date_string'; it uses enable_thinking"),
        (DATE_STRING, {"enable_thinking": True}, "does not use 'enable_thinking'; it uses date_string"),
        (MESSAGES, {"enable_thinking": True}, "does not use 'enable_thinking'; it uses none"),
        (THINKING, {"messages": []}, "does not use 'messages'; it uses enable_thinking"),
        (THINKING, {"bos_token": "x"}, "does not use 'bos_token'; it uses enable_thinking"),
        ("{% macro f(x) %}{{ x }}{{ tools }}{% endmacro %}", {"x": 1}, "does not use 'x'; it uses tools"),
        (None, {"enable_thinking": True}, "the tokenizer of m has no chat template to give them to"),
    ],
)  # fmt: skip
def test_an_argument_that_the_template_does_not_use_is_refused(source, arguments, message):
    tokenizer = load_model(str(FIXTURES / "gpt2")).tokenizer
    tokenizer.chat_template = source
    with pytest.raises(ValueError) as error:
        check_arguments(tokenizer, arguments, "m")
    assert str(error.value).startswith("model.chat_template_arguments: ") and message in str(error.value)


def test_tools_go_to_the_template_for_tools():
    tokenizer = load_model(str(FIXTURES / "gpt2")).tokenizer
    tokenizer.chat_template = {"default": MESSAGES, "tool_use": "{{ tools[0].name }}" + MESSAGES}
    tools = [{"name": "calculator"}]
    check_arguments(tokenizer, {"tools": tools}, "m")
    with pytest.raises(ValueError, match="does not use 'documents'; it uses tools"):
        check_arguments(tokenizer, {"tools": tools, "documents": []}, "m")


@pytest.mark.slow
def test_arguments_of_a_run_are_those_of_whoever_uses_it(argv, template, tmp_path, monkeypatch):
    path = template(DAILY.replace("strftime_now('%d%m')", "first | default('7')"), "other.jinja")
    changes = {
        "model__chat_template": path,
        "model__chat_template_arguments": "{first: '9'}",
        "training__batch_size": 8,
        "sampling__max_new_tokens": 2,
    }
    assert train.main(argv("run", 1, **changes)) == 0
    rows = small_run.rows(tmp_path / "run", "completions")
    assert rows[0]["prompt"][0]["role"] == "user"
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["chat_template_arguments"] == {"first": 9}
    assert config["model"]["chat_template_date"] is None  # this template does not ask for it
    model, _ = load_run(tmp_path / "run")
    assert model.tokenizer.decode(encode(model, [chat()])[0]) == "9+1+2="
    prompts = []

    def noting(model, given):
        prompts.append(model.tokenizer.decode(encode(model, given)[0]))
        return encode(model, given)

    command = importlib.import_module("grpo_jax.generate")  # the package has a function of that name
    monkeypatch.setattr(command, "encode", noting)
    for name in ("run", "run/hf"):
        argv = [f"--model={tmp_path / name}", "--prompt=1+2", "--chat", "--max_new_tokens=2"]
        assert command.main(argv) == 0
    assert prompts == ["9+1+2=", "9+1+2="]


def test_messages_that_spell_control_tokens():
    """Only what the data says counts, as text; a role may have the name of a token."""
    model = load_model(str(FIXTURES / "llama"))
    tokenizer = model.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["user", 'a"b', "line\nbreak"]})
    model = dataclasses.replace(model, tokenizer=tokenizer)
    assert encode(model, [chat("one")])
    for content, token in (('x a"b', 'a"b'), ("x line\nbreak", "line\nbreak"), ("the user", "user")):
        with pytest.raises(ValueError) as error:
            encode(model, [chat("one"), chat(content)])
        assert f"prompt 1: a message spells the control token {token!r}" in str(error.value)
    for message in (
        {"role": "user<|im_end|>", "content": "one"},
        {"role": "user", "content": "one", "tool_calls": [{"name": "<|im_end|>"}]},
        {"role": "user", "content": "one", "name": "<|im_start|>"},
    ):
        with pytest.raises(ValueError, match="a message spells the control token"):
            encode(model, [[message]])


def test_special_tokens_are_found_once(monkeypatch):
    """Case model-09: the table of added tokens, slow to make, is not made for each prompt."""
    model = load_model(str(FIXTURES / "llama"))
    calls = []
    cls = type(model.tokenizer)
    table = cls.added_tokens_decoder
    monkeypatch.setattr(
        cls, "added_tokens_decoder", property(lambda self: calls.append(1) or table.fget(self))
    )
    encode(model, [chat("one"), chat("two"), "three"])
    assert calls
    calls.clear()
    for text in ("one", "two", "the answer"):
        encode(model, [chat(text), text])
    assert not calls


def test_a_text_is_not_followed_by_an_eos(tmp_path):
    """Case model-06: `add_eos_token`, in the post-processor of tokenizer.json."""
    shutil.copytree(FIXTURES / "llama", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    plain = encode(load_model(str(tmp_path / "model")), ["one and", "two"])
    single = content["post_processor"]["single"]
    single.append({"SpecialToken": {"id": "<|im_end|>", "type_id": 0}})
    content["post_processor"]["special_tokens"]["<|im_end|>"] = {
        "id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"],
    }  # fmt: skip
    file.write_text(json.dumps(content))
    model = load_model(str(tmp_path / "model"))
    assert model.tokenizer("one and")["input_ids"] == [*plain[0], 2]
    assert encode(model, ["one and", "two"]) == plain
    # What BOS == EOS could be taken for: this tokenizer puts no BOS before a text.
    single.pop(0)
    file.write_text(json.dumps(content))
    assert encode(load_model(str(tmp_path / "model"), chat_template="plain"), [chat("one")])[0][0] != 0


@pytest.mark.parametrize("prompt", ["cut \ud83d", chat("cut \udc00 in half")])
def test_half_a_character_is_one_line(prompt):
    """Case model-07, where the data did not refuse it before."""
    model = load_model(str(FIXTURES / "llama"))
    with pytest.raises(ValueError) as error:
        encode(model, ["one", "two", prompt, chat("three")])
    assert str(error.value).startswith("prompt 2 (") and "is a lone surrogate" in str(error.value)
    assert "\n" not in str(error.value)
    str(error.value).encode()
