"""Sequence classifiers as reward functions. Reference logits: scripts/make_classifier_fixtures.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax.config.run import RewardConfig
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.classifier import classify, encode_texts, judge_texts, load_classifier
from grpo_jax.rewards.loading import load_rewards

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("gpt2", "llama", "qwen2")


def write_classifier(directory, name="gpt2", *, change=None, tensors=None, **config):
    """Writes the checkpoint of a classifier: the backbone of a fixture, and the score layer of another."""
    source, fixture = FIXTURES / "models" / name, np.load(FIXTURES / "classifiers" / f"{name}.npz")
    directory.mkdir(exist_ok=True)
    for file in source.glob("*token*"):
        shutil.copy(file, directory)
    for file in source.glob("chat_template*"):
        shutil.copy(file, directory)
    raw = json.loads((source / "config.json").read_text())
    labels = {"id2label": {"0": "bad", "1": "good", "2": "odd"}, "label2id": {"bad": 0, "good": 1, "odd": 2}}
    raw |= labels | {"architectures": [str(fixture["architecture"])], "pad_token_id": 0} | config
    (directory / "config.json").write_text(json.dumps(raw))
    weights = {k: v for k, v in load_file(source / "model.safetensors").items() if k != "lm_head.weight"}
    weights["score.weight"] = fixture["score"]
    save_file(
        (weights | (tensors or {})) if change is None else change(weights), directory / "model.safetensors"
    )
    return str(directory)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("classifiers")
    return {name: load_classifier(write_classifier(directory / name, name)) for name in NAMES}


def rows_of(fixture):
    return [row.tolist() for row in np.split(fixture["tokens"], np.cumsum(fixture["lengths"])[:-1])]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_pytorch(classifiers, name):
    fixture = np.load(FIXTURES / "classifiers" / f"{name}.npz")
    rows = rows_of(fixture)
    assert rows[0][-1] == rows[1][-1] == classifiers[name].pad_id  # passed over
    logits = classify(classifiers[name], rows, batch_size=8)
    np.testing.assert_allclose(logits, fixture["logits"], atol=5e-6)
    alone = np.concatenate([classify(classifiers[name], [row], batch_size=2) for row in rows])
    np.testing.assert_allclose(alone, logits, atol=2e-6)


def test_without_a_padding_token_the_last_token_counts(classifiers, tmp_path):
    kept = load_classifier(write_classifier(tmp_path / "gpt2", pad_token_id=None))
    assert kept.pad_id is None
    row = [5, 6, 0]
    assert not np.allclose(
        classify(kept, [row], batch_size=2), classify(classifiers["gpt2"], [row], batch_size=2)
    )
    same = classify(kept, [row[:2]], batch_size=2)
    np.testing.assert_allclose(classify(classifiers["gpt2"], [row], batch_size=2), same, atol=1e-6)


def test_texts_are_prompt_and_completion(classifiers):
    gpt2, llama = classifiers["gpt2"], classifiers["llama"]
    assert encode_texts(gpt2, ["one and"], [" one<|endoftext|>"]) == [
        gpt2.tokenizer("one and one<|endoftext|>", split_special_tokens=True)["input_ids"]
    ]
    # no BOS is added, though this tokenizer has one by default
    assert encode_texts(llama, ["one"], [" two"])[0][0] != 0
    chat = [{"role": "user", "content": "one"}], [{"role": "assistant", "content": "two"}]
    (tokens,) = encode_texts(llama, *[[messages] for messages in chat])
    expected = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    assert llama.tokenizer.decode(tokens) == expected and tokens[0] == 1
    with pytest.raises(ValueError, match="no chat template"):
        encode_texts(gpt2, *[[messages] for messages in chat])


def test_scores_come_back_in_order(classifiers):
    gpt2 = classifiers["gpt2"]
    prompts, completions = ["is it? "] * 5, ["yes", "no and no", "", "n", "one is two"]
    rows = encode_texts(gpt2, prompts, completions)
    expected = np.concatenate([classify(gpt2, [row], batch_size=2) for row in rows])
    for batch_size in (2, 5):
        for label, index in ((0, 0), ("good", 1), (2, 2)):
            scores = judge_texts(gpt2, prompts, completions, label=label, batch_size=batch_size)
            np.testing.assert_allclose(scores, expected[:, index], atol=2e-6)


def test_texts_without_tokens_or_with_too_many_have_no_reward(classifiers):
    texts = ["one and one", "one " * 40, ""]  # 32 positions
    scores = judge_texts(classifiers["gpt2"], [""] * 3, texts)
    assert [value is None for value in scores] == [False, True, True]
    assert judge_texts(classifiers["gpt2"], [""] * 3, texts, max_length=1) == [None] * 3


def test_bfloat16(classifiers, tmp_path):
    rough = load_classifier(write_classifier(tmp_path / "gpt2"), "bfloat16")
    fine, rows = classifiers["gpt2"], [[5, 6, 7]]
    values = classify(rough, rows, batch_size=2)
    np.testing.assert_allclose(values, classify(fine, rows, batch_size=2), atol=0.1)
    assert values.dtype == np.float32 and not np.array_equal(values, classify(fine, rows, batch_size=2))


def test_a_classifier_as_a_reward(tmp_path):
    name = write_classifier(tmp_path / "judge", "llama")
    settings = {"model": name, "label": "good", "batch_size": 2}
    (reward,) = load_rewards([RewardConfig(function="reward_model", arguments=settings)])
    prompts = ["one", [{"role": "user", "content": "one"}], "two"]
    scores = call_rewards([reward], prompts, [" two", "two", " " * 99], {"answer": [1, 2, 3]})[:, 0]
    classifier = load_classifier(name)
    said = [" two", [{"role": "assistant", "content": "two"}]]
    expected = judge_texts(classifier, prompts[:2], said, label=1)
    np.testing.assert_allclose(scores[:2], expected, atol=2e-6)
    assert np.isnan(scores[2])


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"label": "best"}, "label='best': .* has bad, good, odd \\(0 to 2\\)"),
        ({"label": 3}, "label=3"),
        ({"label": True}, "label=True"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 33}, "max_length=33: at least 1, and at most the model's 32"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"modle": "x"}, "no argument `modle`; did you mean `model`"),
        ({"timeout": 1}, "takes no argument `timeout`"),
    ],
)
def test_wrong_arguments_are_found_at_load_time(tmp_path, arguments, match):
    arguments = {"model": write_classifier(tmp_path / "judge"), **arguments}
    with pytest.raises(ValueError, match=match) as caught:
        load_rewards([RewardConfig(function="reward_model", arguments=arguments)])
    assert "\n" not in str(caught.value)


def test_it_takes_no_timeout(tmp_path):
    arguments = {"model": write_classifier(tmp_path / "judge")}
    with pytest.raises(ValueError, match="computes on the device that trains; it takes no timeout"):
        load_rewards([RewardConfig(function="reward_model", arguments=arguments, timeout=1.0)])


def without_score(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "score.weight"}


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "is GPT2LMHeadModel; a reward model is a ...ForSequence"),
        ({"architectures": None}, "is a model without `architectures`"),
        (
            {"id2label": {"0": "only"}},
            r"tensor score.weight has shape \(3, 16\), the configuration says \(1, 16\)",
        ),
        ({"change": without_score}, "missing tensor score.weight"),
        ({"tensors": {"score.bias": np.zeros(3, np.float32)}}, "unexpected tensor score.bias"),
        ({"scale_attn_by_inverse_layer_idx": True}, "the decoder cannot compute it: scale_attn_by_inverse"),
    ],
)
def test_other_models_are_refused(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match) as caught:
        load_classifier(write_classifier(tmp_path / "judge", **settings))
    assert "\n" not in str(caught.value)


def test_a_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_rewards([RewardConfig(function="reward_model", arguments={"model": f"{tmp_path}/none"})])
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_classifier(str(tmp_path))
