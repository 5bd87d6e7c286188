"""train keeps run.json beside config.yaml, from its first step to its end, also if a reward fails."""

import json

import pytest
import small_run

from grpo_jax import train

REWARD = """
calls = 0

def fails_once(completions, **columns):
    global calls
    calls += 1
    if calls == 2:
        raise RuntimeError("no more paper")
    return [float(len(text)) for text in completions]
"""


def test_a_run_that_fails_and_is_continued(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARD)
    argv = small_run.arguments(
        tmp_path / "run", rewards="[mine.py:fails_once]", training__num_steps=3, evaluation__num_prompts=0,
        checkpoints__every=1,
    )  # fmt: skip

    def read():
        return json.loads((tmp_path / "run" / "run.json").read_text())

    with pytest.raises(Exception, match="no more paper"):
        train.main(argv)
    failed = read()
    assert failed["exit_code"] == 2 and "no more paper" in failed["error"]
    assert failed["ended"] is not None and failed["earlier"] == []
    assert train.main(argv) == 0
    done = read()
    assert (done["exit_code"], done["error"]) == (0, None)
    assert [attempt["exit_code"] for attempt in done["earlier"]] == [2]
    assert done["seconds"] > 0 and done["devices"] and done["versions"]["jax"]
    # A config that is refused writes nothing, and leaves the record as it is.
    with pytest.raises(ValueError, match="seed"):
        train.main([*argv, "--training.seed=7"])
    assert read() == done
    capsys.readouterr()
