"""Training from Python gives what the command gives, takes objects, and says in one line what is wrong."""

import asyncio
import json
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run
from transformers import AutoTokenizer, FlaxGPT2LMHeadModel, GPT2Config

import grpo_jax.run.from_config as from_config
from grpo_jax import policy_from_apply, policy_of
from grpo_jax.config import RewardConfig, SamplingConfig
from grpo_jax.data import Example, Task
from grpo_jax.models.loading import load_model
from grpo_jax.objective.recipes import grpo
from grpo_jax.run import run
from grpo_jax.run.directory import read_config
from grpo_jax.train import train

ARITHMETIC = "packaged:arithmetic"
PACKAGED = Path(from_config.__file__).parents[1] / "packaged" / "arithmetic"
PROMPTS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 18) for b in range(10, 18)]
SMALL = {
    "sampling": {"max_new_tokens": 5},
    "training": {"batch_size": 32, "num_steps": 2, "learning_rate": 1e-4},
    "evaluation": {"num_prompts": 4, "num_samples": 2, "batch_size": 8},
}

pytestmark = pytest.mark.usefixtures("shared_compilations")


def right(prompts, completions, answer, **columns):
    return [float(text == a) for text, a in zip(completions, answer, strict=True)]


def small(*args, **changes):
    """Runs a small run of the packaged model."""
    args = args or (ARITHMETIC, PROMPTS, [right])
    changes = {
        name: {**SMALL.get(name, {}), **v} if isinstance(v, dict) else v for name, v in changes.items()
    }
    return run(*args, **{**SMALL, "quiet": True, **changes})


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# One code path


def test_it_is_the_run_of_the_command(tmp_path):
    rows = [f"{json.dumps(row)}\n" for row in PROMPTS]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "mine.py").write_text(
        "def right(prompts, completions, answer, **columns):\n"
        "    return [float(text == a) for text, a in zip(completions, answer, strict=True)]\n"
    )
    sections = {**SMALL, "data": {"train_file": f"{tmp_path}/rows.jsonl", "eval_fraction": 0.2}}
    config = from_config_file(tmp_path / "command", sections, f"{tmp_path}/mine.py:right")
    assert train(config) == 0
    result = small(run_dir=tmp_path / "python", data={"eval_fraction": 0.2})
    small_run.assert_same_run(tmp_path / "python", tmp_path / "command")
    assert (result.ended, result.step, result.exit_code) == ("finished", 2, 0)
    assert [untimed(row) for row in result.history] == small_run.rows(tmp_path / "command")
    assert same(result.params, load_model(str(tmp_path / "command" / "hf")).params)
    assert result.model.params is result.params and int(result.state.step) == 2


def from_config_file(run_dir, sections, reward):
    flat = {f"{name}__{key}": value for name, keys in sections.items() for key, value in keys.items()}
    argv = [f"--{name.replace('__', '.')}={value}" for name, value in flat.items()]
    rewards = f"[{{function: '{reward}'}}]"
    return small_run.parse_record(
        small_run.Config, [*argv, f"--rewards={rewards}", f"--run_dir={run_dir}"], command="t", description=""
    )


def untimed(row):
    return {name: value for name, value in row.items() if not small_run.is_timing(name)}


def test_without_a_run_dir_nothing_is_written(empty, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(empty))
    before = small(checkpoints={"every": 1})
    assert list(empty.iterdir()) == [] and capsys.readouterr().out == ""
    again = small()  # a second time in the same process
    assert same(before.params, again.params) and before.run_dir is None
    again.save("model", dtype="bfloat16")
    assert load_model("model").config.model_type == "gpt2"


def test_the_same_call_continues(tmp_path):
    whole = small(training={"num_steps": 3})
    stop = small(run_dir=tmp_path / "a", training={"num_steps": 3}, on_step=lambda step, metrics: step == 1)
    assert (stop.ended, stop.step) == ("stopped", 1)
    again = small(run_dir=tmp_path / "a", training={"num_steps": 3})
    assert again.step == 3 and same(again.params, whole.params)
    assert [row["step"] for row in again.history if "loss" in row] == [1, 2, 3]
    with pytest.raises(ValueError, match="the training data is not that of the checkpoint"):
        small(ARITHMETIC, PROMPTS[1:], [right], run_dir=tmp_path / "a", training={"num_steps": 4})


