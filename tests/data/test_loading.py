"""Examples from files, and their order as a function of (seed, step)."""

import datetime
import decimal
import json
from itertools import chain

import pytest

from grpo_jax.config.run import DataConfig
from grpo_jax.data.loading import batch, load_data
from grpo_jax.types import Example


def make_examples(n):
    return [Example(f"prompt {i}", {"i": i}) for i in range(n)]


def indices(n, *, seed=0, steps, num_prompts):
    examples = make_examples(n)
    return [
        [example.columns["i"] for example in batch(examples, seed=seed, step=step, num_prompts=num_prompts)]
        for step in steps
    ]


def test_batch_is_a_pure_function():
    examples = make_examples(23)
    first = batch(examples, seed=3, step=5, num_prompts=4)
    batch(examples, seed=4, step=0, num_prompts=9)
    assert batch(examples, seed=3, step=5, num_prompts=4) == first


@pytest.mark.parametrize("num_prompts", [1, 4, 7, 24, 60])
def test_consecutive_steps_partition_each_epoch(num_prompts):
    steps = indices(24, steps=range(-(-72 // num_prompts)), num_prompts=num_prompts)
    stream = [i for step in steps for i in step]
    epochs = [stream[:24], stream[24:48], stream[48:72]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(24))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_random_access_equals_sequential_access():
    sequential = indices(24, steps=range(20), num_prompts=5)
    backwards = indices(24, steps=reversed(range(20)), num_prompts=5)
    assert backwards[::-1] == sequential
    # The stream does not depend on how it is cut into steps.
    recut = indices(24, steps=range(4), num_prompts=25)
    assert list(chain.from_iterable(recut)) == list(chain.from_iterable(sequential))


def test_seeds_do_not_share_shuffles():
    epochs = [
        tuple(epoch) for seed in range(4) for epoch in indices(24, seed=seed, steps=range(3), num_prompts=24)
    ]
    assert len(set(epochs)) == 12


def test_batch_refuses_wrong_arguments():
    with pytest.raises(ValueError, match="no examples"):
        batch([], seed=0, step=0, num_prompts=1)
    with pytest.raises(ValueError, match="step -1"):
        batch(make_examples(3), seed=0, step=-1, num_prompts=1)
    with pytest.raises(ValueError, match="num_prompts 0"):
        batch(make_examples(3), seed=0, step=0, num_prompts=0)


def load_jsonl(path, **settings):
    return load_data(DataConfig(train_file=str(path), **settings)).train


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_jsonl_strings_messages_and_columns(tmp_path):
    messages = '[{"role": "system", "content": "x"}, {"role": "user", "content": "2+2?"}]'
    path = write(
        tmp_path / "a.jsonl",
        '\ufeff{"prompt": "1+1=", "answer": "2", "level": 1}',
        "",
        f'{{"answer": null, "level": [3], "prompt": {messages}}}',
        '{"prompt": "line\u2028separator", "answer": "", "level": {}}\n',
    )
    assert load_jsonl(path) == [
        Example("1+1=", {"answer": "2", "level": 1}),
        Example(
            [{"role": "system", "content": "x"}, {"role": "user", "content": "2+2?"}],
            {"answer": None, "level": [3]},
        ),
        Example("line\u2028separator", {"answer": "", "level": {}}),
    ]


GOOD = '{"prompt": "a", "answer": "1"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", ', "not valid JSON"),
        (b'{"prompt": "\xff", "answer": ""}', "not UTF-8"),
        ('["a"]', "must be a JSON object with a `prompt`, not list"),
        ('{"answer": "1"}', "`prompt` is missing; the keys are: answer"),
        ('{"prompt": 3, "answer": "1"}', "must be a string or a list of messages, not int"),
        ('{"prompt": null, "answer": "1"}', "not NoneType"),
        ('{"prompt": "", "answer": "1"}', "`prompt` is empty"),
        ('{"prompt": [], "answer": "1"}', "`prompt` is an empty list"),
        ('{"prompt": ["a"], "answer": "1"}', r"`prompt\[0\]` must be an object .* not 'a'"),
        (
            '{"prompt": [{"role": "user"}], "answer": "1"}',
            r"`prompt\[0\]` needs a string `content`, got None",
        ),
        (
            '{"prompt": [{"role": 1, "content": ""}], "answer": "1"}',
            r"`prompt\[0\]` needs a string `role`, got 1",
        ),
        ('{"prompt": "a"}', "column `answer` is missing; line 1 has it"),
        ('{"prompt": "a", "answer": "1", "hint": 2}', "column `hint` is new; line 1 does not have it"),
        ('{"prompt": "a", "answer": "1", "completions": 2}', "column `completions` would hide"),
    ],
)
def test_jsonl_names_the_broken_line(tmp_path, line, message):
    path = write(tmp_path / "b.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(ValueError, match=rf"b\.jsonl, line 3: .*{message}"):
        load_jsonl(path)


@pytest.mark.parametrize("lines", [[""], ["", "  "]])
def test_jsonl_without_examples(tmp_path, lines):
    with pytest.raises(ValueError, match=r"c\.jsonl: the file has no examples"):
        load_jsonl(write(tmp_path / "c.jsonl", *lines))


def test_load_data(tmp_path):
    assert load_data(DataConfig()).name == "arithmetic"
    train = write(tmp_path / "mine.jsonl", GOOD, GOOD)
    held_out = write(tmp_path / "held_out.jsonl", GOOD)
    task = load_data(DataConfig(train_file=str(train)))
    assert (task.name, len(task.train), len(task.evaluation), task.rewards) == ("mine", 2, 0, ())
    task = load_data(DataConfig(train_file=str(train), eval_file=str(held_out)))
    assert (len(task.train), len(task.evaluation)) == (2, 1)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_data(DataConfig(train_file=str(tmp_path / "nowhere.jsonl")))


def of_rows(tmp_path, *rows, name="rows.jsonl", **settings):
    """Loads a task from rows of JSON."""
    path = write(tmp_path / name, *(json.dumps(row) for row in rows))
    return load_data(DataConfig(train_file=str(path), **settings))


def test_csv_gives_the_same_examples(tmp_path):
    lines = write(tmp_path / "a.jsonl", '{"prompt": "1+1=", "answer": "2"}', '{"prompt": "2", "answer": "4"}')
    table = write(tmp_path / "a.csv", "answer,prompt", "2,1+1=", "4,2")
    assert load_jsonl(table) == load_jsonl(lines)
    with pytest.raises(ValueError, match=r"b\.csv, line 3: `prompt` is empty"):
        load_jsonl(write(tmp_path / "b.csv", "prompt,answer", "1,1", ",2"))
    with pytest.raises(ValueError, match=r"c\.csv: the file has no examples"):
        load_jsonl(write(tmp_path / "c.csv", "prompt,answer"))


def test_columns_get_new_names(tmp_path):
    row = {"question": "1+1?", "answer": "long", "solution": "2", "id": 7}
    task = of_rows(tmp_path, row, columns={"prompt": "question", "answer": "solution"})
    assert task.train == [Example("1+1?", {"answer": "2", "id": 7})]
    task = of_rows(tmp_path, row, columns={"prompt": "question", "solution": "answer", "answer": "solution"})
    assert task.train == [Example("1+1?", {"answer": "2", "solution": "long", "id": 7})]
    task = of_rows(tmp_path, {"prompts": "1"}, columns={"prompt": "prompts"})
    assert task.train == [Example("1")]


def test_a_missing_column_is_named(tmp_path):
    rows = {"question": "1", "n": 1}, {"quest": "1", "n": 1}
    message = r"rows\.jsonl, line 2: data\.columns: there is no column `question`; the columns are: quest, n"
    with pytest.raises(ValueError, match=message):
        of_rows(tmp_path, *rows, columns={"prompt": "question"})


VERL = {"prompt": "1+1=", "reward_model": {"style": "rule", "ground_truth": "2"}}


def test_nested_columns(tmp_path):
    """Seen: `reward_model.ground_truth` was refused; only templates reached inside (case data-25)."""
    columns = {"answer": "reward_model.ground_truth"}
    assert of_rows(tmp_path, VERL, columns=columns).train == [
        Example("1+1=", {"reward_model": VERL["reward_model"], "answer": "2"})
    ]
    flat = {**VERL, "reward_model.ground_truth": "flat"}
    assert of_rows(tmp_path, flat, columns=columns).train[0].columns["answer"] == "flat"
    deep = {"a.b": {"c": {"d.e": {"f": "1+1="}}}}
    assert of_rows(tmp_path, deep, columns={"prompt": "a.b.c.d.e.f"}).train[0].prompt == "1+1="


@pytest.mark.parametrize(
    ("reward_model", "message"),
    [
        (None, "but `reward_model` is null"),
        ({"ground_truth": None}, "which is null here"),
        ({"style": "rule"}, "but `reward_model` has no `ground_truth`; it has: style"),
        ({}, "but `reward_model` has no `ground_truth`; it has: nothing"),
        ("2", "but `reward_model` is str, without fields"),
        (["2"], "but `reward_model` is list, without fields"),
    ],
)
def test_a_nested_column_is_missing_in_one_row(tmp_path, reward_model, message):
    rows = [VERL, {**VERL, "reward_model": reward_model}, VERL]
    columns = {"answer": "reward_model.ground_truth"}
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: data\.columns: .*, {message} \(1 of 3 tr"):
        of_rows(tmp_path, *rows, columns=columns)
    task = of_rows(tmp_path, *rows, columns=columns, on_bad_row="drop")
    assert [example.place[-6:] for example in task.train] == ["line 1", "line 3"]


def test_several_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "parts-2.jsonl", "parts-1.jsonl"):
        write(tmp_path / name, json.dumps({"prompt": name}), json.dumps({"prompt": name + "!"}))
    task = load_data(DataConfig(train_file=["b.jsonl", "parts-*.jsonl"], eval_file="parts-?.jsonl"))
    assert task.name == "b"
    assert [(example.prompt, example.place) for example in task.train] == [
        ("b.jsonl", "b.jsonl, line 1"), ("b.jsonl!", "b.jsonl, line 2"),
        ("parts-1.jsonl", "parts-1.jsonl, line 1"), ("parts-1.jsonl!", "parts-1.jsonl, line 2"),
        ("parts-2.jsonl", "parts-2.jsonl, line 1"), ("parts-2.jsonl!", "parts-2.jsonl, line 2"),
    ]  # fmt: skip
    assert task.evaluation == task.train[2:]
    write(tmp_path / "parts-1.jsonl", '{"prompt": "x", "answer": 1}')
    message = r"parts-1\.jsonl, line 1: column `answer` is new; b\.jsonl, line 1 does not have it \(1 of 5 tr"
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(train_file=["b.jsonl", "parts-*.jsonl"]))


