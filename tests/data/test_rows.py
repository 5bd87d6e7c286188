"""Rows of files, with the place of every mistake."""

import json
import sys
import types

import pytest

from grpo_jax.data.rows import COMPRESSIONS, READERS, find_files, read_rows, stem


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
    with pytest.raises(ValueError, match=r"^(.*x\.csv)?(, )?" + message):
        for place, row in read_rows(write(tmp_path, "x.csv", content)):
            if isinstance(row, ValueError):
                raise ValueError(f"{place}: {row}")


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


def read(tmp_path, name, content):
    """Returns the rows of a file; one that cannot be read is its reason."""
    rows = read_rows(write(tmp_path, name, content))
    return [(place, str(row) if isinstance(row, ValueError) else row) for place, row in rows]


ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("content", "places"),
    [
        (json.dumps(ROWS), ("row 1", "row 2")),
        ("\ufeff" + json.dumps(ROWS, indent=2) + "\n", ("row 1 (line 2)", "row 2 (line 6)")),
        ("[" + ",\n".join(map(json.dumps, ROWS)) + "]", ("row 1 (line 1)", "row 2 (line 2)")),
        ("\n".join(map(json.dumps, ROWS)), ("line 1", "line 2")),
        ("\n".join(json.dumps(row, indent=1) for row in ROWS), ("line 1", "line 5")),
        (json.dumps({"data": ROWS}, indent=1), ("row 1 of `data`", "row 2 of `data`")),
        (json.dumps({"mine": ROWS}), ("row 1 of `mine`", "row 2 of `mine`")),
        (json.dumps({"version": "1", "rows": ROWS}), ("row 1 of `rows`", "row 2 of `rows`")),
    ],
)
def test_layouts_of_json(tmp_path, name, content, places):
    """Seen: `line 1: not valid JSON` of a pretty-printed array that is valid (case data-05)."""
    assert read(tmp_path, name, content) == list(zip(places, ROWS, strict=True))


def test_a_single_json_row_is_not_a_wrapper(tmp_path):
    chat = {"messages": [{"role": "user", "content": "1+1="}]}
    shared = {"conversations": [{"from": "human", "value": "1+1="}]}
    tests = {"prompt": "write f", "tests": [{"in": 1, "out": 2}]}
    for row in (chat, shared, tests, ROWS[0]):
        assert read(tmp_path, "a.json", json.dumps(row)) == [("line 1", row)]
        assert read(tmp_path, "a.json", json.dumps(row, indent=1)) == [("line 1", row)]
    assert read(tmp_path, "a.json", "[]") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"train": ROWS, "test": ROWS},
            r"keys train, test, and .* save `train` or `test` alone: rows are an",
        ),
        (
            {"question": "x", "tests": ROWS},
            r"it is not clear which of them holds the rows; save `tests` alone",
        ),
        ({"prompt": {"0": "1+1=", "1": "2"}, "answer": {"0": "2"}}, r"holds columns \(prompt, answer\), not"),
        ({"prompt": ["1+1=", "2+2="], "answer": ["2", "4"]}, r'holds columns .*\(pandas: orient="records"'),
    ],
)
def test_json_whose_rows_are_hard_to_find(tmp_path, content, message):
    for indent in (None, 1):
        with pytest.raises(ValueError, match=r"a\.json: one object .*" + message):
            read(tmp_path, "a.json", json.dumps(content, indent=indent))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n {"a": 2}', r"line 2: not valid JSON"),
        ('[{"a": 1},\n {"a": 2},\n]', r"line 2: not valid JSON \(Expecting ',' and an object"),
        ('[{"a": 1}\n {"a": 2}]', r"line 2: not valid JSON"),
        ('[{"a": 1},\n {"a": }]', r"line 2: not valid JSON \(Expecting value"),
        ('[\n{"a": 1}]\n[{"a": 2}]', r"line 2: not valid JSON \(the array must end the file"),
        ('{"a": \n1\n}\n x', r"line 4: not valid JSON"),
        (b'[\n{"a": "\xff"}]', r"a\.json: not UTF-8 text"),
        ("[" * 100_000 + "\n" + "]" * 100_000, r"line 1: not valid JSON \(nested deeper than 100 levels"),
    ],
)
def test_broken_json_names_its_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, "a.json", content)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def nested(depth):
    return '{"a": ' + "[" * depth + "]" * depth + "}"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key `a` is there twice in one object"),
        ('{"a": {"b": [{"c": 1, "c": 1}]}}', "the key `c` is there twice in one object"),
        ('["a"]', "must be a JSON object with a `prompt`, not list"),
        (nested(100), "nested deeper than 100 levels"),
    ],
)
def test_a_row_of_json_that_cannot_be_used(tmp_path, row, reason):
    """Seen: the last of two equal keys won in silence (cases data-17); the rows around it are read."""
    good = '{"a": 1}'
    expected = [("line 1", {"a": 1}), ("line 2", reason), ("line 3", {"a": 1})]
    assert read(tmp_path, "a.jsonl", f"{good}\n{row}\n{good}") == expected
    expected = [("row 1", {"a": 1}), ("row 2", reason), ("row 3", {"a": 1})]
    assert read(tmp_path, "a.json", f"[{good},{row},{good}]") == expected


