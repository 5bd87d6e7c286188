"""The generate command, in one process of its own: importing its module would hide the function."""

import json
import subprocess
import sys

import pytest
import small_run

# Each argument list is one call; what it prints, its exit code and its errors come back as JSON.
SCRIPT = """
import contextlib, io, json, sys
from grpo_jax.cli import run_command
from grpo_jax.generate import main
results = {}
for name, argv in json.load(sys.stdin).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_command(lambda: main(argv))
        except SystemExit as exited:
            results[name] = [exited.code, out.getvalue(), err.getvalue()]
print(json.dumps(results))
"""

MODEL = "--model=packaged:arithmetic"
GREEDY = [MODEL, "--prompt=12+34=", "--max_new_tokens=5", "--temperature=0"]
SAMPLED = [MODEL, "--prompt=12+34=", "--max_new_tokens=5", "--num_samples=20", "--temperature=2"]
GOOD = {
    "greedy": GREEDY,
    "one token": [*GREEDY, "--max_new_tokens=1"],
    "sampled": SAMPLED,
    "again": SAMPLED,
    "other seed": [*SAMPLED, "--seed=1"],
    "top_k": [*SAMPLED, "--top_k=1"],
    "top_p": [*SAMPLED, "--top_p=1e-6"],
    "min_p": [*SAMPLED, "--min_p=0.999"],
    "bfloat16": [*GREEDY, "--dtype=bfloat16"],
    "plain chat": [*GREEDY, "--chat", "--chat_template=plain", "--max_new_tokens=1", "--temperature=1"],
    "whole": [*GREEDY, "--max_new_tokens=26"],
    "stop": [*GREEDY, "--stop=6"],
    "stop included": [*GREEDY, '--stop=["6", "7"]', "--include_stop"],
    "eos": [*GREEDY, "--eos_token_ids=4"],
}
BAD = {
    "empty": ([MODEL, "--prompt="], "prompt: it is empty; give at least one character"),
    "samples": ([*GREEDY, "--num_samples=0"], "num_samples: 0; it must be at least 1"),
    "tokens": ([*GREEDY, "--max_new_tokens=0"], "max_new_tokens: 0; it must be at least 1"),
    "cold": ([*GREEDY, "--temperature=-1"], "temperature: -1.0; it must be 0 (greedy) or above"),
    "no top_k": ([*GREEDY, "--top_k=-1"], "top_k: -1; it must be 0 (off) or more"),
    "no top_p": ([*GREEDY, "--top_p=0"], "top_p: 0.0; it must be in (0, 1], where 1 is off"),
    "no min_p": ([*GREEDY, "--min_p=1"], "min_p: 1.0; it must be in [0, 1), where 0 is off"),
    "dtype": ([*GREEDY, "--dtype=float16"], "dtype 'float16': choose one of float32, bfloat16"),
    "long": (
        [*GREEDY, "--max_new_tokens=27"],
        "the 6 tokens of the prompt + max_new_tokens 27 exceed the 32 positions of packaged:arithmetic",
    ),
    "chat": ([*GREEDY, "--chat=true"], "the tokenizer of packaged:arithmetic has no chat template"),
    "template": (
        [*GREEDY, "--chat_template=no.jinja"],
        "model.chat_template: 'no.jinja' is no file; give auto",
    ),
    "model": (
        ["--model=packaged:none", "--prompt=1"],
        "FileNotFoundError: packaged:none: no such packaged model",
    ),
    "typo": ([*GREEDY, "--temprature=1"], "unknown key 'temprature'; did you mean 'temperature'?"),
    "stop": ([*GREEDY, "--stop="], "stop: an empty string would end every completion at once; leave it out"),
    "include": ([*GREEDY, "--include_stop"], "include_stop: there is nothing to include; give stop"),
    "eos": (
        [*GREEDY, "--eos_token_ids=17"],
        "17 is not an id of the vocabulary of packaged:arithmetic, 0 to",
    ),
    "missing": ([MODEL], "the following arguments are required: prompt"),
}


@pytest.fixture(scope="module")
def results():
    calls = GOOD | {f"bad {name}": argv for name, (argv, _) in BAD.items()}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(calls), capture_output=True, text=True,
        env=small_run.environment(), timeout=300, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def texts(results, name) -> list[str]:
    code, out, err = results[name]
    assert code == 0 and err == ""
    return out.splitlines()


def test_greedy(results):
    assert texts(results, "greedy") == ["46"] == texts(results, "whole") == texts(results, "bfloat16")
    assert texts(results, "one token") == ["4"]


def test_what_ends_a_completion(results):
    assert texts(results, "stop") == ["4"] == texts(results, "eos")
    assert texts(results, "stop included") == ["46"]


def test_samples_follow_the_seed(results):
    sampled = texts(results, "sampled")
    assert len(sampled) == 20 and len(set(sampled)) > 1
    assert texts(results, "again") == sampled != texts(results, "other seed")


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_truncated_to_the_likeliest_token(name, results):
    assert texts(results, name) == ["46"] * 20


def test_a_message_through_the_plain_template(results):
    assert len(texts(results, "plain chat")) == 1


@pytest.mark.parametrize("name", BAD)
def test_errors(name, results):
    code, out, err = results[f"bad {name}"]
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert BAD[name][1] in err


def test_as_a_user_types_it():
    done = small_run.command("generate", *GREEDY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "46\n", "")
