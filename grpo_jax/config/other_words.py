"""Advice on unknown keys: they may be the word of another project, or a typing mistake."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from grpo_jax.config.peer_words import GENERATION_WORDS, TUNIX_WORDS, VALUES, VERL_WORDS
from grpo_jax.config.trl_fields import OLD_NAMES, TRL_FIELDS

_ADAMW = "not supported: the optimizer is AdamW"
_EVERY_STEP = "not needed: every step is a row of metrics.jsonl"
_LORA = "not supported: LoRA has `lora.rank`, `lora.alpha`, `lora.targets` and `lora.dropout`"


def _is(key: str, more: str = "") -> str:
    return f"it is `{key}` here{more}"


def _trl_words() -> dict[str, str]:
    """Returns the words of TRL, without those that are also the last part of our key, such as `seed`."""
    words = {name: field.advice for name, field in TRL_FIELDS.items() if f".{name}` here" not in field.advice}
    return words | {old: TRL_FIELDS[new].advice for old, new in OLD_NAMES.items()}


# Further words that people write.
_FURTHER: dict[str, str] = {
    # the objective
    "kl_coeff": _is("algorithm.kl_coef"),
    "epsilon_low": _is("algorithm.clip_range"),
    # the model
    "model_name": _is("model.hf_model_name"),
    "model_path": _is("model.hf_model_name"),
    "model.name": _is("model.hf_model_name"),
    "pretrained_model_name_or_path": _is("model.hf_model_name"),
    "enable_thinking": "it is `model.chat_template_arguments: {enable_thinking: false}` here",
    "tokenizer": "not needed: the tokenizer is the model's own",
    "tokenizer_name_or_path": "not needed: the tokenizer is the model's own",
    "ref_model": "not needed: the reference is the model at the start (see `algorithm.ref_sync_every`)",
    # LoRA
    "lora.r": _is("lora.rank"),
    "target_modules": _is("lora.targets", "; empty is every dense layer of attention and MLP"),
    "modules_to_save": _LORA,
    "bias": _LORA,
    # data
    "dataset_path": _is("data.dataset"),
    "data_files": _is("data.train_file", ", which takes a list, too"),
    "train_dataset": _is("data.train_file", " (or `data.dataset`)"),
    "eval_dataset": _is("data.eval_file", " (or `data.eval_split`)"),
    "val_file": _is("data.eval_file"),
    "test_file": _is("data.eval_file"),
    "valid_file": _is("data.eval_file"),
    "split": _is("data.train_split"),
    "prompt_column": "it is `data.columns: {prompt: <name in the file>}` here",
    "shuffle": "not supported: each pass shuffles the prompts again, by `training.seed`",
    # rewards
    "reward_functions": "it is `rewards` here, such as rewards: [exact_match, path/file.py:function]",
    "reward": "it is `rewards` here, a list such as rewards: [exact_match, path/file.py:function]",
    "reward_fn": "it is `rewards` here, such as rewards: [exact_match, path/file.py:function]",
    # sampling
    "max_length": _is(
        "sampling.max_new_tokens", " for completions, and `data.max_prompt_length` for prompts"
    ),
    "max_prompt_len": _is("data.max_prompt_length"),
    # the optimizer and the length of the run
    "train_batch_size": TRL_FIELDS["per_device_train_batch_size"].advice,
    "epochs": _is("training.num_epochs"),
    "steps": _is("training.num_steps"),
    "lr": _is("training.learning_rate"),
    "lr_scheduler": _is("training.lr_schedule", ": constant, linear or cosine"),
    "scheduler": _is("training.lr_schedule", ": constant, linear or cosine"),
    "warmup_ratio": _is("training.warmup_steps", ", a number of steps"),
    "betas": "it is `training.adam_b1` and `training.adam_b2` here",
    "optimizer": _ADAMW,
    "max_norm": _is("training.max_grad_norm"),
    "gradient_clip": _is("training.max_grad_norm"),
    "clip_grad_norm": _is("training.max_grad_norm"),
    "random_seed": _is("training.seed"),
    # evaluation, checkpoints, tracking
    "eval_every": _is("evaluation.every"),
    "save_dir": _is("run_dir"),
    "out_dir": _is("run_dir"),
    "use_wandb": _is("tracking.wandb"),
    "log_every": _EVERY_STEP,
}

# A word in lower case -> the advice. A name with a section counts only in a section of that name.
OTHER_WORDS: dict[str, str] = {**_FURTHER, **GENERATION_WORDS, **TUNIX_WORDS, **VERL_WORDS, **_trl_words()}


def is_foreign(key: str) -> bool:
    """Says whether a key, with or without its section, is in the table."""
    return _entry(key) is not None


def is_whole_word(key: str, content: Mapping[Any, Any]) -> bool:
    """Says whether an unknown key with keys inside is one word of the table, and not a section of words."""
    return is_foreign(key) and not any(is_foreign(f"{key}.{name}") for name in content)


def _entry(key: str) -> str | None:
    """Returns the advice on a word of another project, or None."""
    section, _, word = key.lower().rpartition(".")
    nearer = f"{section.rpartition('.')[2]}.{word}"
    return next((OTHER_WORDS[name] for name in (key.lower(), nearer, word) if name in OTHER_WORDS), None)


def say_unknown(key: str, known: Iterable[str], *, value: Any = None) -> str:
    """Returns the sentence about an unknown key, see `advise`."""
    return f"unknown key {key!r}; {advise(key, known, value=value)}"


def advise(key: str, known: Iterable[str], *, value: Any = None) -> str:
    """Returns advice on an unknown key.

    Args:
        key: the unknown key with its section, such as `sampling.stop_strings`.
        known: the known keys, likewise with their sections.
        value: its value, if there is one. The advice translates values that have another name here.

    Returns:
        a clause that names the intended key, or says why there is none. If no key is near, it is
        `--help lists the keys`.
    """
    values = VALUES.get(key.lower().rpartition(".")[2], {})
    if isinstance(value, str | bool) and value in values:
        return f"it is `{values[value]}` here"
    entry = _entry(key)
    if entry is not None:
        return entry
    section, _, word = key.rpartition(".")
    near = nearest_key(section, word, known)
    return f"did you mean {near!r}?" if near else "--help lists the keys"


def nearest_key(section: str, word: str, known: Iterable[str]) -> str | None:
    """Returns the key that is probably meant by a misspelled word or one in the wrong section."""
    scores: dict[str, float] = {}
    for candidate in known:
        its_section, _, its_word = candidate.rpartition(".")
        word_ratio = _likeness(word, its_word)
        section_ratio = _likeness(section, its_section) if section and its_section else 0.7
        if section == its_section:
            section_ratio = 1.0
        if word_ratio >= 0.75 and (section_ratio >= 0.7 or word_ratio == 1.0):
            scores[candidate] = 2 * word_ratio + section_ratio
    return max(scores, key=scores.__getitem__, default=None)


def _likeness(a: str, b: str) -> float:
    """Returns how alike two words are, 0 to 1."""
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()
