"""A config of `trl grpo` on its way to one of ours: what it sets here, and what is not the same."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import yaml

from grpo_jax.config.files import QuotingDumper
from grpo_jax.config.run import Config
from grpo_jax.config.trl_fields import TRL_FIELDS
from grpo_jax.objective.recipes import RECIPES

# Fields of earlier versions without a successor of the same meaning.
OLD_FIELDS = {"warmup_ratio": None, "max_prompt_length": None}
# Texts that YAML or the parser could read as something else keep their quotes.
_PLAIN_TEXT = re.compile(r"[A-Za-z][\w./-]*")
_NOT_PLAIN = {"true", "false", "yes", "no", "on", "off", "null", "none", "nan", "inf", "y", "n"}


@functools.cache
def flat_defaults() -> dict[str, Any]:
    """Returns our defaults by their keys with dots."""
    flat: dict[str, Any] = {}
    for section, content in asdict(Config()).items():
        if isinstance(content, dict):
            flat |= {f"{section}.{key}": value for key, value in content.items()}
        else:
            flat[section] = content
    return flat


@dataclass
class Translation:
    """A config of TRL on its way to one of ours.

    Args:
        source: name of the file.
        given: fields of TRL that the file has.
        settings: our settings, by their keys with dots.
        defaults: key of ours -> the field of TRL whose default it holds because the file leaves it out.
        missing: what has no counterpart, a line each.
        differs: what is not quite the same, a line each.
        problems: what is wrong with the file: (field, what to say).
        used: fields that a rule has read.
    """

    source: str
    given: Mapping[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def get(self, name: str) -> Any:
        """Returns the value of a field of TRL: that of the file, or else TRL's default."""
        self.used.add(name)
        if name in self.given:
            return self.given[name]
        return TRL_FIELDS[name].default if name in TRL_FIELDS else OLD_FIELDS[name]

    def number(self, name: str, kind: Callable[[Any], Any]) -> Any:
        """Returns a field as an int or a float, which YAML may have read as text: `1e-6`. None stays None."""
        value = self.get(name)
        if value is None:
            return None
        try:
            if isinstance(value, bool) or float(value) != kind(float(value)):
                raise ValueError
            return kind(float(value))
        except (TypeError, ValueError):
            wanted = "a whole number" if kind is int else "a number"
            self.problems.append((name, f"{name}: {value!r} is not {wanted}"))
            return TRL_FIELDS[name].default if name in TRL_FIELDS else None

    def choice(self, name: str, choices: Mapping[Any, Any]) -> Any:
        """Returns what a field's value is translated to. Another value is a problem."""
        value = self.get(name)
        if isinstance(value, str | bool | None) and value in choices:
            return choices[value]
        known = ", ".join(str(choice) for choice in choices if choice is not None)
        self.problems.append((name, f"{name}: {value!r}; it must be one of {known}"))
        return next(iter(choices.values()))

    def put(self, key: str, value: Any, *sources: str, ours: Any = ...) -> None:
        """Sets one of our settings.

        Args:
            key: the setting.
            value: its value.
            *sources: fields of TRL that it comes from. If the file has none of them, the value is TRL's
                default, and it is set only if ours is another one.
            ours: our default. By default it is that of the record.
        """
        ours = flat_defaults()[key] if ours is ... else ours
        if any(name in self.given for name in sources):
            self.settings[key] = value
        elif value != ours:
            self.settings[key] = value
            self.defaults[key] = f"{sources[0]}; ours is {shown(ours)}"

    def lack(self, name: str, reason: str) -> None:
        """Notes a field that has no counterpart."""
        self.missing.append(f"{name}: {shown(self.get(name))}; {reason}")

    def nested(self) -> dict[str, Any]:
        """Returns our settings by sections, in the order of the records."""
        order = {f.name: number for number, f in enumerate(fields(Config))}
        tree: dict[str, Any] = {}
        for key in sorted(self.settings, key=lambda key: order[key.partition(".")[0]]):
            section, _, name = key.rpartition(".")
            place = tree.setdefault(section, {}) if section else tree
            place[name] = self.settings[key]
        return tree

    def text(self) -> str:
        """Returns our config as YAML, with comments on what is not the same."""
        lines = [f"# translated from {self.source}, a config of `trl grpo`"]
        for section, content in self.nested().items():
            if section == "rewards":
                lines += ["rewards:", *(f"- {_flow(entry)}" for entry in content)]
            elif isinstance(content, dict):
                lines += [f"{section}:", *(self._line(f"{section}.{key}", "  ") for key in content)]
            else:
                lines.append(self._line(section, ""))
        for title, notes in (
            ("These fields have no counterpart:", self.missing),
            ("This is not quite the same:", self.differs),
        ):
            lines += [f"# {title}", *(f"#   {note}" for note in notes)] if notes else []
        return "\n".join(lines) + "\n"

    def _line(self, key: str, indent: str) -> str:
        line = f"{indent}{key.rpartition('.')[2]}: {_flow(self.settings[key])}"
        return f"{line}  # TRL's default of {self.defaults[key]}" if self.defaults.get(key) else line


def _flow(value: Any) -> str:
    if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value) and value.lower() not in _NOT_PLAIN:
        return value
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    text = yaml.dump(value, Dumper=QuotingDumper, default_flow_style=True, width=1e9, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def recipe_default(name: str, key: str) -> Any:
    """Returns the value of a recipe's number, such as its kl_coef, or of its clip range."""
    recipe = RECIPES[name]
    return recipe.clip.get(key) if key in recipe.clip else getattr(recipe, key, None)
