"""A run that is continued with other data, rewards or another schedule says so, or is refused."""

import json
import re
from types import SimpleNamespace

import pytest
import small_run

from grpo_jax.checkpoints.manager import Checkpoints
from grpo_jax.models.loading import load_model
from grpo_jax.run.best_model import read_best
from grpo_jax.run.build import build
from grpo_jax.run.continuing import compare_schedules, describe_start, record_schedule
from grpo_jax.train import train

pytestmark = pytest.mark.usefixtures("shared_compilations")

REWARD = """
def right(completions, answer, **columns):
    return [float(text == a) for text, a in zip(completions, answer)]
"""


class Project:
    """The files of a user, and runs of them."""

    def __init__(self, directory, capsys):
        self.directory, self._capsys = directory, capsys
        self.write("reward.py", REWARD)
        self.prompts("train.jsonl", range(10, 18))
        self.prompts("eval.jsonl", range(30, 34))

    def write(self, name, text):
        (self.directory / name).write_text(text)

    def prompts(self, name, numbers, **columns):
        rows = ({"prompt": f"{n}+12=", "answer": str(n + 12), **columns} for n in numbers)
        self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def train(self, steps=2, run_dir="run", **changes):
        """Trains and returns what was printed."""
        settings = {
            "data__train_file": self.directory / "train.jsonl",
            "data__eval_file": self.directory / "eval.jsonl",
            "rewards": f"[{{function: '{self.directory}/reward.py:right'}}]", "algorithm__kl_coef": 0,
            "evaluation__every": 0, "checkpoints__every": 2, "training__num_steps": steps,
        }  # fmt: skip
        self._capsys.readouterr()
        assert train(small_run.config(self.directory / run_dir, **settings | changes)) == 0
        return self._capsys.readouterr().out

    def notes(self, **changes):
        """Returns what a continued run says of the checkpoint, a line each."""
        return re.findall(r"note: (.*(?:checkpoint of|jumps).*)", self.train(**changes))


@pytest.fixture
def project(tmp_path, capsys):
    made = Project(tmp_path, capsys)
    made.train()
    return made


DATA_CHANGES = {  # (numbers, columns) of the new file, and what is said of it
    "appended": (range(10, 20), {}, "10 .* here; 2 were added at the end"),
    "reversed": (range(17, 9, -1), {}, "8 .* here; the same prompts in another order"),
    "dropped": (range(10, 15), {}, "5 .* here; some were added, removed or edited"),
    "edited": ([*range(10, 17), 40], {}, "8 .* here; other texts or other columns"),
    "a column": (range(10, 18), {"level": 1}, "8 .* here; other texts or other columns"),
    "longer": (range(1010, 1018), {}, "8 .* here; other texts or other columns"),
}


@pytest.mark.parametrize("change", DATA_CHANGES)
def test_other_training_data_is_refused(change, project):
    """data-10, trust-15. Both facts and the ways on are named, and nothing is touched."""
    numbers, columns, words = DATA_CHANGES[change]
    project.prompts("train.jsonl", numbers, **columns)
    before = (project.directory / "run" / "config.yaml").read_bytes()
    with pytest.raises(ValueError) as caught:
        project.train(4)
    message = str(caught.value)
    start = r"^the training data is not that of the checkpoint of step 2 in .*/run/checkpoints: "
    assert re.search(start + rf"8 prompts \(digest \w{{8}}\) there, {words}\. Continue with", message)
    assert message.endswith(", or allow the change with --checkpoints.allow_changes '[data]'")
    assert "\n" not in message
    assert (project.directory / "run" / "config.yaml").read_bytes() == before


def test_a_change_that_is_allowed_is_said_once(project):
    project.prompts("train.jsonl", range(10, 20))
    (note,) = project.notes(steps=4, checkpoints__allow_changes="[data]")
    assert (
        note.startswith("the training data is not that of the checkpoint of step 2 in ")
        and "Continue" not in note
    )
    # From its next checkpoint on the run is one of the new data, and the old one would be the change.
    assert project.notes(steps=6) == []
    project.prompts("train.jsonl", range(10, 18))
    with pytest.raises(ValueError, match=r"checkpoint of step 6 .*: 10 prompts"):
        project.train(8)
    assert project.notes(steps=2, run_dir="other") == []


def test_prompts_of_another_length_inside_a_rollout_are_refused_for_what_they_are(tmp_path, capsys):
    """Its arrays would not fit; the reason is the data."""
    project = Project(tmp_path, capsys)
    project.train(3, algorithm__num_iterations=2)
    project.prompts("train.jsonl", range(1010, 1018))
    with pytest.raises(ValueError, match=r"^the training data is not that of the checkpoint of step 3"):
        project.train(5, algorithm__num_iterations=2)


def test_another_reward_is_refused(project):
    project.write("reward.py", REWARD.replace("text == a", "text != a"))
    with pytest.raises(ValueError) as caught:
        project.train(4)
    message = str(caught.value)
    assert message.startswith("the code of the reward right is not that of the checkpoint of step 2 in ")
    assert re.search(r": reward.py has digest \w{8} there, \w{8} here\. Continue with", message)
    assert message.endswith("allow the change with --checkpoints.allow_changes '[rewards]'")
    with pytest.raises(ValueError, match="code of the reward right"):
        project.train(4, checkpoints__allow_changes="[data]")
    (note,) = project.notes(steps=4, checkpoints__allow_changes="[data, rewards]")
    assert note.startswith("the code of the reward right is not that of")


