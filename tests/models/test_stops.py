"""Stop strings: a completion ends with the token by which its text first contains one, in any tokenizer."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from grpo_jax import train
from grpo_jax.config.run import SamplingConfig
from grpo_jax.evaluation.outcomes import sample_completions
from grpo_jax.models.endings import describe_endings, end_arguments, stop_notes
from grpo_jax.models.loading import decode, load_model, pad_prompts, save_model, set_endings
from grpo_jax.models.stops import MATCH, Stops, make_stops, stop_table
from grpo_jax.models.token_texts import token_texts
from grpo_jax.policy.decoding import generate
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.policy.shapes import decode_stages
from grpo_jax.run.build import build
from grpo_jax.run.directory import load_model_or_run
from grpo_jax.types import Example, Policy

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
PIECES = ("<unk>", "<s>", "▁a", "b", "▁", "▁▁", "", "ab", "▁b▁a", "é", "a\n", "##a", "don", " n't")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Bytes that make characters of one, two, three and four bytes, and broken ones when they meet otherwise.
LIVELY = [0x41, 0x0A, 0x20, 0xE2, 0x82, 0xAC, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80, 0xED]

LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
DECODERS = {
    "llama": decoders.Sequence(LLAMA),
    "two stripped": decoders.Sequence([*LLAMA[:3], decoders.Strip(" ", 2, 0)]),
    "gemma": decoders.Sequence(LLAMA[:3]),
    "metaspace": decoders.Metaspace(),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "wordpiece": decoders.WordPiece(),
    "fuse": decoders.Fuse(),
    "byte level": decoders.ByteLevel(),
    "none": None,
}


def made_tokenizer(decoder) -> PreTrainedTokenizerFast:
    vocabulary = {piece: i for i, piece in enumerate((*PIECES, *BYTES))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(["two words"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def tokenizer_of(name):
    if name in DECODERS:
        return made_tokenizer(DECODERS[name])
    return load_model(name if ":" in name else str(FIXTURES / name)).tokenizer


def text_of(tokenizer, tokens) -> str:
    tokens = [int(token) for token in tokens]
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def first_prefix(tokenizer, tokens, strings) -> int | None:
    """The definition: the index of the token with which the text first contains a stop string."""
    texts = (text_of(tokenizer, tokens[: i + 1]) for i in range(len(tokens)))
    return next((i for i, text in enumerate(texts) if any(string in text for string in strings)), None)


def walk(table, tokens) -> int | None:
    state = 0
    for i, token in enumerate(tokens):
        state = int(table[state, token])
        if state == MATCH:
            return i
    return None


def strings_from(rng, texts, count) -> list[str]:
    """Takes stop strings out of texts, so that they occur."""
    texts, strings = [text.replace("\ufffd", "") for text in texts], []
    for text in filter(None, rng.choice(texts, count)):
        start = rng.integers(len(text))
        strings.append(str(text[start : start + rng.integers(1, 6)]))
    return strings


@pytest.mark.parametrize("name", [*DECODERS, "gpt2", "packaged:arithmetic"])
def test_the_search_stops_where_the_decoded_text_first_contains_a_stop_string(name):
    rng, tokenizer = np.random.default_rng(sum(map(ord, name))), tokenizer_of(name)
    vocabulary = tokenizer.get_vocab()
    size = max(vocabulary.values()) + 3  # and ids that the tokenizer does not have
    texts = token_texts(tokenizer, vocab_size=size, source=name)
    lively = [vocabulary[f"<0x{b:02X}>"] for b in LIVELY if f"<0x{b:02X}>" in vocabulary]
    found = []
    for trial in range(24):
        pool = rng.choice(size, min(size, 12), replace=False)
        if lively and trial % 4:
            pool = np.array([*rng.choice(lively, 6), *rng.choice(len(PIECES), 5), size - 3])
        sequences = [rng.choice(pool, rng.integers(1, 13)) for _ in range(20)]
        shown = [text_of(tokenizer, tokens) for tokens in sequences]
        strings = strings_from(rng, shown, 1 + trial % 4)
        if not strings:
            continue
        table = stop_table(strings, texts)
        for tokens, text in zip(sequences, shown, strict=True):
            assert texts.decode(tokens.tolist()) == text
            expected = first_prefix(tokenizer, tokens, strings)
            assert walk(table, tokens) == expected, (strings, tokens.tolist(), text)
            found.append(expected is not None)
    assert 0.15 < np.mean(found) < 0.95 and len(found) > 200


@pytest.mark.parametrize("name", ["llama", "two stripped", "gemma"])
def test_broken_characters_and_leading_spaces_case_by_case(name):
    """Byte tokens up to every border of UTF-8, then a line break; and all short beginnings with spaces."""
    tokenizer = tokenizer_of(name)
    vocabulary = tokenizer.get_vocab()
    texts = token_texts(tokenizer, vocab_size=len(vocabulary), source=name)
    leads = (0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5)
    seconds = (0x41, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC2)
    runs = [
        [*(lead, second, 0x80, 0x80)[:n], 0x0A] for lead in leads for second in seconds for n in range(1, 5)
    ]
    spaced = itertools.chain(
        *(itertools.product(("<0x20>", "▁", "▁▁", "", "b", "<s>"), repeat=n) for n in (3, 4))
    )
    cases = {
        ("\n", "\u0800"): [[vocabulary[f"<0x{byte:02X}>"] for byte in run] for run in runs],
        (" ",): [[vocabulary[piece] for piece in pieces] for pieces in spaced],
    }
    for strings, sequences in cases.items():
        table = stop_table(strings, texts)
        expected = [first_prefix(tokenizer, tokens, strings) for tokens in sequences]
        assert [walk(table, tokens) for tokens in sequences] == expected
        assert len({end is None for end in expected}) == 2


def markov_policy(vocab: int) -> Policy:
    """Draws each token by the one before it alone; params is the logits [V,V]."""
    return Policy(
        forward=lambda params, tokens, mask, positions, cache=None: (jax.nn.one_hot(tokens, vocab), cache),
        unembed=lambda params, hidden: hidden @ params,
        init_cache=lambda batch, length: {"key": jnp.zeros((batch, length)), "index": jnp.int32(0)},
    )


VOCAB, LIMIT, ROWS = 288, 40, 64
POLICY = markov_policy(VOCAB)  # a policy compares by identity: one compilation


@pytest.fixture(scope="module")
def gpt2():
    return load_model(str(FIXTURES / "gpt2"))


def draw(table, *, eos=(), temperature=1.0):
    logits = 2 * jax.random.normal(jax.random.key(1), (VOCAB, VOCAB))
    rollout = generate(
        POLICY, logits, pad_prompts([[n] for n in range(16)], 1), jax.random.key(2), group_size=ROWS // 16,
        max_new_tokens=LIMIT, eos_ids=jnp.asarray((*eos, -1, -1)[:2], jnp.int32), stop_table=table,
        temperature=temperature,
    )  # fmt: skip
    return logits, jax.device_get(rollout)


def test_decoding_ends_each_row_there_and_changes_nothing_before(gpt2):
    """Through every stage of decoding, with strings that are rare, frequent, and of several bytes."""
    assert len(decode_stages(ROWS, LIMIT)) > 2
    _, free = draw(None)
    texts = [text_of(gpt2.tokenizer, row) for row in free.tokens]
    rng, shares, shapes, programs = np.random.default_rng(0), [], set(), 0
    for count in (1, 2, 3):
        strings = strings_from(rng, texts, count)
        stops = make_stops(strings, gpt2.tokenizer, vocab_size=VOCAB, source="gpt2")
        shapes.add(stops.table.shape)
        logits, rollout = draw(stops.table)
        ends = [first_prefix(gpt2.tokenizer, row, strings) for row in free.tokens]
        lengths = np.array([LIMIT if end is None else end + 1 for end in ends])
        mask = np.arange(LIMIT) < lengths[:, None]
        np.testing.assert_array_equal(rollout.mask, mask)
        np.testing.assert_array_equal(rollout.finished, [end is not None for end in ends])
        np.testing.assert_array_equal(rollout.tokens, np.where(mask, free.tokens, 0))
        np.testing.assert_array_equal(rollout.log_probs, np.where(mask, free.log_probs, 0))
        shares.append(rollout.finished.mean())
        programs = programs or generate._cache_size()
    assert programs == generate._cache_size() and len(shapes) == 1  # other strings need no other program
    assert 0 < min(shares) < max(shares)
    forced, _ = completion_log_probs(POLICY, logits, rollout, temperature=1.0)
    np.testing.assert_allclose(np.where(mask, forced, 0), rollout.log_probs, atol=1e-5)


def test_an_eos_and_a_stop_string_end_whichever_comes_first(gpt2):
    _, free = draw(None)
    eos = int(free.tokens[0, 3])
    string = text_of(gpt2.tokenizer, free.tokens[1, :6]).replace("\ufffd", "")[-1]
    stops = make_stops([string], gpt2.tokenizer, vocab_size=VOCAB, source="gpt2")
    _, rollout = draw(stops.table, eos=[eos])
    assert rollout.finished[:2].all() and rollout.mask.sum(axis=1)[0] <= 4
    for row, tokens in enumerate(free.tokens):
        ends = [*np.flatnonzero(tokens == eos)[:1], first_prefix(gpt2.tokenizer, tokens, [string])]
        ends = [int(end) for end in ends if end is not None]
        assert rollout.mask[row].sum() == min(ends, default=LIMIT - 1) + 1
        assert rollout.finished[row] == bool(ends)


# The text


@pytest.mark.parametrize(
    ("strings", "text", "before", "behind"),
    [
        (["\nQ:"], "18\nQ: 7", "18", "18\nQ:"),
        (["</answer>"], "<answer>18</answer> so", "<answer>18", "<answer>18</answer>"),
        (["bcd", "c"], "abcd", "ab", "abc"),  # `c` is complete first
        (["c", "bc"], "abcd", "a", "abc"),  # both are complete at once: the longer
        (["x"], "abc", "abc", "abc"),
        (["a"], "aaa", "", "a"),
    ],
)
def test_the_text_ends_before_the_stop_string_or_behind_it(strings, text, before, behind):
    for included, expected in ((False, before), (True, behind)):
        stops = Stops(strings=tuple(strings), included=included, table=jnp.zeros((8, 1), jnp.int16))
        assert stops.truncate(text) == expected


@pytest.mark.parametrize("included", [False, True])
def test_samples_of_the_packaged_model(included):
    """Greedily it answers `46` to `12+34=`, then ends."""
    model = load_model("packaged:arithmetic", stop=["9", "6"], include_stop=included)
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    examples = [Example(prompt=prompt, columns={}) for prompt in ("12+34=", "11+11=", "45+44=")]
    sampled = sample_completions(
        model, model.params, examples, group_size=1, prompt_length=6, max_new_tokens=5, batch_size=4, seed=0,
        sampling=greedy,
    )  # fmt: skip
    assert sampled.texts == (["46", "22", "89"] if included else ["4", "22", "8"])
    assert sampled.lengths.tolist() == [2, 3, 2] and sampled.finished.all()


def test_decoded_rows_that_ended_otherwise_are_left_alone():
    model = load_model("packaged:arithmetic", stop=["9"])
    tokens = np.array([[4, 6, 16], [4, 9, 9], [1, 2, 3]])
    assert decode(model, tokens, np.ones_like(tokens, bool)) == ["46", "4", "123"]


# Settings


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("", "an empty string would end every completion at once"),
        (["a", ""], "an empty string would end every completion at once"),
        ([5], "5 is no text"),
        ([None], "None is no text"),
        ([["a"]], "['a'] is no text"),
        (["\ufffd"], "has a character that no text of a model has"),
        (["a\ud83d"], "has a character that no text of a model has"),
        (["long" * 300], "1,200 bytes in all; at most 1,000"),
    ],
)
def test_wrong_stop_strings_are_refused_before_anything_loads(wrong, reason):
    with pytest.raises(ValueError) as error:
        SamplingConfig(stop=wrong)
    assert str(error.value).startswith("sampling.stop: ") and reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [5, [5], [["a"]], {"a": "b"}, True, [None]])
def test_wrong_types_in_a_file_are_one_line(tmp_path, wrong):
    file = small_run.write_yaml(tmp_path / "run.yaml", {"sampling": {"stop": wrong}})
    with pytest.raises(ValueError) as error:
        small_run.config(tmp_path, config=file)
    wanted = "sampling.stop: expected a text or a list of texts, such as [</answer>]. Got value: "
    assert str(error.value) == f"{file}, line 2: {wanted}{wrong}"


def test_an_option_that_would_do_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^sampling\.include_stop: there is nothing to include"):
        SamplingConfig(include_stop=True)


def test_a_config_has_one_string_or_several(tmp_path):
    for given, strings in (
        ("a", ("a",)),
        (["\n\n", "Q:"], ("\n\n", "Q:")),
        (["[END]", "5"], ("[END]", "5")),
        ("[END]", ("[END]",)),
        ("[a, b]", ("[a, b]",)),
        ("# x", ("# x",)),
        ("null", ("null",)),
        ("- a", ("- a",)),
        ("{x}", ("{x}",)),
        ("5", ("5",)),
        ("'q'", ("'q'",)),
        ("[", ("[",)),
        ([], ()),
        (None, None),
    ):
        file = small_run.write_yaml(tmp_path / "run.yaml", {"sampling": {"stop": given}})
        assert small_run.config(tmp_path, config=file).sampling.endings["stop"] == strings
    assert small_run.config(tmp_path, sampling__stop='["a", "\\n"]').sampling.stop == ["a", "\n"]


def test_a_model_without_an_eos_token_may_end_by_stop_strings(tmp_path):
    model = load_model("packaged:arithmetic")
    save_model(model, model.params, tmp_path)
    for name, key in (("generation_config", "eos_token_id"), ("config", "eos_token_id"),
                      ("tokenizer_config", "eos_token"), ("special_tokens_map", "eos_token")):  # fmt: skip
        path = tmp_path / f"{name}.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in content.items() if k != key}))
    with pytest.raises(ValueError, match=r"Give sampling\.eos_token_ids, or texts as sampling\.stop$"):
        load_model(str(tmp_path))
    model = load_model(str(tmp_path), stop=["="])
    assert model.eos_ids == () and end_arguments(model)["eos_ids"].shape == (0,)
    assert describe_endings(model) == "a completion ends right before the text '='"
    save_model(model, model.params, tmp_path / "export")
    assert load_model(str(tmp_path / "export"), stop=["="]).eos_ids == ()


def test_stop_strings_of_generation_config(tmp_path):
    model = load_model("packaged:arithmetic")
    save_model(model, model.params, tmp_path)
    path = tmp_path / "generation_config.json"
    content = json.loads(path.read_text())
    assert "stop_strings" not in content
    path.write_text(json.dumps(content | {"stop_strings": "="}))
    named = load_model(str(tmp_path))
    assert named.stops.strings == ("=",)
    none = load_model(str(tmp_path), stop=())
    assert none.stops is None
    for model, expected in ((named, ["="]), (none, None), (set_endings(named, stop=["7"]), ["7"])):
        save_model(model, model.params, tmp_path / "export")
        written = json.loads((tmp_path / "export" / "generation_config.json").read_text())
        assert written["stop_strings"] == expected
    for wrong in ([""], [5], 5):
        path.write_text(json.dumps(content | {"stop_strings": wrong}))
        with pytest.raises(ValueError, match=r": stop_strings in generation_config\.json: "):
            load_model(str(tmp_path))


def test_what_is_said_of_stop_strings():
    model = load_model("packaged:arithmetic", stop=["=", "\n", "=\n"])
    assert describe_endings(model) == (
        "a completion ends with '<|endoftext|>' (id 16: generation_config.json, config.json, tokenizer), or "
        r"right before the text '=' or '\n' or '=\n'"
    )
    assert [note.split(" ", 4)[3] for note in stop_notes(model)] == [r"'\n'", r"'=\n'"]
    assert set_endings(model, stop=model.stops.strings) is model
    assert set_endings(model, stop=()).stops is None and stop_notes(set_endings(model, stop=())) == []
    gpt2 = load_model(str(FIXTURES / "gpt2"), stop=["</answer>"])
    assert len(stop_notes(gpt2)) == 1 and "sampling.include_stop: true" in stop_notes(gpt2)[0]
    assert stop_notes(set_endings(gpt2, stop=["</answer>"], include_stop=True)) == []
    assert stop_notes(set_endings(gpt2, stop=["\n", r"\neq"])) == []
    for string in (r"\n", r"\n\n", r"\nQ:"):
        (note,) = stop_notes(set_endings(gpt2, stop=[string]))
        assert note.startswith(f"the stop string {string!r} has a backslash and an n") and r'["\n"]' in note
    # Special tokens are not in the text; what ends a completion anyway is no news.
    for string in ("<|im_end|>", "<|im_end|>\n"):
        (note,) = stop_notes(set_endings(gpt2, stop=[string]))
        assert f"the stop string {string!r} does not see the special token '<|im_end|>'" in note
        assert note.endswith("give sampling.eos_token_ids: [0, 2]")
    assert stop_notes(set_endings(gpt2, stop=["<|endoftext|>", "<|im_"])) == []
    assert stop_notes(set_endings(gpt2, stop=["<|im_end|>"], eos_token_ids=[2])) == []
    behind = set_endings(gpt2, eos_token_ids=[], stop=["</answer>"], include_stop=True)
    assert describe_endings(behind) == "a completion ends right behind the text '</answer>'"


def test_a_string_is_spelled_by_any_tokens_not_only_those_of_its_encoding():
    """The tokenizer below encodes words only, yet its tokens can write half of one."""
    vocabulary = {"<unk>": 0, "ab": 1, "cd": 2}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<unk>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    stops = make_stops(["bc", "ac", "ab"], tokenizer, vocab_size=3, source="words")
    assert stops.unspellable == ("ac",)


@pytest.mark.parametrize(
    "decoder",
    [decoders.CTC(), decoders.BPEDecoder(), decoders.Sequence([decoders.Fuse(), decoders.Metaspace()])],
)
def test_a_decoder_that_does_not_add_up_tokens_is_named(decoder):
    with pytest.raises(ValueError, match=r"^sampling\.stop: words has a tokenizer whose decoder \(\w+\)"):
        make_stops(["a"], made_tokenizer(decoder), vocab_size=300, source="words")


def test_a_decoder_that_does_something_unexpected_is_noticed():
    backend = made_tokenizer(decoders.Fuse()).backend_tokenizer
    odd = SimpleNamespace(
        decoder=backend.decoder, get_added_tokens_decoder=backend.get_added_tokens_decoder,
        id_to_token=backend.id_to_token,
        decode_batch=lambda rows, **how: [text.upper() for text in backend.decode_batch(rows, **how)],
    )  # fmt: skip
    with pytest.raises(ValueError, match="stop strings cannot be followed in its texts"):
        token_texts(SimpleNamespace(backend_tokenizer=odd), vocab_size=300, source="odd")


# A run


@pytest.mark.slow
def test_a_run_ends_its_completions_at_the_stop_string_and_so_does_what_it_leaves(
    tmp_path, monkeypatch, capsys
):
    small_run.share_compilations(monkeypatch)
    changes = {"sampling__stop": '["1", "2", "3"]', "training__num_steps": 1, "evaluation__every": 0}
    config = small_run.config(tmp_path / "run", **changes, tracking__num_completions=32)
    assert train.train(config) == 0
    assert "or right before the text '1' or '2' or '3'" in capsys.readouterr().out
    (row,) = (row for row in small_run.rows(tmp_path / "run") if row["step"] == 1 and "reward" in row)
    texts = [sample["completion"] for sample in small_run.rows(tmp_path / "run", "completions")]
    assert texts and not any(set(text) & set("123") for text in texts)
    assert row["completions/clipped_ratio"] == 0

    run = load_model_or_run(str(tmp_path / "run"))
    assert run.stops.strings == ("1", "2", "3")
    assert load_model_or_run(str(tmp_path / "run"), stop=()).stops is None
    assert build(config, model=run).model is run
    assert load_model(str(tmp_path / "run" / "hf")).stops is None  # files of models have no place for them
