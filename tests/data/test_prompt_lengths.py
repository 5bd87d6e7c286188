"""Prompts above the limit of tokens: refused, dropped or truncated."""

import copy
import dataclasses
import gc
import json
import weakref
from collections.abc import Sequence

import pytest
import small_run

from grpo_jax import train
from grpo_jax.data import encoded_examples
from grpo_jax.data.prompt_lengths import Fitted, fit_prompts, prompt_limit
from grpo_jax.models import text
from grpo_jax.models.loading import encode, load_model
from grpo_jax.types import Example

TEMPLATE = "{% for m in messages %}{{ m['content'] }}={% endfor %}"  # each message is a token longer


@pytest.fixture(scope="module")
def model():
    """The packaged model: a token is a character."""
    model = load_model("packaged:arithmetic")
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return dataclasses.replace(model, tokenizer=tokenizer)


def chat(*texts, first="user"):
    """Messages of taking turns; `first` may be system."""
    roles = [first, *(["user", "assistant"] if first == "system" else ["assistant", "user"]) * len(texts)]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def truncated(model, prompt, limit):
    fitted = fit_prompts(
        [Example("1=", {"n": 1}), Example(prompt, {"n": 2})], model, limit, "truncate_left", "t"
    )
    assert fitted.examples[0] == Example("1=", {"n": 1}) and fitted.examples[1].columns == {"n": 2}
    assert (fitted.num_dropped, fitted.num_truncated) == (0, 1)
    cut = fitted.examples[1].prompt
    assert fitted.lengths == {2, len(encode(model, [cut])[0])} and max(fitted.lengths) <= limit
    return cut


def test_limit(model):
    assert prompt_limit(model, None, 5) == 27 and prompt_limit(model, 9, 5) == 9
    endless = dataclasses.replace(model, max_positions=None)
    assert prompt_limit(endless, None, 5) is None and prompt_limit(endless, 9, 500) == 9
    with pytest.raises(ValueError, match=r"max_prompt_length 28 \+ sampling\.max_new_tokens 5 exceed the 32"):
        prompt_limit(model, 28, 5)


def test_what_fits_is_left_alone(model):
    examples = [Example("1+1="), Example("22+1=")]
    for over_length in ("error", "drop", "truncate_left"):
        assert fit_prompts(examples, model, 5, over_length, "t") == Fitted(examples, frozenset({4, 5}))
        assert fit_prompts([], model, 5, over_length, "t") == Fitted([], frozenset())
    fitted = fit_prompts(examples, model, None, "error", "t").examples
    assert fitted == examples and fitted != examples[:1] and fitted[1:] == examples[1:]
    assert [list(e.tokens) for e in fitted] == encode(model, [e.prompt for e in examples])
    assert fitted[-1].tokens == fitted[1].tokens
    with pytest.raises(IndexError):
        fitted[2]


def test_error_and_drop(model):
    examples = [Example("1+1="), Example("22+1="), Example("22+33=")]
    with pytest.raises(
        ValueError, match=r"^2 of 3 t prompts have more than 4 tokens \(the first is number 1 with"
    ):
        fit_prompts(examples, model, 4, "error", "t")
    assert fit_prompts(examples, model, 4, "drop", "t") == Fitted(examples[:1], frozenset({4}), num_dropped=2)


def test_text_loses_its_beginning(model):
    assert truncated(model, "12+34+56=", 6) == "34+56="
    assert truncated(model, "12+34+56=", 2) == "6="


def test_tokens_that_are_added_count(model):
    """A tokenizer with a BOS leaves one token less for the text."""
    encoding = encode(model, ["12+34="])[0]

    class WithBos:
        def __init__(self, tokenizer):
            self._tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self._tokenizer, name)

        def __call__(self, texts, add_special_tokens=True, **kwargs):
            result = self._tokenizer(texts, add_special_tokens=False, **kwargs)
            if add_special_tokens:
                result["input_ids"] = [[0, *ids] for ids in result["input_ids"]]
                result["special_tokens_mask"] = [[1, *mask] for mask in result["special_tokens_mask"]]
            return result

    added = dataclasses.replace(model, tokenizer=WithBos(model.tokenizer))
    assert encode(added, ["12+34="])[0] == [0, *encoding]
    fitted = fit_prompts([Example("12+34+56=")], added, 6, "truncate_left", "t")
    assert fitted.examples[0].prompt == "4+56=" and fitted.lengths == {6}
    with pytest.raises(
        ValueError, match=r"t prompt 0 has 10 tokens and cannot be truncated at the left to 1: the chat"
    ):
        fit_prompts([Example("12+34+56=")], added, 1, "truncate_left", "t")


def test_chat_loses_its_oldest_turns(model):
    messages = chat("11111", "2", "3", "4", "5")
    assert truncated(model, messages, 6) == messages[2:]  # 2 * 3 tokens
    assert truncated(model, messages, 5) == messages[4:]
    with_system = chat("7", "11111", "2", "3", first="system")
    assert truncated(model, with_system, 5) == [with_system[0], with_system[3]]


def test_chat_of_one_turn_loses_its_beginning(model):
    (cut,) = truncated(model, chat("123456"), 4)
    assert cut == {"role": "user", "content": "456"}
    system, cut = truncated(model, chat("7", "123456", first="system"), 5)
    assert (system["content"], cut["content"]) == ("7", "56")
    messages = chat("1", "2", "123456")
    assert truncated(model, messages, 4) == [{"role": "user", "content": "456"}]
    assert messages[2]["content"] == "123456"


