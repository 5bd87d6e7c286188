"""What ends a completion: every token that a model names, or what the user gives; and what is said of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from grpo_jax import plan
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config, SamplingConfig
from grpo_jax.models.endings import describe_endings, find_eos
from grpo_jax.models.loading import encode, load_model, pad_prompts, save_model, set_endings
from grpo_jax.policy.decoding import generate
from grpo_jax.run.build import build
from grpo_jax.run.directory import load_model_or_run

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
END, TURN_END = 0, 2  # <|endoftext|>, <|im_end|>


@pytest.fixture
def directory(tmp_path):
    """A copy of a model with a chat template whose turns end with <|im_end|>."""
    shutil.copytree(FIXTURES / "llama", tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def name_eos(directory, *, generation=..., config=..., tokenizer=...):
    """Lets the three files name these eos tokens, or none."""
    edit(directory / "generation_config.json", eos_token_id=generation)
    edit(directory / "config.json", eos_token_id=config)
    edit(directory / "tokenizer_config.json", eos_token=tokenizer)
    edit(directory / "special_tokens_map.json", eos_token=tokenizer)


def refusal(directory, **keywords):
    with pytest.raises(ValueError) as error:
        load_model(str(directory), **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("named", "ids"),
    [
        ({"generation": 0, "config": 0, "tokenizer": "<|im_end|>"}, (0, 2)),
        ({"generation": 2, "config": 0, "tokenizer": "<|endoftext|>"}, (2, 0)),
        ({"generation": [2, 0, 2], "config": 1}, (2, 0, 1)),
        ({"generation": [0], "config": [0, 2]}, (0, 2)),
        ({"generation": [], "config": 1}, (1,)),
        ({"config": None, "tokenizer": "<|im_end|>"}, (2,)),  # not the 2 that the class LlamaConfig has
        ({"config": 1, "tokenizer": "<|im_end|>"}, (1, 2)),
    ],
)
def test_every_token_that_is_named_ends_a_completion(directory, named, ids):
    """Was: the first file that named one counted alone, without a word (model-06, data-34)."""
    name_eos(directory, **named)
    assert load_model(str(directory)).eos_ids == ids


def test_the_configuration_of_the_text_part_of_a_model_counts():
    tokenizer = SimpleNamespace(
        eos_token_id=None, special_tokens_map={}, init_kwargs={}, get_vocab=lambda: {"a": 0, "b": 1, "c": 2}
    )
    raw = {"eos_token_id": None, "text_config": {"eos_token_id": [1, 2]}}
    found = find_eos({}, raw, tokenizer, vocab_size=3, source="m")
    assert found == dict.fromkeys((1, 2), "text_config of config.json")


def test_the_end_of_a_turn_counts_where_the_tokenizer_names_it(directory):
    edit(directory / "tokenizer_config.json", eot_token="<|im_end|>")
    assert load_model(str(directory)).eos_ids == (END, TURN_END)
    edit(directory / "tokenizer_config.json", eot_token=..., extra_special_tokens={"eot_token": "<|im_end|>"})
    assert load_model(str(directory)).eos_ids == (END, TURN_END)


def test_a_default_of_the_configuration_class_is_named_by_nobody(directory):
    name_eos(directory)  # LlamaConfig would say 2, which may be any word of this vocabulary
    assert "no end-of-sequence token" in refusal(directory)
    assert load_model(str(directory), eos_token_ids=["<|im_end|>"]).eos_ids == (TURN_END,)


@pytest.mark.parametrize("place", ["generation", "config"])
@pytest.mark.parametrize("wrong", [-1, 999, True, "</s>", [0, [2]], [0, None], 1.5, {"id": 2}])
def test_what_is_no_id_is_refused_by_name(directory, place, wrong):
    name_eos(directory, **{place: wrong}, tokenizer="<|endoftext|>")
    message = refusal(directory)
    file = {"generation": "generation_config.json", "config": "config.json"}[place]
    assert f"in {file} is not an id of the vocabulary, 0 to 287" in message
    assert load_model(str(directory), eos_token_ids=[0]).eos_ids == (0,)  # as the message says


@pytest.mark.parametrize("wrong", [True, 1.5, -1, "", [], [0, [2]], [None], ["a", False]])
def test_wrong_settings_are_refused_before_anything_loads(wrong):
    with pytest.raises(ValueError, match=r"^sampling\.eos_token_ids: [^\n]*$"):
        SamplingConfig(eos_token_ids=wrong)


@pytest.mark.parametrize("wrong", [[0, [2]], True, [True], 1.5, {"id": 2}])
def test_wrong_types_in_a_file_are_one_line(tmp_path, wrong):
    file = small_run.write_yaml(tmp_path / "run.yaml", {"sampling": {"eos_token_ids": wrong}})
    with pytest.raises(ValueError) as error:
        parse_record(Config, ["--config", file], command="test", description="")
    wanted = "sampling.eos_token_ids: expected ids or texts of tokens, such as [2, </s>]. Got value: "
    assert str(error.value) == f"{file}, line 2: {wanted}{wrong}"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["one two"], "'one two' is no single token"),
        (["<|eot_id|>"], "'<|eot_id|>' is no single token"),
        ([288], "288 is not an id of the vocabulary"),
    ],
)
def test_settings_that_are_no_token_of_the_model(given, reason):
    message = refusal(FIXTURES / "llama", eos_token_ids=given)
    assert message.startswith("sampling.eos_token_ids: ") and reason in message


def test_a_token_is_given_by_id_by_its_text_or_as_the_vocabulary_spells_it():
    model = load_model(str(FIXTURES / "llama"))
    newline = model.tokenizer.get_vocab()["Ċ"]
    for given in (["\n", 2], ["Ċ", "<|im_end|>"], [newline, TURN_END, newline]):
        changed = set_endings(model, eos_token_ids=given)
        assert changed.eos_ids == (newline, TURN_END)
    assert describe_endings(changed) == (
        f"a completion ends with '\\n' (id {newline}: sampling.eos_token_ids) or '<|im_end|>' (id 2: "
        "sampling.eos_token_ids)"
    )
    assert set_endings(model, eos_token_ids=None) is model


def reloaded(model, path):
    save_model(model, model.params, path)
    return load_model(str(path))


def test_an_export_ends_completions_as_its_run_did(directory, tmp_path):
    name_eos(directory, generation=0, config=0, tokenizer="<|im_end|>")
    model = load_model(str(directory))
    assert reloaded(model, tmp_path / "both").eos_ids == (END, TURN_END)
    assert json.loads((tmp_path / "both" / "config.json").read_text())["eos_token_id"] == 0

    chosen = reloaded(set_endings(model, eos_token_ids=[END]), tmp_path / "one")
    assert chosen.eos_ids == (END,) and chosen.tokenizer.eos_token_id == END
    assert model.tokenizer.eos_token_id == TURN_END  # the model at hand is as it was
    chosen = reloaded(set_endings(model, eos_token_ids=[TURN_END, 1]), tmp_path / "two")
    assert chosen.eos_ids == (TURN_END, 1) and chosen.config.eos_token_id == [TURN_END, 1]
    # An ordinary token does not become a control token.
    newline = reloaded(set_endings(model, eos_token_ids=["\n"]), tmp_path / "newline")
    assert newline.tokenizer.decode(newline.eos_ids, skip_special_tokens=True).startswith("\n")


def test_what_the_user_gives_ends_the_completions_of_a_run_and_of_what_it_leaves(tmp_path):
    """Greedily `12+34=` is answered by `46`; with the token `4` as the end, by `4`."""
    config = small_run.config(tmp_path, sampling__eos_token_ids='["4"]', training__num_steps=1)
    run = build(config)
    assert run.model.eos_ids == (4,)
    assert build(config, model=load_model("packaged:arithmetic")).model.eos_ids == (4,)
    prompts = pad_prompts(encode(run.model, ["12+34="]), 6)
    rollout = generate(
        run.model.policy, run.model.params, prompts, jax.random.key(0), group_size=1, max_new_tokens=5,
        eos_ids=jnp.asarray(run.model.eos_ids, jnp.int32), temperature=0.0, top_k=0, top_p=1.0, min_p=0.0,
    )  # fmt: skip
    np.testing.assert_array_equal(rollout.mask, [[True, False, False, False, False]])
    assert np.asarray(rollout.finished).all()
    text = plan.make_plan(run).text()
    assert "\n  a completion ends with '4' (id 4: sampling.eos_token_ids)" in text
    assert load_model_or_run("packaged:arithmetic", eos_token_ids=["4"]).eos_ids == (4,)


def test_the_plan_says_what_ends_a_completion(tmp_path):
    text = plan.make_plan(build(small_run.config(tmp_path))).text()
    assert (
        "\n  a completion ends with '<|endoftext|>' (id 16: generation_config.json, config.json, tokenizer)"
        in text
    )


def chat_run(tmp_path, model):
    rows = [{"prompt": [{"role": "user", "content": "one"}], "answer": "1"}] * 4
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data__train_file": tmp_path / "chats.jsonl", "rewards": "[{function: exact_match}]"}
    return build(small_run.config(tmp_path, **changes), model=model)


def test_chats_whose_turns_end_otherwise_are_noted(tmp_path):
    """A base model with a chat template: all files name <|endoftext|>, its turns end with <|im_end|>."""
    model = load_model(str(FIXTURES / "llama"))
    (note,) = (note for note in chat_run(tmp_path, model).notes if "ends a turn" in note)
    assert "with '<|im_end|>' (id 2)" in note and "sampling.eos_token_ids: [0, 2]" in note
    both = set_endings(model, eos_token_ids=[0, 2])
    assert not [note for note in chat_run(tmp_path, both).notes if "ends a turn" in note]
    plain = load_model(str(FIXTURES / "llama"), chat_template="plain")  # its turns end with a line break
    assert not [note for note in chat_run(tmp_path, plain).notes if "ends a turn" in note]
    assert replace(plain, eos_ids=(0,)).eos_ids == model.eos_ids
