"""Config files as people write them, and the words that they bring from other projects."""

import json

import pytest

from grpo_jax.config.files import Ambiguous, check_yaml
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config, RewardConfig


def parse(*argv) -> Config:
    return parse_record(Config, list(argv), command="test", description="")


def of_file(tmp_path, text) -> Config:
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse("--config", str(path))


# Nine lines of ten aliases each stand for a billion values.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "training: {seed: 1}\nrun_dir: x\ntraining: {num_steps: 2}\n",
            "line 3: the key `training` is given tw",
        ),
        ("training: {seed: 1, seed: 2}", "line 1: the key `seed` is given twice; join the two or"),
        (
            "rewards:\n- function: a\n  weight: 1\n  weight: 2\n",
            "line 4: the key `weight` .*, first in line 3",
        ),
        ("data:\n  columns:\n    a: b\n    a: b\n", "line 4: the key `a` is given twice, first in line 3"),
        ("data: {task_arguments: {n: {b: [{c: 1, c: 2}]}}}", "line 1: the key `c` is given twice"),
        ('run_dir: x\n"run_dir": y', "line 2: the key `run_dir` is given twice"),
        (BOMB, r"line 2: `\*a0` is an alias of YAML, which is not supported"),
        ("data: {task_arguments: &a {b: *a}}", r"line 1: `\*a` is an alias"),
        ("training: &t {seed: 1}\n", None),  # an anchor alone changes nothing
        ("data: {task_arguments: {a: " + "[" * 60 + "]" * 60 + "}}", "line 1: nested deeper than 50 levels"),
        ("training: {seed: 012}", "line 1: YAML reads 012 as another number"),
        ("training:\n  num_steps: 12:30:45\n", "line 2: YAML reads 12:30:45 as another number"),
        (b"run_dir: \xff", ": not UTF-8 text"),
    ],
)
def test_what_yaml_would_read_in_silence_as_something_else(tmp_path, text, message):
    """Seen: the second `training:` replaced the first whole; an alias bomb had no end (case data-17)."""
    if message is None:
        assert of_file(tmp_path, text).training.seed == 1
        return
    with pytest.raises(ValueError, match=rf"a\.yaml(, )?{message}") as caught:
        of_file(tmp_path, text)
    assert len(str(caught.value)) < 300


def test_text_that_only_looks_so(tmp_path):
    config = of_file(
        tmp_path,
        'run_dir: "012"\ndata: {prompt_template: "a: {{ x }}\\na: *y*", few_shot_separator: \'12:30\'}\n'
        "training: {seed: 10, num_steps: 0x1F, learning_rate: 01e-4}\n",
    )
    assert config.run_dir == "012" and config.data.prompt_template == "a: {{ x }}\na: *y*"
    assert (config.data.few_shot_separator, config.training.num_steps) == ("12:30", 31)
    assert parse("--data.prompt_template={{ a }} {{ a }}").data.prompt_template == "{{ a }} {{ a }}"
    assert parse("--data.train_file=*.jsonl").data.train_file == "*.jsonl"
    files = ["a.jsonl", "parts/*.jsonl"]
    assert parse(f"--data.train_file={files}").data.train_file == files
    with pytest.raises(ValueError, match=r"^data\.columns: the key `a` is given twice; join"):
        parse("--data.columns={a: b, a: c}")
    with pytest.raises(ValueError, match=r"^rewards: the key `weight` is given twice"):
        parse("--rewards", "[{function: a, weight: 1, weight: 2}]")
    check_yaml("no: [yaml")  # the parser says so
    with pytest.raises(ValueError, match="exceeded maximum nesting depth"):
        of_file(tmp_path, "[" * 100_000)
    with pytest.raises(Ambiguous):
        check_yaml("{a: 1, a: 1}")


NAMED = [RewardConfig(function="exact_match")]
BOTH = [*NAMED, RewardConfig(function="mine.py:good", weight=0.5)]


@pytest.mark.parametrize(
    ("text", "rewards"),
    [
        ("[exact_match]", NAMED),
        ("exact_match", NAMED),
        ("{function: exact_match}", NAMED),
        ("[{function: exact_match}]", NAMED),
        ("[exact_match, {function: 'mine.py:good', weight: 0.5}]", BOTH),
    ],
)
def test_rewards_by_name(tmp_path, text, rewards):
    """Seen: `rewards: [exact_match]` was `Expected a dot import path string` (case data-17)."""
    assert of_file(tmp_path, f"rewards: {text}\nrun_dir: x\n").rewards == rewards
    assert (
        of_file(tmp_path, f"evaluation: {{num_prompts: 3, rewards: {text}}}\n").evaluation.rewards == rewards
    )
    assert parse(f"--rewards={text}").rewards == rewards == parse("--rewards", text).rewards
    assert parse(f"--evaluation.rewards={text}").evaluation.rewards == rewards


def test_a_file_in_which_names_became_records_is_read_like_any_other(tmp_path):
    long = ", ".join(f"c{i}: d{i}" for i in range(900))
    rest = f"training: {{learning_rate: 1e-4, seed: 3}}\ndata: {{columns: {{{long}}}, task: 'yes'}}\n"
    by_name, written = (
        of_file(tmp_path, f"rewards: [a]\n{rest}"),
        of_file(tmp_path, f"rewards: [function: a]\n{rest}"),
    )
    assert by_name == written and by_name.training.learning_rate == 1e-4
    path = str(tmp_path / "a.yaml")
    assert parse("--config", path, "--rewards=[b]").rewards == [RewardConfig(function="b")]
    assert parse("--rewards=[b]", f"--config={path}").rewards == [RewardConfig(function="a")]
    with pytest.raises(ValueError, match=r"rewards.*3"):
        of_file(tmp_path, "rewards: [3]")


