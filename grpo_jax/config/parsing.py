"""Reads a frozen record from a command line and from YAML files, with one-line errors."""

import json
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import docstring_parser
import jsonargparse
import yaml

from grpo_jax.config.checks import as_error
from grpo_jax.config.files import (
    Ambiguous,
    Entry,
    QuotingDumper,
    as_records,
    check_yaml,
    config_text,
    read_document,
    read_entries,
    with_records,
)
from grpo_jax.config.from_trl import translate
from grpo_jax.config.other_words import is_whole_word
from grpo_jax.config.parser_messages import explain
from grpo_jax.config.problems import Reader, find_problems

_FROM_TRL = "YAML file for `trl grpo` of TRL. It is translated, and the translation is printed."
_EPILOG = "GRPO_JAX_TRACEBACK=1 in the environment shows the traceback of an error instead of one line."


def parse_record(
    record: type,
    argv: list[str] | None,
    *,
    command: str,
    description: str,
    config_option: bool = True,
    positional: str | None = None,
    from_trl: bool = False,
) -> Any:
    """Parses a command line (and YAML files given with --config) into a frozen record.

    Fields are options, nested ones with dots: ``--algorithm.kl_coef 0.05``. An option further to the right
    wins, so overrides go after --config. Values are converted to the field's type.

    Args:
        record: a dataclass, whose docstring documents the options.
        argv: arguments of the command. None means those of the process.
        command: name of the command in --help, such as `python -m grpo_jax.train`.
        description: description of the command in --help.
        config_option: whether --config reads YAML files of the same keys. A directory stands for its
            config.yaml, so that a run directory may be given.
        positional: the field that is given without its name, if any.
        from_trl: whether --from_trl reads a config of `trl grpo`. Its translation is printed to standard
            error.

    Raises:
        ValueError: a key is unknown (the message suggests the nearest), or a value has the wrong type.
    """
    parser = jsonargparse.ArgumentParser(
        prog=command, description=description, epilog=_EPILOG, exit_on_error=False, allow_abbrev=False
    )
    if config_option:
        parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    if from_trl:
        parser.add_argument("--from_trl", help=_FROM_TRL)
    if positional is not None:
        parser.add_argument(positional, help=_documentation(record)[positional])
    parser.add_class_arguments(record, skip={positional} - {None})
    lists = _lists_of_records(record)
    keys = [action.dest for action in parser._actions]
    keys += [f"{name}.{f.name}" for name, item in lists.items() for f in fields(item)]
    load = jsonargparse.get_loader("yaml")

    def parse(options: Sequence[str]) -> jsonargparse.Namespace:
        try:
            parsed = parser.parse_args(list(options))
        except (jsonargparse.ArgumentError, TypeError, OSError) as error:
            raise ValueError(explain(str(error), keys)) from error
        _check_sections(record, parsed)
        return parsed

    def build(options: Sequence[str]) -> dict[str, Any]:
        return parser.instantiate(parse(options)).as_dict()

    def finish(options: Sequence[str]) -> Any:
        values = build(options)
        if config_option:
            values.pop("config")
        if from_trl and values.pop("from_trl") is not None:
            raise ValueError("from_trl is an option of the command line, and no key of a config file")
        return record(**values)

    def as_meant(options: Sequence[str]) -> list[str]:
        return _as_meant(list(options), lists, config_option, load)

    argv = _spell_out_flags(record, sys.argv[1:] if argv is None else argv)
    argv = _name_files(argv) if config_option else argv
    argv = _translate_files(argv, load) if from_trl else argv
    try:
        return finish(as_meant(argv))
    except ValueError as error:
        reader = Reader(
            parse=parse,
            build=build,
            finish=finish,
            entries=lambda path: _entries(path, keys, lists, load),
            options_of=lambda entry: _options_of(entry, lists, load),
            meant=as_meant,
            read_text=config_text,
            keys=keys,
            sections=[name for name, kind in typing.get_type_hints(record).items() if is_dataclass(kind)],
            config_option=config_option,
            from_trl=from_trl,
        )
        problems, hint = find_problems(argv, reader)
        if not problems:  # then it is none of one setting alone
            raise
        raise as_error(problems, hint=hint) from error


def _documentation(record: type) -> dict[str, str]:
    """Returns what a record's docstring says about each field."""
    return {p.arg_name: p.description or "" for p in docstring_parser.parse(record.__doc__ or "").params}


def _translate_files(argv: list[str], load: Callable[[str], Any]) -> list[str]:
    """Puts the translated text in the place of a config of `trl grpo`, and prints it."""
    changed: list[str] = []
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        option, equals, path = argument.partition("=")
        if option != "--from_trl" or not (equals or waiting):
            changed.append(argument)
            continue
        path = path if equals else waiting.pop(0)
        if not Path(path).is_file():
            raise ValueError(f"--from_trl: {path}: there is no such file")
        text = translate(read_document(path, load), path, text=config_text(path)).text()
        print(text, file=sys.stderr, flush=True)
        changed += ["--config", text]
    return changed


