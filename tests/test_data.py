"""Examples from files, and their order as a function of (seed, step)."""

from itertools import chain

import pytest

from grpo_jax.config import DataConfig
from grpo_jax.data import Example, batch, load_data


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


def test_batch_refuses_nonsense():
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
