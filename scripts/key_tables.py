"""Writes the tables of keys in configs/README.md from the records of the configuration and their docstrings.

python scripts/key_tables.py             # writes the file; --check only says whether it is current
"""

import argparse
import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docstring_parser

from grpo_jax.config.run import Config

PAGE = Path(__file__).parent.parent / "configs" / "README.md"
BEGIN = "<!-- begin: scripts/key_tables.py writes what is below -->\n"
END = "<!-- end -->\n"


def records(record: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yields every record of a configuration with the name of its section; the whole run's name is ''."""
    yield prefix, record
    for name, kind in typing.get_type_hints(record).items():
        for inner in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(inner):
                in_list = "[]" if inner is not kind else ""
                yield from records(inner, f"{prefix}.{name}{in_list}".lstrip("."))


def type_text(kind: Any) -> str:
    """Returns a type as a reader of YAML would say it."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join("null" if part is type(None) else type_text(part) for part in arguments)
    words = {bool: "bool", int: "int", float: "float", str: "text", Any: "any", dict: "mapping"}
    if kind in words:
        return words[kind]
    if typing.get_origin(kind) is list:
        return f"list of {type_text(arguments[0])}"
    return "mapping"


def default_text(field: dataclasses.Field) -> str:
    """Returns a default as JSON, which is YAML as well."""
    if field.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(field.default_factory())}`"
    return "needed" if field.default is dataclasses.MISSING else f"`{json.dumps(field.default)}`"


def table(section: str, record: type) -> str:
    """Returns the heading, the purpose and the table of one record. Sections within it have their own."""
    documentation = docstring_parser.parse(inspect.getdoc(record) or "")
    texts = {param.arg_name: param.description or "" for param in documentation.params}
    hints = typing.get_type_hints(record)
    rows = []
    for field in dataclasses.fields(record):
        kind = hints[field.name]
        inner = [part for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part)]
        if inner:
            continue
        cells = [f"`{field.name}`", type_text(kind), default_text(field), texts[field.name]]
        escaped = [re.sub(r"\s+", " ", cell).replace("|", r"\|") for cell in cells]
        rows.append(f"| {' | '.join(escaped)} |")
    summary = documentation.short_description or ""
    more = documentation.long_description or ""
    heading = f"### `{section}`" if section else "### Outside of the sections"
    lines = [heading, "", " ".join(f"{summary} {more}".split()), ""]
    return "\n".join([*lines, "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def tables() -> str:
    """Returns all tables, as they are in configs/README.md."""
    first: dict[type, str] = {}
    found = []
    for section, record in sorted(records(Config), key=lambda item: item[0] == ""):
        if record in first:
            found.append(f"### `{section}`\n\nThe keys are those of `{first[record]}`.\n")
            continue
        first[record] = section
        found.append(table(section, record))
    return "\n".join(found)


def updated(page: str) -> str:
    """Returns a page with current tables between its two marks."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if it is not current"
    )
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    current = updated(page)
    if check and page != current:
        print(f"{PAGE} is not current: run `python scripts/key_tables.py`")
        return 1
    if not check:
        PAGE.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