def test_unusual_json_that_is_read(tmp_path):
    assert read(tmp_path, "a.jsonl", nested(99))[0][1] == json.loads(nested(99))
    row = read(tmp_path, "a.jsonl", '{"a": NaN, "b": -Infinity, "c": 1e400, "d": [1, 1]}')[0][1]
    assert row["a"] != row["a"] and row["b"] == float("-inf") and row["d"] == [1, 1]
    (_, reason), (_, row) = read(tmp_path, "a.jsonl", '{"a": ' + "9" * 5000 + '}\n{"a": 1}')
    assert "not valid JSON (Exceeds the limit" in reason and row == {"a": 1}
    _, (_, reason) = read(tmp_path, "a.jsonl", '{"a": 1}\n' + "[" * 100_000)
    assert reason.startswith("not valid JSON (nested deeper than 100 levels")


TABLE = [{"prompt": "1+1=", "answer": "2"}, {"prompt": 'say "a, b; c"', "answer": "-0,5"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'prompt;answer\n1+1=;2\n"say ""a, b; c""";-0,5\n'),
        ("a.csv", 'prompt\tanswer\r\n1+1=\t2\r\nsay "a, b; c"\t-0,5\r\n'),
        ("a.tsv", 'prompt\tanswer\n1+1=\t2\nsay "a, b; c"\t-0,5\n'),
        ("a.csv", 'prompt|answer\n1+1=|2\n"say ""a, b; c"""|-0,5\n'),
        ("a.csv", 'prompt, answer\n1+1=, 2\n"say ""a, b; c""", "-0,5"\n'),
        ("a.csv", 'sep=;\nprompt;answer\n1+1=;2\n"say ""a, b; c""";-0,5\n'),
        ("a.csv", '"prompt", "answer"\n"1+1=", 2\n"say ""a, b; c""", "-0,5"\n'),
    ],
)
def test_separators_of_tables(tmp_path, name, content):
    """Seen: only commas without a space were read (case data-14)."""
    assert [row for _, row in read(tmp_path, name, content)] == TABLE


def test_a_comma_wins_where_both_are_possible(tmp_path):
    assert read(tmp_path, "a.csv", "a,b;c\n1,2;3\n") == [("line 2", {"a": "1", "b;c": "2;3"})]
    assert read(tmp_path, "a.csv", "text\none; two, three\n")[0][1].startswith("2 fields, but the header")
    assert read(tmp_path, "a.csv", "text\none; two\n") == [("line 2", {"text": "one; two"})]
    # One bad row does not change the separator of the others.
    good, bad = {"a": "1", "b": "2"}, "3 fields, but the header has 2"
    assert [row for _, row in read(tmp_path, "a.csv", "a;b\n1;2\n1;2;3\n1;2\n")] == [good, bad, good]
    # Spaces at the start of a cell are the cell's, unless the names are written so, too.
    assert read(tmp_path, "a.csv", "a,b\n1, x\n") == [("line 2", {"a": "1", "b": " x"})]