def test_what_is_written_down_of_objects(tmp_path):
    recipe = grpo.replace(name="mine", reduction="token")
    result = small(run_dir=tmp_path / "a", algorithm=recipe, optimizer=optax.lion, training={"num_steps": 1})
    config = read_config(tmp_path / "a")
    assert config.rewards[0].function == f"{__name__}:right" and config.data.task == "python:prompts"
    assert (config.algorithm.name, config.training.optimizer) == ("python:mine", "optax._src.alias:lion")
    assert "`mine`" in (result.run_dir / "hf" / "README.md").read_text()
    with pytest.raises(ValueError, match="'python:prompts' was an object of a Python program"):
        train(config)


# Threads, loops and callbacks


def test_in_a_thread_and_inside_a_running_loop():
    done = []

    async def later(completions, **columns):
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    async def notebook():
        done.append(small(ARITHMETIC, PROMPTS, later, training={"num_steps": 1}))

    thread = threading.Thread(target=lambda: asyncio.run(notebook()))
    thread.start()
    thread.join()
    asyncio.run(notebook())
    assert [result.step for result in done] == [1, 1] and same(done[0].params, done[1].params)


def test_on_step_sees_every_step_and_ends_the_run(tmp_path):
    seen = {}

    def on_step(step, metrics):
        seen[step] = metrics
        return "stop" if step == 2 else None

    held_out = PROMPTS[::9]
    result = small(
        run_dir=tmp_path, eval_prompts=held_out, evaluation={"every": 2}, training={"num_steps": 9},
        on_step=on_step,
    )  # fmt: skip
    assert list(seen) == [1, 2] and "eval/mean@2" not in seen[1] and 0 <= seen[2]["eval/mean@2"] <= 1
    assert seen[2]["reward"] == result.history[-2]["reward"]
    assert (result.ended, result.step) == ("stopped", 2)
    assert [row["step"] for row in result.history] == [0, 1, 2, 2]
    assert same(load_model(str(tmp_path / "hf")).params, result.params)
    assert small_run.rows(tmp_path, "completions")[-1]["step"] == 2
    with pytest.raises(ValueError, match=r"on_step returned \{'a': 1\}; it must return True or 'stop'"):
        small(on_step=lambda step, metrics: {"a": 1})


def test_trackers_of_ones_own():
    class Mine:
        def __init__(self):
            self.steps, self.said, self.closed = [], [], 0

        def log(self, step, metrics):
            self.steps.append(step)

        def message(self, text):
            self.said.append(text)

        def close(self):
            self.closed += 1

    class OnlyLogs:
        def log(self, step, metrics):
            mine.steps.append(f"{step} again")

    mine = Mine()
    small(trackers=[mine, OnlyLogs])
    assert mine.steps == [1, "1 again", 2, "2 again"] and mine.closed == 1
    assert any("policy loss near 0" in text for text in mine.said)


# Models


@pytest.fixture(scope="module")
def gpt2():
    config = GPT2Config(vocab_size=20, n_positions=32, n_embd=16, n_layer=1, n_head=2, eos_token_id=16)
    return FlaxGPT2LMHeadModel(config, seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(PACKAGED))


def first_letter(completions, **columns):
    return [float(text[:1] == "1") for text in completions]


def test_a_model_of_transformers(gpt2, tokenizer, tmp_path):
    params = jax.tree.map(np.asarray, gpt2.params)
    result = small(gpt2, ["1+1=", "2+2="], first_letter, tokenizer=tokenizer, run_dir=tmp_path / "a")
    assert same(params, gpt2.params) and not same(params, result.params)
    assert load_model(str(tmp_path / "a" / "hf")).config.model_type == "gpt2"
    again = small(gpt2, ["1+1=", "2+2="], first_letter, tokenizer=str(PACKAGED))
    assert same(again.params, result.params)


