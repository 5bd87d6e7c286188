"""Rows of files, with the place of every mistake."""

import sys
import types

import pytest

from grpo_jax.row_files import READERS, read_rows


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_json_lines(tmp_path):
    for name in ("a.jsonl", "a.JSON"):
        path = write(tmp_path, name, '\ufeff{"a": 1}\n\n{"b": [2]}\n')
        assert list(read_rows(path)) == [("line 1", {"a": 1}), ("line 3", {"b": [2]})]


def test_csv(tmp_path):
    text = '\ufeffprompt,answer\r\n"two\nlines, ""quoted""",1\n\n 3 ,\n'
    assert list(read_rows(write(tmp_path, "a.csv", text))) == [
        ("line 2", {"prompt": 'two\nlines, "quoted"', "answer": "1"}),
        ("line 5", {"prompt": " 3 ", "answer": ""}),
    ]
    assert list(read_rows(write(tmp_path, "b.csv", "\nprompt\nx\n"))) == [("line 3", {"prompt": "x"})]
    assert list(read_rows(write(tmp_path, "c.csv", "prompt\n"))) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1\n", r"line 2: 1 fields, but the header has 2"),
        ('a,b\n"1\n2",3\n1,2,3\n', r"line 4: 3 fields, but the header has 2"),
        ("a,a\n1,2\n", r"line 1: the header names column `a` twice"),
        ("a, \n1,2\n", r"line 1: the header has no name for column 2"),
        ('a,b\n1,2\n"1,2\n', r"line 3: not valid CSV \(unexpected end of data\)"),
        ('a,b\n"1"x,2\n', r"line 2: not valid CSV"),
        (b"a,b\n\xff,2\n", r": not UTF-8 text after line \d"),
    ],
)
def test_csv_names_the_broken_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=r"x\.csv(, )?" + message):
        list(read_rows(write(tmp_path, "x.csv", content)))


def test_paragraphs(tmp_path):
    text = "\n\nfirst line\nsecond line\n \n\nnext\n"
    assert list(read_rows(write(tmp_path, "a.txt", text))) == [
        ("line 3", {"text": "first line\nsecond line"}),
        ("line 7", {"text": "next"}),
    ]
    assert list(read_rows(write(tmp_path, "b.txt", "no end of line"))) == [
        ("line 1", {"text": "no end of line"})
    ]
    assert list(read_rows(write(tmp_path, "c.txt", "\n\n"))) == []
    with pytest.raises(ValueError, match=r"d\.txt: not UTF-8"):
        list(read_rows(write(tmp_path, "d.txt", b"\xff")))


def test_unknown_suffix(tmp_path):
    with pytest.raises(
        ValueError, match=r"a\.xlsx: files of rows end in \.jsonl, \.json, \.csv.*not in '\.xlsx'"
    ):
        read_rows(tmp_path / "a.xlsx")
    with pytest.raises(ValueError, match=r"prompts: the file's name needs a suffix"):
        read_rows(tmp_path / "prompts")


@pytest.mark.parametrize("suffix", [suffix for suffix in READERS if suffix != ".parquet"])
def test_missing_file(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=r"gone.*there is no such file of rows; looked in /"):
        list(read_rows(tmp_path / f"gone{suffix}"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ImportError, match=r'a\.parquet is Parquet.*pip install "grpo-jax\[parquet\]"'):
        list(read_rows(tmp_path / "a.parquet"))


def test_parquet_by_a_stand_in(tmp_path, monkeypatch):
    """What we call of pyarrow, where it is not installed."""

    class Batch:
        def __init__(self, rows):
            self.to_pylist = lambda: rows

    class ParquetFile:
        def __init__(self, file):
            if file.read() != b"good":
                raise ValueError("Parquet magic bytes not found")

        def iter_batches(self):
            return iter([Batch([{"a": 1}, {"a": 2}]), Batch([{"a": 3}])])

    pyarrow = types.ModuleType("pyarrow")
    pyarrow.parquet = types.ModuleType("pyarrow.parquet")
    pyarrow.parquet.ParquetFile = ParquetFile
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", pyarrow.parquet)
    rows = list(read_rows(write(tmp_path, "a.parquet", "good")))
    assert rows == [("row 1", {"a": 1}), ("row 2", {"a": 2}), ("row 3", {"a": 3})]
    with pytest.raises(ValueError, match=r"b\.parquet: not a Parquet file that can be read \(.*magic"):
        list(read_rows(write(tmp_path, "b.parquet", "bad")))
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet"):
        list(read_rows(tmp_path / "gone.parquet"))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": [{"role": "user", "content": str(i)}], "n": i} for i in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    assert list(read_rows(tmp_path / "a.parquet")) == [(f"row {i + 1}", row) for i, row in enumerate(rows)]
    with pytest.raises(ValueError, match=r"b\.parquet: not a Parquet file that can be read"):
        list(read_rows(write(tmp_path, "b.parquet", "nonsense that is long enough")))