def test_chat_whose_system_message_is_too_long(model):
    for messages in (chat("1234567", "1", first="system"), chat("1234567", first="system")):
        with pytest.raises(
            ValueError, match=r"t prompt 0 has \d+ tokens and cannot be truncated at the left to 5"
        ):
            fit_prompts([Example(messages)], model, 5, "truncate_left", "t")


def test_prompts_that_cannot_be_encoded_have_a_place(model):
    """Seen: `prompt 1` of the whole file, without a line, and no way to leave such rows out."""
    examples = [Example("1+1=", place="a.jsonl, line 1"), Example("\ud83d", place="a.jsonl, line 2")]
    examples += [Example("2+2=", place="a.jsonl, line 4")]
    with pytest.raises(
        ValueError, match=r"^a\.jsonl, line 2: the prompt .* \(1 of 3 t rows; data\.on_bad_row"
    ):
        fit_prompts(examples, model, None, "error", "t")
    fitted = fit_prompts(examples, model, None, "error", "t", on_bad_row="drop")
    assert fitted.examples == [examples[0], examples[2]] and fitted.lengths == {4}
    assert fitted.note.startswith(
        "1 of 3 t rows are left out (data.on_bad_row: drop): a.jsonl, line 2: the p"
    )
    with pytest.raises(ValueError, match=r"^t prompt 0: the prompt "):
        fit_prompts([Example("\ud83d")], model, None, "error", "t")


class Lazy(Sequence):
    """Examples that are made when they are asked for, as a task may do."""

    def __init__(self, count):
        self.count, self.alive = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        example = Example(f"{index}+1=")
        self.alive.append(weakref.ref(example))
        return example


def test_problems_made_when_asked_for_are_not_held(model, monkeypatch):
    monkeypatch.setattr(encoded_examples, "_AT_ONCE", 16)
    lazy = Lazy(1000)
    fitted = fit_prompts(lazy, model, 5, "drop", "t")
    assert len(fitted.examples) == 100 and fitted.num_dropped == 900
    gc.collect()
    assert sum(ref() is not None for ref in lazy.alive) == 0
    assert model.tokenizer.decode(fitted.examples[42].tokens) == "42+1="


def test_prompts_that_the_model_cannot_be_given(model):
    """A row that spells a control token, or half a character, is a bad row; it does not end the run."""
    examples = [
        Example("1+1=", place="f.jsonl, line 1"),
        Example("1+\ud83d", place="f.jsonl, line 2"),
        Example(chat("12"), place="f.jsonl, line 3"),
        Example(chat("1<|endoftext|>"), place="f.jsonl, line 4"),
        Example("22+1=", place="f.jsonl, line 5"),
    ]
    with pytest.raises(ValueError) as error:
        fit_prompts(examples, model, None, "error", "training")
    message = str(error.value)
    assert message.startswith("f.jsonl, line 2: the prompt (") and "lone surrogate" in message
    assert "line 4: the prompt: a message spells the control token '<|endoftext|>'" in message
    assert "(2 of 5 training rows; data.on_bad_row: drop leaves them out)" in message
    fitted = fit_prompts(examples, model, 4, "drop", "training", on_bad_row="drop")
    assert fitted.examples == [examples[0], examples[2]] and fitted.num_dropped == 1
    assert fitted.note.startswith(
        "2 of 5 training rows are left out (data.on_bad_row: drop): f.jsonl, line 2"
    )
    cut = fit_prompts(examples, model, 4, "truncate_left", "training", on_bad_row="drop")
    assert [len(e.tokens) for e in cut.examples] == [4, 3, 4] and cut.num_truncated == 1
    nobody = dataclasses.replace(model, tokenizer=copy.deepcopy(model.tokenizer))
    nobody.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="line 3: the prompt is a list of messages, but the tokenizer"):
        fit_prompts(examples[2:4], nobody, None, "error", "training")


@pytest.mark.slow
@pytest.mark.usefixtures("shared_compilations")
def test_a_run_encodes_each_prompt_once(tmp_path, monkeypatch):
    """Case model-09: at the start, whatever number of steps and evaluations follow."""
    encoded = []
    original = text.render

    def noting(model, name, messages, control):
        encoded.append(messages[0]["content"])
        return original(model, name, messages, control)

    monkeypatch.setattr(text, "render", noting)
    (tmp_path / "plain.jinja").write_text(TEMPLATE)
    rows = [{"prompt": chat(f"{i}+{i}"), "answer": str(2 * i)} for i in range(1, 9)]
    bad = {"prompt": chat("3<|endoftext|>"), "answer": "3"}
    for name, content in (("train", [*rows[:6], bad]), ("held_out", rows[6:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    argv = small_run.arguments(
        tmp_path / "run",
        model__chat_template=tmp_path / "plain.jinja",
        data__train_file=tmp_path / "train.jsonl",
        data__eval_file=tmp_path / "held_out.jsonl",
        data__on_bad_row="drop",
        rewards="[{function: exact_match}]",
        training__num_steps=3,
        evaluation__every=1,
    )
    assert train.main(argv) == 0
    assert sorted(encoded) == sorted(row["prompt"][0]["content"] for row in [*rows, bad])