def test_bad_rows_are_counted_or_dropped(tmp_path):
    good = {"prompt": "1+1=", "answer": "2"}
    lines = [json.dumps(good)] * 9
    lines[1], lines[3], lines[5], lines[7] = "{", '{"answer": "2"}', "[", "{"
    path = write(tmp_path / "a.jsonl", *lines)
    with pytest.raises(ValueError) as caught:
        load_jsonl(path)
    assert str(caught.value) == (
        f"{path}, line 2: not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)); line 4: `prompt` is missing; the keys are: answer (data.columns names one of them, "
        "data.prompt_template makes it from them); line 6: not valid JSON (Expecting value: line 1 column 2 "
        "(char 1)); ... (4 of 9 training rows; data.on_bad_row: drop leaves them out)"
    )
    task = load_data(DataConfig(train_file=str(path), on_bad_row="drop"))
    assert [example.place[-6:] for example in task.train] == [f"line {n}" for n in (1, 3, 5, 7, 9)]
    (note,) = task.notes
    assert note.startswith(f"4 of 9 training rows are left out (data.on_bad_row: drop): {path}, line 2: not")
    lines[0] = lines[2] = "{"
    write(path, *lines)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not valid [^;]* \(6 of 9 rows\)$"):
        load_jsonl(path)
    (note,) = load_data(DataConfig(train_file=str(path), on_bad_row="drop")).notes
    assert note.startswith("WARNING: more than half of the data is unusable; 6 of 9 training rows are left")
    assert "line 2: the same; line 3: the same; ..." in note
    write(path, "{", "{")
    with pytest.raises(
        ValueError, match=r"all 2 training rows are bad, so none is left to use: .*a\.jsonl, l"
    ):
        load_data(DataConfig(train_file=str(path), on_bad_row="drop"))