def test_a_policy_and_a_bare_function(gpt2, tokenizer, tmp_path):
    table = np.asarray(jax.random.normal(jax.random.key(0), (17, 17)))

    def bigram(params, tokens, mask, positions):
        return params[tokens]

    results = [
        small(model, ["1+1="], first_letter, tokenizer=tokenizer, params=table, algorithm={"kl_coef": 0})
        for model in (bigram, policy_from_apply(bigram))
    ]
    assert results[0].params.shape == table.shape and same(results[0].params, results[1].params)
    with pytest.raises(ValueError, match=r"no configuration of transformers.*save result\.params yourself"):
        results[0].save(tmp_path / "no")
    kept = small(
        policy_of(gpt2),
        ["1+1="],
        first_letter,
        tokenizer=tokenizer,
        params=gpt2.params,
        run_dir=tmp_path / "b",
    )
    assert (tmp_path / "b" / "checkpoints").is_dir() and not (tmp_path / "b" / "hf").exists()
    assert kept.ended == "finished"


def test_a_loaded_model_and_adapters():
    model = load_model(ARITHMETIC)
    result = small(model, PROMPTS, [right], lora={"rank": 2})
    assert jax.tree.structure(result.params) == jax.tree.structure(model.params)
    assert result.state.lora is not None and not same(result.params, model.params)


# Prompts, rewards, sections


def test_kinds_of_rewards():
    weights = small(ARITHMETIC, PROMPTS, [(right, 2.0), "exact_match", {"function": right, "weight": -1}])
    row = weights.history[-1]
    assert row["rewards/right/mean"] == row["rewards/right_2/mean"] == row["rewards/exact_match/mean"]
    assert row["reward"] == pytest.approx(2 * row["rewards/right/mean"])
    one = small(ARITHMETIC, PROMPTS, RewardConfig(function="exact_match"))
    two = small(ARITHMETIC, PROMPTS, right, sampling=SamplingConfig(max_new_tokens=5))
    assert same(one.params, two.params)

    def scaled(completions, table, **columns):
        return [float(table[0]) for _ in completions]

    spec = {"function": scaled, "arguments": {"table": np.array([3.0])}}
    assert small(ARITHMETIC, PROMPTS, spec).history[-1]["reward"] == 3


def test_an_evaluation_reward_may_be_an_object():
    evaluation = {"rewards": [{"function": first_letter}]}
    result = small(ARITHMETIC, PROMPTS, right, eval_prompts=PROMPTS[:4], evaluation=evaluation)
    assert "eval/rewards/first_letter/mean" in result.history[0]


def test_a_task_may_be_an_object():
    task = Task("mine", [Example("1+1=", {"answer": "2"})], (), ("exact_match",))
    result = small(ARITHMETIC, data={"task": task}, training={"num_steps": 1})
    assert "rewards/exact_match/mean" in result.history[0]


def test_an_optimizer_of_optax_replaces_adamw():
    still = small(optimizer=optax.sgd(0.0))
    assert same(still.params, load_model(ARITHMETIC).params)
    assert "learning_rate" not in still.history[-1]
    moved = small(optimizer=lambda schedule: optax.sgd(schedule))
    assert moved.history[-1]["learning_rate"] == pytest.approx(1e-4) and not same(moved.params, still.params)


FILE = """\
import optax
from grpo_jax import grpo
from grpo_jax.data import Example, Task

recipe = grpo.replace(name="mine", reduction="token")
number = 3

def optimizer(learning_rate):
    return optax.sgd(learning_rate)

def task(*, largest: int = 12):
    examples = [Example(f"{a}+{a}=", {"answer": str(a + a)}) for a in range(10, largest)]
    return Task("twice", examples, examples[:2], ("exact_match",))

def nothing():
    return None

def fails(*arguments):
    raise KeyError("x")

class Lines:
    def log(self, step, metrics):
        with open("lines.txt", "a") as file:
            file.write(f"{step}\\n")
"""


