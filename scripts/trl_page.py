"""Writes the tables of docs/from_trl.md, which come from `grpo_jax.config.trl_fields`.

python scripts/trl_page.py                  # print the page as it should be
python scripts/trl_page.py --write          # write it
"""

import argparse
import re
from pathlib import Path

from grpo_jax.config.trl_fields import GROUPS, Field

PAGE = Path(__file__).parent.parent / "docs" / "from_trl.md"
START = "<!-- The tables below are written by scripts/trl_page.py --write -->\n"


def shown_default(value: object) -> str:
    """Returns a default as YAML has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else (str(value) or '""')


def row(field: Field) -> str:
    """Returns the line of a field: name, default in TRL, and what it is here."""
    found = re.fullmatch(r"it is (.*?) here(.*)", field.advice, re.DOTALL)
    if found:
        here = found[1] + found[2]
    elif field.advice.startswith("not supported"):
        here = "**there is none**" + field.advice.removeprefix("not supported")
    else:
        here = field.advice
    return f"| `{field.name}` | `{shown_default(field.default)}` | {here.replace('|', chr(92) + '|')} |"


def tables() -> str:
    """Returns a heading and a table for each group of fields."""
    parts = []
    for title, group in GROUPS.items():
        parts += [f"### {title}\n", "| TRL 1.16 | default | here |", "|---|---|---|", *map(row, group), ""]
    return "\n".join(parts)


def page() -> str:
    """Returns the page with the tables that belong into it."""
    return PAGE.read_text(encoding="utf-8").partition(START)[0] + START + "\n" + tables()


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the page in place of printing it")
    text = page()
    if parser.parse_args().write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