def test_a_row_with_other_columns_is_named(tmp_path):
    rows = [{"prompt": "1", "answer": "1", "hint": ""}, *[{"prompt": "1", "answer": "1"}] * 3]
    with pytest.raises(ValueError, match=r"line 1: column `hint` is new; line 2 does not have it \(1 of 4 "):
        of_rows(tmp_path, *rows)
    assert len(of_rows(tmp_path, *rows, on_bad_row="drop").train) == 3
    with pytest.raises(ValueError, match=r"data\.on_bad_row is for a train_file or dataset; arithmetic has"):
        load_data(DataConfig(on_bad_row="drop"))


def test_template_knows_both_names(tmp_path):
    row = {"question": "1+1?", "solution": "2"}
    settings = {"columns": {"prompt": "question", "answer": "solution"}}
    for name in ("question", "prompt"):
        task = of_rows(tmp_path, row, prompt_template=f"Q: {{{{ {name} }}}}\nA:", **settings)
        assert task.train == [Example("Q: 1+1?\nA:", {"answer": "2"})]
    shots = {"few_shot": [{"question": "2?", "completion": " 2"}], "few_shot_separator": "\n"}
    for name in ("question", "prompt"):
        task = of_rows(tmp_path, row, prompt_template=f"Q: {{{{ {name} }}}}\nA:", **settings, **shots)
        assert task.train[0].prompt == "Q: 2?\nA: 2\nQ: 1+1?\nA:"
    message = (
        r"rows\.jsonl, line 1: data\.prompt_template: 'quest' is undefined; the columns are: question, sol"
    )
    with pytest.raises(ValueError, match=message):
        of_rows(tmp_path, row, prompt_template="{{ quest }}", **settings)


