"""Translates a config file of `trl grpo` (TRL 1.16) into a config of ours, and says what is not the same.

The rules follow the sources of TRL: what its trainer computes decides, not what a field is called.
"""

from dataclasses import fields
from typing import Any

from grpo_jax.config.checks import as_error
from grpo_jax.config.files import key_lines
from grpo_jax.config.run import Config
from grpo_jax.config.translation import OLD_FIELDS, Translation, shown
from grpo_jax.config.trl_fields import OLD_NAMES, TRL_FIELDS
from grpo_jax.config.trl_rules import RULES
from grpo_jax.spelling import nearest


def translate(document: Any, source: str, *, text: str = "") -> Translation:
    """Translates a config of `trl grpo`.

    Args:
        document: content of the file.
        source: name of the file.
        text: the file itself, for line numbers in messages.

    Raises:
        ValueError: the file has fields that TRL does not know, or values that TRL or we refuse. The message
            names all of them.
    """
    if not isinstance(document, dict):
        raise ValueError(f"{source}: expected fields of `trl grpo` and their values, got {document!r}")
    given = {OLD_NAMES.get(str(name), str(name)): value for name, value in document.items()}
    out = Translation(source=source, given=given)
    for name in given:
        if name not in TRL_FIELDS and name not in OLD_FIELDS:
            out.problems.append((name, _unknown(name)))
    for rule in RULES:
        rule(out)
    _note_unused(out)
    if out.problems:
        lines = key_lines(text) if text else {}
        old = {new: old for old, new in OLD_NAMES.items() if old in document}
        places = {name: lines.get(old.get(name, name)) for name, _ in out.problems}
        raise as_error(
            [
                f"{source}, line {places[name][0]}: {said}" if places[name] else f"{source}: {said}"
                for name, said in out.problems
            ]
        )
    return out


def _unknown(name: str) -> str:
    if name in {f.name for f in fields(Config)}:
        return f"{name!r} is a section of our own config; give it in a file of its own, with --config"
    near = nearest(name, TRL_FIELDS)
    return f"unknown field {name!r} of TRL 1.16" + (f"; did you mean {near!r}?" if near else "")


def _note_unused(out: Translation) -> None:
    """Notes the given fields that no rule has read and that are not TRL's defaults."""
    for name, value in out.given.items():
        row = TRL_FIELDS.get(name)
        if row is None or name in out.used or value == row.default:
            continue
        if row.advice.startswith("not needed"):
            out.differs.append(f"{name}: {row.advice}")
        elif row.advice.startswith("not supported"):
            out.missing.append(f"{name}: {shown(value)}; {row.advice}")
        else:
            out.differs.append(f"{name}: {shown(value)} has no effect with the other fields, as in TRL")
