"""Tokenizers as transformers 4 and 5 write them; ids are held against tokenizer.json itself."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from grpo_jax.models.loading import load_model, load_tokenizer, save_model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
TEXTS = ["the answer", " one and", "one  two\n\nis", "naïve 🙂 漢字", "", "a<|im_end|>b</s>c"]
# What transformers 5.24 writes into tokenizer_config.json of a tokenizer that came from a directory.
NOTES = {"backend": "tokenizers", "is_local": True, "local_files_only": True, "add_prefix_space": None}
CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"


def byte_level(prefix_space=False):
    """The vocabulary of the GPT-2 fixture, without a BOS."""
    tokenizer = Tokenizer.from_file(str(FIXTURES / "gpt2" / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    return tokenizer


def sentence_pieces(*, bos=False, eos=False):
    """A Llama-2-like vocabulary of bytes, with what it puts around a text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdeinosthrw"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> " * bos + "$A" + " </s>" * eos, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


LLAMA = {**NOTES, "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
GENERIC = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend", "eos_token": "<|endoftext|>"}
LISTED = {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
# name -> (tokenizer.json, tokenizer_config.json as version 5 writes it)
KINDS = {
    "generic": (byte_level(), GENERIC),
    "generic with a list": (byte_level(), {**GENERIC, **LISTED}),
    "generic with a dict": (
        byte_level(),
        {**GENERIC, "extra_special_tokens": {"image_token": "<|im_start|>"}},
    ),
    "generic with a prefix space": (byte_level(prefix_space=True), GENERIC),
    "generic, new tokens": (byte_level(), {**GENERIC, "extra_special_tokens": ["<extra>"]}),
    "generic, a token with flags": (
        byte_level(),
        {**GENERIC, "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True}},
    ),
    "Qwen": (
        byte_level(),
        {
            **NOTES,
            **LISTED,
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "bos_token": None,
        },
    ),
    "GPT-2": (byte_level(), {**NOTES, "tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}),
    "Llama": (sentence_pieces(bos=True), LLAMA),
    "Llama without BOS": (sentence_pieces(), LLAMA),  # version 4 would put it back
    "Llama with EOS": (sentence_pieces(bos=True, eos=True), LLAMA),
    "Gemma without BOS": (sentence_pieces(), {**LLAMA, "tokenizer_class": "GemmaTokenizer"}),
    "a class of tomorrow": (byte_level(), {"tokenizer_class": "Qwen9Tokenizer", "eos_token": "<|im_end|>"}),
    "only the list is new": (
        byte_level(),
        {**LISTED, "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"},
    ),
}


def write(directory, tokenizer, config):
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def ids(tokenizer):
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("name", KINDS)
def test_a_tokenizer_of_version_5_has_the_ids_of_its_file(name, tmp_path):
    """Case model-01."""
    backend, config = KINDS[name]
    tokenizer = load_tokenizer(write(tmp_path / "v5", backend, config), "mine")
    eos = config["eos_token"]
    assert tokenizer.eos_token == (eos if isinstance(eos, str) else eos["content"])
    if "<extra>" not in config.get("extra_special_tokens", ()):
        assert ids(tokenizer) == [backend.encode(text).ids for text in TEXTS]
        assert len(tokenizer) == backend.get_vocab_size()
    for token in config.get("extra_special_tokens", ()):
        token = "<|im_start|>" if token == "image_token" else token
        assert token in tokenizer.all_special_tokens
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1
    # What is exported is a tokenizer of version 4, which version 5 opens as well (seen with 5.24).
    tokenizer.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in written
    assert not isinstance(written.get("extra_special_tokens"), list)
    again = load_tokenizer(tmp_path / "again", "again")
    assert ids(again) == ids(tokenizer) and again.special_tokens_map == tokenizer.special_tokens_map


def test_flags_in_the_config_of_version_5_count(tmp_path):
    for bos, eos in ((True, False), (False, True), (True, True), (False, False)):
        config = {
            **GENERIC,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "add_bos_token": bos,
            "add_eos_token": eos,
        }
        tokenizer = load_tokenizer(write(tmp_path / "v5", sentence_pieces(bos=True), config), "mine")
        wanted = sentence_pieces(bos=bos, eos=eos)
        assert ids(tokenizer) == [wanted.encode(text).ids for text in TEXTS]


def test_chat_templates_of_their_own_files(tmp_path):
    directory = write(tmp_path / "v5", byte_level(), GENERIC)
    assert load_tokenizer(directory, "mine").chat_template is None
    (directory / "chat_template.jinja").write_text(CHAT)
    assert load_tokenizer(directory, "mine").chat_template == CHAT
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert load_tokenizer(directory, "mine").chat_template == {"default": CHAT, "tool_use": "tools"}


def test_a_class_of_version_5_without_its_file_is_refused_in_one_line(tmp_path):
    config = {"backend": "sentencepiece", "tokenizer_class": "SentencePieceBackend"}
    directory = write(tmp_path / "v5", byte_level(), config)
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")
    with pytest.raises(
        ValueError, match=r"SentencePieceBackend, saved by transformers 5, but .* no tokenizer\.json"
    ):
        load_tokenizer(directory, "mine")


def test_a_model_with_a_tokenizer_of_version_5_goes_through_an_export(tmp_path, capfd):
    shutil.copytree(FIXTURES / "gpt2", tmp_path / "model")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    write(tmp_path / "model", byte_level(), {**GENERIC, **LISTED})
    model = load_model(str(tmp_path / "model"))
    save_model(model, model.params, tmp_path / "export")
    again = load_model(str(tmp_path / "export"))
    assert ids(again.tokenizer) == ids(model.tokenizer) and again.eos_ids == model.eos_ids
    assert capfd.readouterr() == ("", "")