def test_comments_of_a_reward_may_change(project):
    project.write("reward.py", "# It pays what is right.\n" + REWARD.replace("    ", "\t"))
    assert project.notes(steps=4) == []


def test_held_out_data_and_rewards_that_are_only_logged_are_said(tmp_path, capsys):
    project = Project(tmp_path, capsys)
    project.write("judge.py", REWARD)
    changes = {
        "evaluation__rewards": f"[{{function: '{tmp_path}/judge.py:right'}}]",
        "checkpoints__best_metric": "eval/reward",
    }
    project.train(**changes)
    before = read_best(tmp_path / "run")
    project.prompts("eval.jsonl", range(30, 33))
    project.write("judge.py", REWARD.replace("==", "!="))
    held_out, judge = project.notes(steps=3, **changes)
    assert held_out.startswith("the held-out data is not that of the checkpoint of step 2 in ")
    assert judge.startswith("the code of the reward of evaluation right_2 is not that of")
    # Figures of before and after cannot be compared: the best model is chosen anew.
    now = read_best(tmp_path / "run")
    assert before["step"] < 3 and now["step"] == 3 and now["comparable"]


def test_another_evaluation_chooses_the_best_model_anew(tmp_path, capsys):
    project = Project(tmp_path, capsys)
    best = {"checkpoints__best_metric": "eval/mean@2"}
    project.train(**best)
    kept = read_best(tmp_path / "run")
    project.train(2, **best)  # nothing to do
    assert read_best(tmp_path / "run") == kept
    out = project.train(3, **best, evaluation__num_prompts=2)
    assert read_best(tmp_path / "run")["step"] == 3 and "is the first; the model is in" in out


def test_a_run_that_continues_another_may_have_other_data(project):
    project.prompts("train.jsonl", range(10, 20))
    (note,) = project.notes(steps=4, run_dir="other", checkpoints__resume=project.directory / "run")
    assert re.search(
        "^the training data is not that of the checkpoint of step 2 in .*/run/checkpoints: 8", note
    )


def test_a_run_of_an_earlier_version_continues(tmp_path, capsys, monkeypatch):
    project, save = Project(tmp_path, capsys), Checkpoints.save

    def save_as_before(self, step, state, extra, others=None):
        kept = {name: value for name, value in extra.items() if name not in ("inputs", "schedule")}
        return save(self, step, state, kept, others)

    with monkeypatch.context() as context:
        context.setattr(Checkpoints, "save", save_as_before)
        project.train()
    project.prompts("train.jsonl", range(10, 20))
    assert project.notes(steps=4, training__lr_schedule="constant") == []
    project.prompts("train.jsonl", range(10, 18))
    with pytest.raises(ValueError, match="the training data"):  # from now on it is known
        project.train(6)


# The learning rate


def rates(directory):
    return [row["learning_rate"] for row in small_run.rows(directory) if "learning_rate" in row]


def test_a_schedule_that_is_extended_says_so(tmp_path, capsys):
    """data-16: 1e-4, 5e-5 and then up again."""
    project, linear = Project(tmp_path, capsys), {"training__lr_schedule": "linear"}
    project.train(2, **linear)
    (note,) = project.notes(steps=4, **linear)
    before, after = rates(tmp_path / "run")[1:3]
    assert note == (
        f"the learning rate jumps: it was {before:.4g} in step 2 and is {after:.4g} in step 3, where it "
        "would have been 0: the linear schedule now ends at step 4, not 2"
    )


DONE = SimpleNamespace(skipped=1, idle=1)  # of 10 steps; the schedule counts 8


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({}, {}, None),
        ({"lr_schedule": "cosine"}, {"lr_schedule": "cosine"}, None),
        ({"num_steps": 12}, {"num_steps": 30}, None),  # constant
        ({"num_steps": 12, "warmup_steps": 9}, {"num_steps": 30, "warmup_steps": 9}, None),
        (
            {"lr_schedule": "linear"},
            {"lr_schedule": "linear", "num_steps": 40},
            "now ends at step 40, not 20",
        ),
        (
            {"lr_schedule": "cosine"},
            {"lr_schedule": "cosine", "num_steps": 12},
            "cosine schedule now ends at",
        ),
        ({"lr_schedule": "cosine"}, {"lr_schedule": "linear"}, "its settings are others now"),
        ({}, {"learning_rate": 5e-5}, "it was 0.0001 in step 10 and is 5e-05 in step 11"),
        ({"lr_schedule": "linear"}, {"lr_schedule": "linear", "num_steps": 10}, None),  # nothing is left
    ],
)
def test_the_learning_rate_on_and_off_its_course(before, now, words, tmp_path):
    model = load_model("packaged:arithmetic")

    def run(settings):
        named = {f"training__{name}": value for name, value in ({"num_steps": 20} | settings).items()}
        return build(small_run.config(tmp_path, **named), model=model)

    line = compare_schedules(run(now), record_schedule(run(before), DONE, 10), DONE, 10)
    assert (line is None) if words is None else (words in line and "\n" not in line)


def test_fewer_steps_than_are_done(project):
    project.train(4)
    out = project.train(2)
    assert "4 steps are done, more than the 2 of training.num_steps, so nothing is left to train" in out
    assert "continuing after step" not in out and describe_start(4, 4) == "continuing after step 4 of 4"