def test_solved_examples_and_system_prompt_in_both_splits(tmp_path):
    held_out = write(tmp_path / "held_out.jsonl", '{"q": "3"}')
    settings = {
        "columns": {"prompt": "q"},
        "few_shot": [{"q": "1", "completion": " a"}, {"prompt": "2", "completion": " b"}],
        "eval_file": str(held_out),
    }
    task = of_rows(tmp_path, {"q": "4"}, **settings)
    assert [e.prompt for e in (*task.train, *task.evaluation)] == ["1 a\n\n2 b\n\n4", "1 a\n\n2 b\n\n3"]
    task = of_rows(tmp_path, {"q": "4"}, **settings, system_prompt="Count.")
    assert [m["content"] for m in task.evaluation[0].prompt] == ["Count.", "1", " a", "2", " b", "3"]


def test_built_in_tasks_take_templates(tmp_path):
    settings = {"prompt_template": "What is {{ prompt[:-1] }}?", "system_prompt": "Add."}
    plain, task = load_data(DataConfig()), load_data(DataConfig(**settings))
    for a, b in zip(plain.evaluation[:3], task.evaluation[:3], strict=True):
        assert [m["content"] for m in b.prompt] == ["Add.", f"What is {a.prompt[:-1]}?"]
        assert a.columns == b.columns
    assert task.rewards == plain.rewards


def prompts_of(examples):
    return [example.prompt for example in examples]


def test_split_is_of_the_text_alone(tmp_path):
    rows = [{"prompt": f"question {i}", "n": i} for i in range(200)]
    task = of_rows(tmp_path, *rows, eval_fraction=0.25)
    train, held_out = prompts_of(task.train), prompts_of(task.evaluation)
    assert sorted(train + held_out) == sorted(row["prompt"] for row in rows) and 30 < len(held_out) < 70
    # The order of the rows, other columns and further rows change nothing; nor do the examples before it.
    more = [{"prompt": f"other {i}", "n": "x"} for i in range(50)]
    again = of_rows(tmp_path, *more, *reversed(rows), eval_fraction=0.25)
    assert {p for p in prompts_of(again.evaluation) if p.startswith("question")} == set(held_out)
    shots = [{"prompt": "a", "completion": "b"}]
    dressed = of_rows(tmp_path, *rows, eval_fraction=0.25, few_shot=shots, few_shot_separator=";")
    assert prompts_of(dressed.evaluation) == [f"ab;{prompt}" for prompt in held_out]
    larger = of_rows(tmp_path, *rows, eval_fraction=0.5)
    assert set(prompts_of(larger.evaluation)) > set(held_out)


