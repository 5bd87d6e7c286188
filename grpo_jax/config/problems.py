"""Finds everything that is wrong with a config at once, with the line of the file where it is."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from grpo_jax.config.checks import problem_lines
from grpo_jax.config.files import Entry, config_name, key_lines
from grpo_jax.config.other_words import is_foreign, say_unknown
from grpo_jax.config.trl_fields import TRL_FIELDS

_REQUIRED = "the following arguments are required"
_LOOKS_LIKE_TRL = 3  # unknown keys of a file that are fields of TRL


class Piece(NamedTuple):
    """One setting that a user gave.

    `place` is the file and line, or empty on the command line; `options` are arguments that give the parser
    this setting alone.
    """

    key: str
    place: str
    options: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What the search needs to know of the parser.

    Args:
        parse: function that parses arguments. It raises ValueError.
        build: function that parses arguments and makes the records of all sections. It raises ValueError.
        finish: function that also makes the whole record. It raises ValueError.
        entries: function that returns the entries of a config file.
        options_of: function that returns the arguments that give the parser an entry of a file.
        meant: function that checks arguments of the command line and returns those for the parser.
        read_text: function that returns the text of a config file.
        keys: all keys.
        sections: names of the sections.
        config_option: whether --config names a file.
        from_trl: whether --from_trl translates a config of TRL.
    """

    parse: Callable[[Sequence[str]], Any]
    build: Callable[[Sequence[str]], Any]
    finish: Callable[[Sequence[str]], Any]
    entries: Callable[[str], Sequence[Entry]]
    options_of: Callable[[Entry], Sequence[str]]
    meant: Callable[[Sequence[str]], Sequence[str]]
    read_text: Callable[[str], str]
    keys: Sequence[str]
    sections: Sequence[str]
    config_option: bool
    from_trl: bool


def find_problems(argv: Sequence[str], reader: Reader) -> tuple[list[str], str | None]:
    """Returns what is wrong with arguments and the files that they name, a line for each problem.

    It looks at every setting alone, then at each section with the settings that are right, so one mistake
    hides no other. Conditions that join several settings are checked where all of these are right.

    Args:
        argv: arguments of the command.
        reader: the parser.

    Returns:
        (the lines, in the order in which the settings are given; a hint, or None). There is no line if no
        setting alone is wrong.
    """
    found: list[str] = []
    good: list[Piece] = []
    wrong_sections: set[str] = set()
    of_trl: dict[str, int] = {}  # file -> number of keys that are fields of TRL
    for piece in _pieces(argv, reader):
        if isinstance(piece, tuple) and not isinstance(piece, Piece):
            key, place, line = piece
            if place and key in TRL_FIELDS:
                file = place.rpartition(", line ")[0]
                of_trl[file] = of_trl.get(file, 0) + 1
            found.append(_at(place, line))
            wrong_sections.add(_section(key, reader))
            continue
        complaints = _complaints(reader.parse, piece.options)
        found += [_at(piece.place, line) for line in complaints]
        if complaints:
            wrong_sections.add(_section(piece.key, reader))
        else:
            good.append(piece)
    places = {piece.key: piece.place for piece in good}
    for section in dict.fromkeys(_section(piece.key, reader) for piece in good):
        options = [word for piece in good if _section(piece.key, reader) == section for word in piece.options]
        make = reader.build if section else reader.finish
        for line in _complaints(make, options):
            key = "".join(re.findall(r"\A[\w.]*", line))
            if section not in wrong_sections or "; it must be " in line:
                found.append(_at(places.get(key, ""), line))
    files = [file for file, count in of_trl.items() if count >= _LOOKS_LIKE_TRL and reader.from_trl]
    hint = "{0} looks like a config of `trl grpo`: --from_trl {0} translates it"
    return found, hint.format(files[0]) if files else None


def _complaints(make: Callable[[Sequence[str]], Any], options: Sequence[str]) -> Sequence[str]:
    """Returns what is wrong with some of the settings. That others are missing is no problem of these."""
    try:
        make(options)
    except ValueError as error:
        return [line for line in problem_lines(error) if not line.startswith(_REQUIRED)]
    return ()


def _at(place: str, line: str) -> str:
    return f"{place}: {line}" if place else line


def _section(key: str, reader: Reader) -> str:
    """Returns the section of a key, or an empty text for keys outside of sections."""
    first = key.partition(".")[0]
    return first if first in reader.sections else ""


def _pieces(argv: Sequence[str], reader: Reader) -> Iterator[Piece | tuple[str, str, str]]:
    """Yields the settings of a command line and its files; of unknown ones (key, place, what to say)."""
    waiting = list(argv)
    while waiting:
        options = [waiting.pop(0)]
        name, equals, value = options[0].partition("=")
        if name.startswith("--") and not equals and waiting and not waiting[0].startswith("--"):
            value = waiting.pop(0)
            options.append(value)
        key = name.removeprefix("--").removesuffix("+")
        if name == "--config" and reader.config_option:
            yield from _pieces_of_file(value, reader)
            continue
        if key not in reader.keys and is_foreign(key):
            words = {"true": True, "false": False}
            yield key, "", say_unknown(key, reader.keys, value=words.get(value.lower(), value))
            continue
        try:
            yield Piece(key, "", reader.meant(options))
        except ValueError as error:
            yield key, "", str(error)


def _pieces_of_file(path: str, reader: Reader) -> Iterator[Piece | tuple[str, str, str]]:
    try:
        entries = reader.entries(path)
    except ValueError as error:
        yield "", "", str(error)
        return
    lines = key_lines(reader.read_text(path)) if entries else {}
    path = config_name(path)
    for entry in entries:
        at = lines.get(entry.key)
        place = f"{path}, line {at.pop(0)}" if at else path
        if entry.known:
            yield Piece(entry.key, place, reader.options_of(entry))
        else:
            yield entry.key, place, say_unknown(entry.key, reader.keys, value=entry.value)