def test_a_config_names_tasks_recipes_optimizers_and_trackers(empty):
    (empty / "my_parts.py").write_text(FILE)
    changes = {
        "data__task": "my_parts.py:task", "data__task_arguments": "{largest: 14}", "training__num_steps": 1,
        "algorithm__name": "my_parts.py:recipe", "training__optimizer": "my_parts.py:optimizer",
        "tracking__trackers": "[my_parts.py:Lines]",
    }  # fmt: skip
    assert train(small_run.config("run", **changes)) == 0
    assert (empty / "lines.txt").read_text() == "0\n1\n1\n"
    assert {row["prompt"] for row in small_run.rows("run", "completions")} <= {
        f"{a}+{a}=" for a in range(10, 14)
    }
    assert load_model("run/hf").config.model_type == "gpt2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__task": "my_parts.py:number"},
            "'my_parts.py:number' at my_parts.py:6 is of type int, and it",
        ),
        ({"data__task": "my_parts.py:nothing"}, "my_parts.py:nothing returns of type NoneType"),
        ({"data__task": "my_parts.py:tusk"}, r"task 'my_parts.py:tusk': .* did you mean `task`"),
        (
            {"data__task": "my_parts.py:task", "data__task_arguments": "{larges: 3}"},
            "no argument 'larges'; did you",
        ),
        (
            {"algorithm__name": "my_parts.py:number"},
            "'my_parts.py:number' at my_parts.py:6 is a int, and it must be",
        ),
        ({"algorithm__name": "gone.py:x"}, "recipe file .*gone.py does not exist"),
        (
            {"training__optimizer": "my_parts.py:number"},
            "my_parts.py:number is of type int; it must be an optax opt",
        ),
        ({"training__optimizer": "my_parts.py:fails"}, "my_parts.py:fails raised KeyError"),
        ({"training__optimizer": "my_parts.py:task"}, "my_parts.py:task raised TypeError"),
        (
            {"training__optimizer": "optax:lion", "training__adam_b1": 0.8},
            "training.adam_b1: 0.8 is for AdamW",
        ),
        ({"tracking__trackers": "[my_parts.py:number]"}, "number is of type int; it must have a method log"),
        ({"tracking__trackers": "[my_parts.py:fails]"}, "my_parts.py:fails raised"),
    ],
)
def test_wrong_parts_are_one_line_before_anything_compiles(empty, changes, message, monkeypatch):
    (empty / "my_parts.py").write_text(FILE)
    monkeypatch.setattr(from_config, "start", None)
    with pytest.raises(ValueError, match=message) as error:
        train(small_run.config("run", **changes))
    assert "\n" not in str(error.value) and not (empty / "run").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(ARITHMETIC, PROMPTS, []), "rewards: none are given; give at least one function"),
        (lambda: small(ARITHMETIC, [], right), "prompts is empty; give a list of texts"),
        (
            lambda: small(ARITHMETIC, "a.jsonl", right),
            r"prompts is 'a.jsonl'; .* A file is data={'train_file'",
        ),
        (lambda: small(ARITHMETIC, {"train": PROMPTS}, right), "prompts is a dict of 'train'; .* one split"),
        (lambda: small(ARITHMETIC, [3], right), "prompts, row 1 is 3 of type int; give"),
        (lambda: small(ARITHMETIC, [{"role": "user", "content": "a"}], right), "one conversation"),
        (
            lambda: small(ARITHMETIC, [{"question": "a"}], right),
            "`prompt` is missing; the keys are: question",
        ),
        (lambda: small(ARITHMETIC, ["1+1="], right), "needs `answer`, which is neither a column"),
        (lambda: small(ARITHMETIC, PROMPTS, 3), "rewards is 3; give a function, or a list"),
        (lambda: small(ARITHMETIC, PROMPTS, [3]), "rewards: 3 is no function, pair"),
        (lambda: small(ARITHMETIC, PROMPTS, [dict]), "the class dict is no function"),
        (
            lambda: small(ARITHMETIC, PROMPTS, {"function": right, "timeout": 3.0}),
            "a timeout needs a process",
        ),
        (lambda: small(ARITHMETIC, PROMPTS, {"function": right, "wieght": 3}), "wieght"),
        (lambda: small(training={"learning_rat": 1}), "learning_rat.*did you mean.*learning_rate"),
        (lambda: small(training={"batch_size": "many"}), "training.batch_size: expected"),
        (
            lambda: small(training={"batch_size": object}),
            "training.batch_size is of type type, which is no setting",
        ),
        (
            lambda: small(training=3),
            r"training is 3; give a dict of its keys, see grpo_jax.config.TrainingConfig",
        ),
        (lambda: small(sampling={"temperature": 0}), "sampling.temperature: 0.*must be finite and above 0"),
        (lambda: small(algorithm={"num_generations": 4}), "num_generations.*algorithm.group_size"),
        (
            lambda: small(eval_prompts=PROMPTS, data={"eval_fraction": 0.5}),
            "eval_prompts and data.eval_fraction are both",
        ),
        (lambda: small(data={"train_file": "x"}), "prompts and data.train_file are both given"),
        (
            lambda: small(data={"task": "addition"}),
            "addition makes its own problems; leave out the prompts, or",
        ),
        (lambda: run(ARITHMETIC, eval_prompts=PROMPTS), "eval_prompts are given without prompts"),
        (lambda: small(optimizer=3), "optimizer '3' is unknown; Your own is package.module:function"),
        (
            lambda: small(optimizer=object()),
            "training.optimizer: python:object is of type object; it must be",
        ),
        (lambda: small(algorithm="gpro"), "'gpro' is not a recipe; choose one of grpo, "),
        (lambda: small(trackers=[object()]), "python:object is of type object; it must have a method log"),
        (lambda: small(trackers="wandb"), "tracking.wandb is given, but there is no run_dir"),
        (
            lambda: small(checkpoints={"best_metric": "eval/mean@2"}),
            "best_metric is given, but there is no run_dir",
        ),
        (lambda: small(on_step=3), r"on_step is 3; give a function of \(step, metrics\)"),
        (lambda: small(tokenizer="x"), "tokenizer is for a model that is an object"),
        (lambda: small(3, PROMPTS, right), "int is no model that grpo_jax knows"),
        (
            lambda: run(policy_from_apply(lambda p, t, m, q: p[t]), PROMPTS, right),
            "needs its tokenizer: give",
        ),
    ],
)
def test_every_mistake_is_one_line_before_anything_compiles(call, message, empty, monkeypatch):
    monkeypatch.setattr(from_config, "start", None)
    with pytest.raises((ValueError, OSError), match=message) as error:
        call()
    assert "\n" not in str(error.value) and list(empty.iterdir()) == []