TRL = """
model_name_or_path: x
learning_rate: 1e-6
beta: 0.04
num_generations: 8
bf16: true
rewards: [{function: exact_match, weights: 1}]
sampling: {stop_strings: [x], repetition_penalty: 1.1}
"""


@pytest.mark.parametrize("rewrite", ["rewards: [exact_match]", "sampling: {stop: '[END]'}"])
def test_texts_stay_texts_in_a_file_that_is_rewritten(tmp_path, rewrite):
    """Seen: the quotes of "1e3" were lost, and it became the number 1000.0."""
    texts = ["1e3", "1_000", "yes", "012", "null", "1.", " x\n", "\u00e9 \U0001f600", "[a]"]
    shots = [{"prompt": text, "completion": "a"} for text in texts]
    data = json.dumps({"few_shot": shots}, ensure_ascii=False)
    config = of_file(tmp_path, f"{rewrite}\ndata: {data}\n")
    assert [shot["prompt"] for shot in config.data.few_shot] == texts


def test_all_unknown_keys_of_a_file_at_once(tmp_path):
    """Seen: 20 keys of a TRL file were 20 runs with one error each (user-front-door)."""
    with pytest.raises(ValueError) as caught:
        of_file(tmp_path, TRL)
    lines = (
        "line 2: unknown key 'model_name_or_path'; it is `model.hf_model_name` here",
        "line 3: unknown key 'learning_rate'; did you mean 'training.learning_rate'?",
        "line 4: unknown key 'beta'; it is `algorithm.kl_coef` here",
        "line 5: unknown key 'num_generations'; it is `algorithm.group_size` here",
        "line 6: unknown key 'bf16'; it is `model.dtype: bfloat16` here",
        "line 7: unknown key 'rewards.weights'; did you mean 'rewards.weight'?",
        "line 8: unknown key 'sampling.stop_strings'; it is `sampling.stop` here",
        "line 8: unknown key 'sampling.repetition_penalty'; not supported in sampling; there is a reward of "
        "that name",
    )
    assert str(caught.value).splitlines() == [
        "8 problems with the config:",
        *(f"  {tmp_path}/a.yaml, {line}" for line in lines),
    ]
    assert caught.value.lines == tuple(f"{tmp_path}/a.yaml, {line}" for line in lines)


WRONG = """
training:
  seed: -1
  learning_rate: fast
  num_stpes: 3
algorithm: {group_size: 1, kl_estimator: k9, top_entropy: 2.0}
lora: {alpha: 3, rank: many}
data: {columns: {a: b}, dataset: x/y}
rewards:
- {function: exact_match, weight: heavy}
- {function: exact_match, timeout: -1}
sampling: 7
"""


def test_everything_that_is_wrong_at_once(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(WRONG)
    other = tmp_path / "b.yaml"
    other.write_text("evaluation: {num_samples: 0}\n")
    argv = ["--config", str(path), f"--config={other}", "--trainin.seed=1", "--checkpoints.every", "0"]
    with pytest.raises(ValueError) as caught:
        parse(*argv)
    expected = [
        (4, "training.learning_rate: expected a value of type float. Got value: fast"),
        (5, "unknown key 'training.num_stpes'; did you mean 'training.num_steps'?"),
        (6, "algorithm.kl_estimator: Expected one of ['k1', 'k2', 'k3', 'ratio_k1'"),
        (7, "lora.rank: expected a value of type int. Got value: many"),
        (9, "rewards: "),
        (12, "sampling: 7 is not a section of keys (max_new_tokens"),
        (None, "unknown key 'trainin.seed'; did you mean 'training.seed'?"),
        (3, "training.seed: -1; it must be in [0, 2**31)"),
        (6, "algorithm.group_size: 1; it must be at least 2"),
        (6, "algorithm.top_entropy: 2.0; it must be in (0, 1]"),
        (None, f"{other}, line 1: evaluation.num_samples: 0; it must be at least 1"),
        (None, "checkpoints.every: 0; it must be at least 1"),
    ]
    starts = [f"{path}, line {line}: {text}" if line else text for line, text in expected]
    assert len(caught.value.lines) == len(starts)
    for said, start in zip(caught.value.lines, starts, strict=True):
        assert said.startswith(start) and "\n" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # A condition that joins settings says nothing while one of them is wrong, and is said as ever if not.
        ("lora: {alpha: 3, rank: -1}", "a.yaml, line 1: lora.rank: -1; it must be"),
        ("lora: {alpha: 3}", "a.yaml, line 1: lora.alpha is given, but lora.rank is 0"),
        ("training: {batch_size: 30}", "training.batch_size 30 counts completions and must be a multiple"),
        (
            "actor_rollout_ref:\n  rollout: {n: 8}",
            "a.yaml, line 2: unknown key 'actor_rollout_ref.rollout.n'",
        ),
    ],
)
def test_one_problem_is_one_line(tmp_path, text, message):
    with pytest.raises(ValueError) as caught:
        of_file(tmp_path, text)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(message)


def test_a_mistake_beside_an_argument_that_is_missing():
    from grpo_jax import evaluate

    with pytest.raises(ValueError, match=r"^unknown key 'modle'; did you mean 'model'\?$"):
        evaluate.main(["--modle=x"])
    with pytest.raises(ValueError, match=r"^2 problems with the config:\n.* 'a'; .*\n.* 'b'; .*$"):
        evaluate.main(["--a=1", "--b", "2"])
