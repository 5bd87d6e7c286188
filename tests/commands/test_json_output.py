"""`--json` prints one JSON document, whatever reward functions print (case data-27)."""

import contextlib
import json
import os
import sys

import pytest
import small_run

from grpo_jax import evaluate, score
from grpo_jax.cli import json_alone

LOUD = """\
import atexit, ctypes, logging, os, subprocess, sys

print("at import")
atexit.register(print, "at the end")
logging.basicConfig(stream=sys.stdout, level="INFO", force=True)

def right(prompts, completions, answer, **columns):
    print("-" * 20, f"Question: {prompts[0]}")
    sys.stdout.write("without a line feed")
    sys.__stdout__.write("by another name")
    os.write(1, b"to the descriptor\\n")
    ctypes.CDLL(None).printf(b"from C\\n")
    subprocess.run(["echo", "from a child"], check=True)
    logging.info("logged")
    return [float(c == a) for c, a in zip(completions, answer)]
"""
SETTINGS = ["--sampling.max_new_tokens=5", "--num_prompts=6", "--num_samples=8", "--evaluation.batch_size=24"]
SAID = ("at import", "Question", "without", "by another", "to the desc", "from C", "from a child", "logged")


@pytest.fixture
def loud(tmp_path):
    (tmp_path / "loud.py").write_text(LOUD)
    return tmp_path / "loud.py"


def test_score_as_a_user_types_it(loud):
    name = f"function: '{loud}:right'"
    rewards = f"[{{{name}}}, {{{name}, timeout: 60}}]"  # here, and in a worker
    done = small_run.command("score", *SETTINGS, f"--rewards={rewards}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rewards"]["right"]["mean"] > 0
    assert all(text in done.stderr for text in (*SAID, "at the end")), done.stderr


def test_evaluate(loud, tmp_path, capfd):
    rewards = [{"function": f"{loud}:right"}]
    settings = {"evaluation": {"num_prompts": 4, "num_samples": 2, "batch_size": 8}}
    config = {"rewards": rewards, "sampling": {"max_new_tokens": 5}, **settings}
    path = small_run.write_yaml(tmp_path / "config.yaml", config)
    argv = ["--model=packaged:arithmetic", f"--config={path}"]
    assert evaluate.main([*argv, "--json=true"]) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["eval/greedy_accuracy"] > 0 and "from a child" in printed.err
    assert evaluate.main(argv) == 0
    assert "from a child" in capfd.readouterr().out  # without --json nothing is moved


def test_standard_output_is_given_back(capfd):
    for error in (None, ValueError("no")):
        with contextlib.suppress(ValueError), json_alone(True) as show:
            show({"a": 1})
            os.write(1, b"noise")
            if error:
                raise error
        print("after", flush=True)
        os.write(1, b"too")
        printed = capfd.readouterr()
        assert printed.out == ("after\ntoo" if error else '{"a": 1}\nafter\ntoo') and printed.err == "noise"
    assert sys.stdout is not sys.stderr


def test_an_error_stays_one_line(loud, tmp_path, capsys):
    loud.write_text("def right(completions):\n    raise OSError('no')\n")
    with pytest.raises(ValueError, match=r"`right` .*OSError\('no'\)"):
        score.main([*SETTINGS, f"--rewards=[{{function: '{loud}:right'}}]", "--json"])
    assert capsys.readouterr().out == ""
