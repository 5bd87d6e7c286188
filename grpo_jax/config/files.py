"""Config files as people write them. What YAML would silently read as something else is refused."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_MAX_DEPTH = 50  # levels of nested lists and mappings
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_CLOCK = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+")


class Ambiguous(ValueError):
    """A text is valid YAML, but YAML reads it as something that its writer does not mean."""


def check_yaml(text: str) -> None:
    """Refuses text that YAML silently reads as something else.

    It refuses a key that is given twice (the last would win), an alias (ten nested ones can expand to a
    billion values), `012` (octal, so 10), `12:30` (sexagesimal, so 750) and more than 50 levels of brackets.
    The cost is linear.

    Args:
        text: content of a file, or a value from the command line. Text that is not YAML passes, because the
            parser explains that better.

    Raises:
        Ambiguous: the message names the line and says what to do.
    """
    mappings: list[dict[str, int] | None] = []  # for each open mapping: key -> its line; None for a list
    at_key: list[bool] = []  # whether the next node of an open mapping is a key
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                raise Ambiguous(
                    f"line {line}: `*{event.anchor}` is an alias of YAML, which is not supported; quote it "
                    "if it is text, or write out what it stands for"
                )
            if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                mappings.pop()
                at_key.pop()
            elif isinstance(event, yaml.NodeEvent):
                if isinstance(event, yaml.ScalarEvent):
                    _check_scalar(event, line)
                if mappings and mappings[-1] is not None:
                    if at_key[-1] and isinstance(event, yaml.ScalarEvent):
                        _check_key(event.value, line, mappings[-1])
                    at_key[-1] = not at_key[-1]
                if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                    mappings.append({} if isinstance(event, yaml.MappingStartEvent) else None)
                    at_key.append(True)
                    if len(mappings) > _MAX_DEPTH:
                        raise Ambiguous(f"line {line}: nested deeper than {_MAX_DEPTH} levels")
    except yaml.YAMLError:
        return


def _check_key(key: str, line: int, earlier: dict[str, int]) -> None:
    if key in earlier:
        first = "" if earlier[key] == line else f", first in line {earlier[key]}"
        raise Ambiguous(
            f"line {line}: the key `{key}` is given twice{first}; join the two or leave one out (YAML would "
            "use only the last)"
        )
    earlier[key] = line


def _check_scalar(event: yaml.ScalarEvent, line: int) -> None:
    if event.style or not event.implicit[0]:  # it is quoted, or has an explicit type
        return
    if _OCTAL.fullmatch(event.value) or _CLOCK.fullmatch(event.value):
        raise Ambiguous(
            f"line {line}: YAML reads {event.value} as another number; quote it if it is text, or write the "
            "number without leading zeros and colons"
        )


class Entry(NamedTuple):
    """A setting of a config file: its key with dots, its value, and whether there is such a key."""

    key: str
    value: Any
    known: bool


def read_entries(
    document: Mapping[Any, Any],
    known: Collection[str],
    lists: Collection[str],
    *,
    is_word: Callable[[str, Mapping[Any, Any]], bool] = lambda key, content: False,
) -> Iterator[Entry]:
    """Yields the settings of a config file in its order.

    Args:
        document: content of the file.
        known: all keys. Those in a section are written with a dot, and those of a list's items as
            `rewards.weight`.
        lists: keys whose values are lists of records. If an item has an unknown key, the list is left out.
        is_word: function that says whether an unknown key with this content is one word of another project.
            Such a key is one entry. In another unknown section every key is one.
    """

    def walk(content: Mapping[Any, Any], section: str) -> Iterator[Entry]:
        for name, value in content.items():
            key = f"{section}{name}"
            inside = any(other.startswith(f"{key}.") for other in known)
            if key in lists:
                items = value if isinstance(value, list) else [value]
                inner = [entry for item in items if isinstance(item, dict) for entry in walk(item, f"{key}.")]
                unknown = [entry for entry in inner if not entry.known]
                yield from unknown or [Entry(key, value, True)]
            elif inside and isinstance(value, dict):
                yield from walk(value, f"{key}.")
            elif key in known:
                yield Entry(key, value, True)
            elif isinstance(value, dict) and value and not is_word(key, value):
                yield from walk(value, f"{key}.")
            else:
                yield Entry(key, value, False)

    return walk(document, "")


def key_lines(text: str) -> dict[str, list[int]]:
    """Returns the lines in which each key of a YAML text is, with the key's section before it.

    >>> key_lines("a:\\n  b: 1\\nc: [{d: 1}, {d: 2}]")
    {'a': [1], 'a.b': [2], 'c': [3], 'c.d': [3, 3]}
    """
    lines: dict[str, list[int]] = {}

    def walk(node: yaml.Node, section: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = f"{section}{key.value}"
                lines.setdefault(name, []).append(key.start_mark.line + 1)
                walk(value, f"{name}.")
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                walk(item, section)

    walk(yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), "")
    return lines


def as_records(value: Any, key: str = "function") -> Any:
    """Returns a list of records, where people may write names or a single one instead.

    They write `exact_match`, `[exact_match]`, or `{function: exact_match}`.

    Args:
        value: the value in a file or on the command line.
        key: the key of a record that a plain name stands for.
    """
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | dict) and item for item in items):
        return value
    return [{key: item} if isinstance(item, str) else item for item in items]


def with_records(document: dict[Any, Any], lists: Sequence[str]) -> dict[Any, Any]:
    """Returns a document in which names in lists of records are replaced by records."""
    changed = dict(document)
    for name in lists:
        section, _, key = name.rpartition(".")
        inner = changed.get(section) if section else changed
        if isinstance(inner, dict) and key in inner:
            replaced = {**inner, key: as_records(inner[key])}
            changed = {**changed, section: replaced} if section else replaced
    return changed


def config_text(path: str) -> str:
    """Returns the text of a config file. A name of several lines is the text itself, as for --from_trl."""
    return path if "\n" in path else Path(path).read_text(encoding="utf-8")


def config_name(path: str) -> str:
    """Returns the name of a config file in messages."""
    return "the translated config" if "\n" in path else path


class QuotingDumper(yaml.SafeDumper):
    """Quotes every text. The parser reads more plain words as numbers than PyYAML does, such as `1e3`."""


QuotingDumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def read_document(path: str, load: Callable[[str], Any]) -> Any:
    """Reads a config file.

    Returns:
        the content, or None if there is no such file or it is not YAML, which the parser explains better.

    Raises:
        ValueError: `check_yaml` refuses the text, or it is not UTF-8. The message names the file.
    """
    try:
        text = config_text(path)
    except OSError:
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    try:
        check_yaml(text)
        return load(text)
    except Ambiguous as error:
        raise ValueError(f"{config_name(path)}, {error}") from None
    except yaml.YAMLError:
        return None