def test_large_cells(tmp_path):
    big = "x" * 200_000
    assert read(tmp_path, "a.csv", f"prompt,answer\n{big},1\n")[0][1]["prompt"] == big


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "x"}\n'),
        ("a.json", '[{"text": "x"}]'),
        ("a.csv", "text\nx\n"),
        ("a.tsv", "text\nx\n"),
        ("a.txt", "x\n"),
    ],
)
def test_compressed_text(tmp_path, suffix, name, content):
    with COMPRESSIONS[suffix](tmp_path / (name + suffix), "wb") as file:
        file.write(content.encode())
    (_, row), *others = read_rows(tmp_path / (name + suffix))
    assert row == {"text": "x"} and not others and stem(tmp_path / (name + suffix)) == "a"
    packed = (tmp_path / (name + suffix)).read_bytes()
    with pytest.raises(ValueError, match=rf"b\..*{suffix}: damaged, or not compressed"):
        read(tmp_path, f"b.{name}{suffix}", packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=rf"c\..*{suffix}: damaged, or not compressed"):
        read(tmp_path, f"c.{name}{suffix}", content)
    with pytest.raises(ValueError, match=r"d\..*: the file is compressed by \w+; end its name in "):
        read(tmp_path, f"d.{name}", packed)


def test_files_of_other_formats_are_named(tmp_path):
    for name, content, message in (
        ("a.csv", "prompt".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("a.csv", b"PK\x03\x04...", "a zip archive"),
        ("a.jsonl", b"PAR1...", "Parquet; end its name in .parquet"),
        ("a.parquet.gz", b"", "Parquet is compressed inside; unpack the file to a.parquet"),
        ("a.gz", b"", "files of rows end in .jsonl, .*not in '.gz'"),
        ("a.xlsx.gz", b"", "files of rows end in .jsonl, .*not in '.xlsx.gz'"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
            read(tmp_path, name, content)
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(IsADirectoryError, match=r"dir\.jsonl: a directory; name its files, such as"):
        read_rows(tmp_path / "dir.jsonl")


def test_find_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "b.jsonl",
        "parts/2.jsonl",
        "parts/1.jsonl",
        "parts/deep/3.jsonl",
        "parts/no.txt",
        "[1].txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert find_files("gone.jsonl") == ["gone.jsonl"]  # reading says that it is not there
    assert find_files(["b.jsonl", "parts/*.jsonl"]) == ["b.jsonl", "parts/1.jsonl", "parts/2.jsonl"]
    assert find_files("parts/**/*.jsonl")[-1] == "parts/deep/3.jsonl"
    assert find_files("[1].txt") == ["[1].txt"]  # a file of that name
    assert find_files("parts/*") == ["parts/1.jsonl", "parts/2.jsonl", "parts/no.txt"]
    with pytest.raises(FileNotFoundError, match=r"no/\*\.csv: no file has such a name; looked in /"):
        find_files(["b.jsonl", "no/*.csv"])
    with pytest.raises(ValueError, match=r"parts/1\.jsonl is named twice"):
        find_files(["parts/*.jsonl", "parts/1.jsonl"])
    with pytest.raises(ValueError, match="a list of files is empty"):
        find_files([])


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
        schema_arrow = types.SimpleNamespace(names=["a"])

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
    twice = pyarrow.table([[1], [2]], names=["a", "a"])
    parquet.write_table(twice, tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c\.parquet: .*the column `a` is there twice"):
        list(read_rows(tmp_path / "c.parquet"))