def _name_files(argv: list[str]) -> list[str]:
    """Replaces a run directory by its config.yaml, in the option `--config` alone."""
    named = []
    for before, argument in zip([None, *argv], argv, strict=False):
        option, equals, path = ("", "", argument) if before == "--config" else argument.partition("=")
        if (before == "--config" or option == "--config") and (Path(path) / "config.yaml").is_file():
            argument = f"{option}{equals}{Path(path) / 'config.yaml'}"
        named.append(argument)
    return named


def _spell_out_flags(record: type, argv: list[str]) -> list[str]:
    """Gives a bool option without a value, such as `--json`, the value true."""

    def flags(record: type, prefix: str) -> set[str]:
        kinds = typing.get_type_hints(record).items()
        nested = (flags(kind, f"{prefix}{name}.") for name, kind in kinds if is_dataclass(kind))
        return {prefix + name for name, kind in kinds if kind is bool}.union(*nested)

    names = flags(record, "--")
    spelled = []
    for argument, following in zip(argv, [*argv[1:], "--"], strict=False):
        spelled += [argument, "true"] if argument in names and following.startswith("--") else [argument]
    return spelled


def _lists_of_records(record: type, prefix: str = "") -> dict[str, type]:
    """Returns the fields that are lists of records with a `function`, such as rewards: {name: the record}."""
    found: dict[str, type] = {}
    for name, kind in typing.get_type_hints(record).items():
        if is_dataclass(kind):
            found |= _lists_of_records(kind, f"{prefix}{name}.")
        for item in typing.get_args(kind):
            if is_dataclass(item) and "function" in {f.name for f in fields(item)}:
                found[prefix + name] = item
    return found


def _as_meant(
    argv: list[str], lists: Mapping[str, type], config_option: bool, load: Callable[[str], Any]
) -> list[str]:
    """Checks config files and values before the parser sees them, and makes records of names in lists.

    Raises:
        ValueError: a key that is there twice, or an alias.
    """
    changed: list[str] = []
    option = ""  # the option whose value is next
    for argument in argv:
        name, equals, value = argument.partition("=")
        if option:
            name, value = option, argument
        elif not argument.startswith("--") or not equals:
            option = argument.removesuffix("+") if argument.startswith("--") else ""
            changed.append(argument)
            continue
        key = name.removeprefix("--").removesuffix("+")
        if key == "config" and config_option:
            value = _checked_file(value, lists, load)
        elif value.lstrip().startswith(("{", "[")) or key in lists:
            value = _checked_value(key, value, lists, load)
        changed.append(value if option else f"{name}={value}")
        option = ""
    return changed


def _checked_file(path: str, lists: Mapping[str, type], load: Callable[[str], Any]) -> str:
    """Returns the name of a config file, or its contents if the parser must read them differently."""
    document = read_document(path, load)
    if not isinstance(document, dict):
        return path
    meant = _with_stop_lists(with_records(document, list(lists)), load)
    return path if meant == document else _dump(meant)


def _dump(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=QuotingDumper, sort_keys=False)


def _entries(
    path: str, keys: list[str], lists: Mapping[str, type], load: Callable[[str], Any]
) -> list[Entry]:
    """Returns the entries of a config file; none if it has no keys, which the parser explains better."""
    document = read_document(path, load)
    if not isinstance(document, dict):
        return []
    return list(read_entries(document, keys, list(lists), is_word=is_whole_word))


def _options_of(entry: Entry, lists: Mapping[str, type], load: Callable[[str], Any]) -> list[str]:
    """Returns arguments that give the parser one entry of a config file."""
    document = entry.value
    for name in reversed(entry.key.split(".")):
        document = {name: document}
    return ["--config", _dump(_with_stop_lists(with_records(document, list(lists)), load))]


def _with_stop_lists(document: dict[str, Any], load: Callable[[str], Any]) -> dict[str, Any]:
    """Puts a single stop string such as `"[END]"` into a list, so that the parser does not read it as one."""

    def is_misread(stop: Any) -> bool:
        if not isinstance(stop, str) or not stop.strip():
            return False
        try:
            content = load(stop)
        except yaml.YAMLError:
            return False
        return content is None or isinstance(content, list)

    def in_list(section: dict[str, Any]) -> dict[str, Any]:
        return {**section, "stop": [section["stop"]]} if is_misread(section.get("stop")) else section

    sampling = document.get("sampling")
    if isinstance(sampling, dict):
        document = {**document, "sampling": in_list(sampling)}
    return in_list(document)


def _checked_value(key: str, value: str, lists: Mapping[str, type], load: Callable[[str], Any]) -> str:
    try:
        check_yaml(value)
    except Ambiguous as error:
        raise ValueError(f"{key}: {str(error).removeprefix('line 1: ')}") from None
    if key not in lists:
        return value
    try:
        content = load(value)
    except yaml.YAMLError:
        return value
    meant = as_records(content)
    return value if meant == content else json.dumps(meant)


def _check_sections(record: type, parsed: jsonargparse.Namespace) -> None:
    for name, kind in typing.get_type_hints(record).items():
        if is_dataclass(kind) and not isinstance(parsed[name], jsonargparse.Namespace):
            keys = ", ".join(f.name for f in fields(kind))
            raise ValueError(f"{name}: {parsed[name]!r} is not a section of keys ({keys})")