def test_equal_prompts_are_in_one_split(tmp_path):
    texts = [f"{a} and {a}" for a in range(60)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    rows = [{"prompt": prompt, "n": i} for prompt in [*texts, *chats] for i in range(3)]
    rows += [{"prompt": text.replace(" ", "\n\t ") + "\n", "n": 4} for text in texts]
    task = of_rows(tmp_path, *rows, eval_fraction=0.3)
    kinds = [
        {p if isinstance(p, list) else " ".join(p.split()) for p in prompts_of(side) if isinstance(p, kind)}
        if kind is str
        else {json.dumps(p) for p in prompts_of(side) if isinstance(p, kind)}
        for kind in (str, list)
        for side in (task.train, task.evaluation)
    ]
    assert not kinds[0] & kinds[1] and not kinds[2] & kinds[3] and all(kinds)
    assert len(task.train) + len(task.evaluation) == len(rows)


def test_split_that_leaves_nothing(tmp_path):
    for fraction, what in ((0.01, "none held out"), (0.999, "none to train on")):
        with pytest.raises(ValueError, match=rf"eval_fraction {fraction} of 2 prompts leaves {what}"):
            of_rows(tmp_path, {"prompt": "a"}, {"prompt": "b"}, eval_fraction=fraction)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "gsm"}, r"data\.task: 'gsm' is not a built-in task; did you mean 'gsm8k'"),
        (
            {"task": "countdown", "train_file": "a.csv"},
            r"countdown makes its own problems; leave out data\.train",
        ),
        ({"task": "addition", "dataset": "a/b"}, r"addition makes its own problems; leave out data\.dataset"),
        (
            {"columns": {"prompt": "q"}},
            r"data\.columns is for a train_file or dataset; arithmetic has its own",
        ),
        ({"eval_fraction": 0.1}, r"data\.eval_fraction is for a train_file or dataset"),
        ({"task_arguments": {"digits": 2}}, r"arithmetic has no argument 'digits'; it takes none"),
        ({"train_file": "a.csv", "task_arguments": {"x": 2}}, r"data\.task_arguments: a has no argument 'x'"),
        ({"prompt_template": "{{ x"}, r"data\.prompt_template, line 1: "),
        ({"prompt_template": "{{ x }}"}, r"'x' is undefined; the columns are: answer, prompt"),
        ({"few_shot": [{"q": "1", "completion": "2"}]}, r"data\.few_shot\[0\]: `prompt` is missing"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(**settings))


def test_types_of_parquet(tmp_path):
    """Rewards get what the file says; what cannot be a prompt is refused with its row (case data-25)."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    moment = datetime.datetime(2026, 1, 1)
    columns = {
        "decimal": pyarrow.array([decimal.Decimal("105.00"), None], pyarrow.decimal128(10, 2)),
        "bytes": [b"105", b"\xff"],
        "float": [1.5, float("nan")],
        "date": [moment.date(), None],
        "time": [moment, moment],
        "bool": [True, False],
        "word": pyarrow.array(["a", "b"]).dictionary_encode(),
        "struct": [{"ground_truth": "105", "list": [1, 2]}, None],
    }
    table = pyarrow.table({"prompt": ["1+1=", "2+2="], **columns})
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second = load_jsonl(tmp_path / "a.parquet")
    assert first.columns == {
        "decimal": decimal.Decimal("105.00"), "bytes": b"105", "float": 1.5, "date": moment.date(),
        "time": moment, "bool": True, "word": "a", "struct": {"ground_truth": "105", "list": [1, 2]},
    }  # fmt: skip
    assert second.columns["decimal"] is second.columns["struct"] is None and second.place[-5:] == "row 2"
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: .* `struct` is null \(1 of 2 training rows"):
        load_jsonl(tmp_path / "a.parquet", columns={"answer": "struct.ground_truth"})
    for name, key, value in (("time", "at", moment), ("bytes", "raw", b"\xff")):
        chats = [[{"role": "user", "content": "1+1", key: value}]] * 2
        parquet.write_table(pyarrow.table({"prompt": chats}), tmp_path / f"{name}.parquet")
        with pytest.raises(ValueError, match=rf"{name}\.parquet, row 1: `prompt\[0\]\.{key}` is of type "):
            load_jsonl(tmp_path / f"{name}.parquet")
    calls = [[{"role": "user", "content": "1", "calls": [{"name": "f"}]}], [{"role": "user", "content": "2"}]]
    parquet.write_table(pyarrow.table({"prompt": calls}), tmp_path / "c.parquet")
    assert [e.prompt for e in load_jsonl(tmp_path / "c.parquet")] == calls