def test_a_model_that_lacks_something(gpt2, tokenizer):
    policy = policy_from_apply(lambda params, tokens, mask, positions: params[tokens])
    with pytest.raises(ValueError, match="the Policy comes without its parameters; give params"):
        small(policy, PROMPTS, right, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="the Policy cannot be called with its params"):
        small(policy, PROMPTS, right, tokenizer=tokenizer, params={"a": jnp.ones(3)})
    with pytest.raises(
        ValueError, match=r"the tokenizer has .* ids up to 16, and the model's vocabulary has 9"
    ):
        small(policy, PROMPTS, right, tokenizer=tokenizer, params=jnp.ones((9, 9)))
    with pytest.raises(ValueError, match="needs its tokenizer, not a int"):
        small(gpt2, PROMPTS, right, tokenizer=3)


# TRL's quick start

QUICK_START = """\
from grpo_jax.run import run

def reward_num_unique_letters(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]

run(
    model="packaged:arithmetic",
    prompts=[f"{a}+{a}=" for a in range(10, 30)],
    rewards=reward_num_unique_letters,
    training={"num_steps": 2}, sampling={"max_new_tokens": 5}, run_dir="GRPO",
)
"""


def test_trls_quick_start_in_twelve_lines(empty):
    assert len(QUICK_START.splitlines()) <= 12
    (empty / "quick_start.py").write_text(QUICK_START)
    done = small_run.subprocess.run(
        [small_run.sys.executable, "quick_start.py"], cwd=empty, env=small_run.environment(), timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rewards" in (empty / "GRPO" / "metrics.jsonl").read_text()
    assert load_model(str(empty / "GRPO" / "hf")).config.model_type == "gpt2"
