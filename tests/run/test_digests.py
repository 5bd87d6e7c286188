"""Digests of examples and of reward functions: equal for equal, other for other, in every process."""

import datetime
import decimal
import fractions
import json
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import small_run
from opaque import Opaque

from grpo_jax.run.digests import digest_examples, digest_reward, same_code
from grpo_jax.types import Example

DAY = datetime.date(2026, 11, 28)


VALUES = [
    None, True, 1, 1.0, "1", "1 ", "", b"1", bytearray(b"1"), [1], [1, 2], [2, 1], [[1], 2], {"a": 1},
    {"a": 2}, {1: "a"}, {(1, 2): "a"}, {"a": {"b": [None]}}, {"a": {"b": [0]}}, decimal.Decimal("1"),
    decimal.Decimal("1.0"),
    fractions.Fraction(1, 3), DAY, datetime.datetime(2026, 11, 28), datetime.time(1), datetime.timedelta(1),
    uuid.UUID(int=1), {1, 2}, frozenset({1, 2}), {"x", "y", "z"}, np.float32(1), np.int64(1), np.arange(3),
    np.arange(3.0), float("nan"), float("inf"), -0.0, 0.0, "\ud800", "é", 10**30, 1j, Opaque(1), Opaque(2),
    {"a": DAY, 2: b"x"}, [{"deep": {3: DAY}}], range(3),
]  # fmt: skip


def digest_of(value):
    return digest_examples([Example("1+1=", {"x": value})])["digest"]


def test_different_values_have_different_digests():
    digests = [digest_of(value) for value in VALUES]
    assert len(set(digests)) == len(VALUES)


def test_equal_values_have_equal_digests_in_every_process():
    """Sets and objects have another order and other addresses there."""
    code = "import test_digests as t; print(*[t.digest_of(value) for value in t.VALUES])"
    environment = small_run.environment() | {"PYTHONHASHSEED": "1"}
    environment["PYTHONPATH"] += f":{Path(__file__).parent}:{small_run.ROOT / 'tests'}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == [digest_of(value) for value in VALUES], done.stderr


def test_what_counts_and_what_does_not():
    rows = [
        Example("1+1=", {"answer": "2", "level": 1}),
        Example([{"role": "user", "content": "a"}], {"answer": 3}),
    ]
    plain = digest_examples(rows)
    assert plain["rows"] == 2 and digest_examples(iter(rows)) == plain
    moved = [Example(row.prompt, dict(reversed(row.columns.items())), place="elsewhere") for row in rows]
    assert digest_examples(moved) == plain
    turned = digest_examples(rows[::-1])
    assert turned["digest"] != plain["digest"] and turned["unordered"] == plain["unordered"]
    for other in ([rows[0]], [*rows, rows[0]], [Example("1+2=", rows[0].columns), rows[1]]):
        assert digest_examples(other)["digest"] != plain["digest"]
        assert digest_examples(other)["unordered"] != plain["unordered"]
    assert json.loads(json.dumps(plain)) == plain


def test_many_rows_that_are_alike_do_not_cancel():
    one, two = Example("1+1=", {"a": 1}), Example("1+2=", {"a": 2})
    assert digest_examples([one, one, two, two])["unordered"] != digest_examples([one] * 4)["unordered"]


# Reward functions


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    files = {
        "mine.py": "import json\nimport beside\nfrom lib import deep\n\ndef f(completions):\n    return []\n",
        "beside.py": "def g():\n    from lib.deep import h\n    return h()\n",
        "lib/__init__.py": "",
        "lib/deep.py": "from . import other\nimport numpy\nimport grpo_jax.types\n\ndef h(): pass\n",
        "lib/other.py": "X = 1\n",
        "unrelated.py": "X = 1\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    yield tmp_path
    for name in ("beside", "lib", "lib.deep", "lib.other"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("prefix", ["", "verl:"])
def test_files_of_a_reward(prefix, project):
    digests = digest_reward(f"{prefix}mine.py:f")
    assert list(digests) == ["beside.py", "lib/__init__.py", "lib/deep.py", "lib/other.py", "mine.py"]
    assert digest_reward(f"{prefix}{project}/mine.py:f") == digests


def test_files_of_a_module_and_of_what_has_none(project):
    __import__("lib.deep")
    assert list(digest_reward("lib.deep:h")) == ["lib/__init__.py", "lib/deep.py", "lib/other.py"]
    assert digest_reward("exact_match") is None and digest_reward("math:sqrt") is None
    # Of an installed package only its own modules count, and here not those of the libraries it uses.
    __import__("yaml")
    assert all(name.startswith("yaml/") for name in digest_reward("yaml:load"))


def test_an_edit_is_seen_wherever_it_is(project):
    before = digest_reward("mine.py:f")
    for name in before:
        path = project / name
        text = path.read_text()
        path.write_text(text + "\nY = 2\n")
        now = digest_reward("mine.py:f")
        assert [file for file in before if not same_code(before[file], now[file])] == [name]
        # Comments and layout are no code; another version of Python has to compare the bytes.
        path.write_text("# a comment\n" + text.replace("    ", "  ") + "\n")
        now = digest_reward("mine.py:f")
        assert all(same_code(before[file], now[file]) for file in before)
        assert before[name]["bytes"] != now[name]["bytes"]
        path.write_text(text)
    (project / "unrelated.py").write_text("X = 2\n")
    assert digest_reward("mine.py:f") == before


def test_a_file_that_is_no_python_is_compared_by_its_bytes():
    one, other = ({"bytes": text, "code": f"3.11-{text}"} for text in ("a", "b"))
    assert same_code(one, one) and not same_code(one, other)
    assert same_code(one, {"bytes": "b", "code": "3.11-a"})
