"""Every command of a script, a benchmark or a tool that a page or a docstring prints is one that exists.

Scripts run for minutes, or need torch or the network. So each is started with the options as printed, and
stopped as soon as it has read them. What is quick runs to its end.
"""

import argparse
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from test_printed_commands import PAGES, ROOT

SCRIPTS = [path for folder in ("scripts", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
# These read sys.argv by hand, and do their work at once.
WITHOUT_A_PARSER = {
    "scripts/check_main_job.py": "`.ci/run` runs it",
    "scripts/execute_notebooks.py": "`.ci/run` runs it",
    "scripts/make_adapter_fixtures.py": "it needs torch and peft",
    "scripts/make_classifier_fixtures.py": "it needs torch",
    "scripts/make_model_fixtures.py": "it needs torch",
    "scripts/make_run_fixtures.py": "it needs a checkout of an older version",
}
SECTION_KEY = r"--(algorithm|model|lora|data|sampling|training|evaluation|checkpoints|tracking)\.\w+(=.*)?"


def printed(pattern: str) -> list[str]:
    """Returns the commands of all pages and scripts that match, each once, without their comments."""
    found = {}
    for path in [*PAGES, *SCRIPTS]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(pattern, text, re.MULTILINE):
            command = re.split(r"`|\s+#|  +\w|\)$", re.sub(r" {2,}--", " --", line))[0].strip()
            found.setdefault(command, None)
    return list(found)


COMMANDS = [
    command
    for command in printed(r"python3? ((?:scripts|benchmarks)/\w+\.py.*)$")
    if "..." not in command and command.split()[0] not in WITHOUT_A_PARSER
]


class Parsed(Exception):
    """A script has read its options."""


@pytest.fixture
def stops_when_parsed(monkeypatch):
    """Lets every parser raise Parsed after it has accepted a command line."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_args(self, args=None, namespace=None):
        _, rest = parse(self, args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {rest}")
        raise Parsed

    def parse_known_args(self, args=None, namespace=None):
        _, rest = parse(self, args, namespace)
        keys = [word for word in rest if word.startswith("-")]
        if not all(re.fullmatch(SECTION_KEY, key) for key in keys):
            self.error(f"unrecognized arguments: {rest}")
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(sys, "path", sys.path.copy())


def test_they_are_found():
    assert len(COMMANDS) > 20
    assert "benchmarks/step.py --row first --steps 10 --lengths geometric:16" in COMMANDS
    assert "scripts/mutation_check.py" in COMMANDS
    for name in WITHOUT_A_PARSER:
        assert "argparse" not in (ROOT / name).read_text(), f"{name} has a parser: take it out of the list"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_script_takes_the_options_that_are_printed(command, stops_when_parsed, monkeypatch, tmp_path):
    script, *arguments = shlex.split(command)
    for run_dir in re.findall(r"=(runs/\w+)", command):  # a run that is finished
        (tmp_path / run_dir).mkdir(parents=True)
        (tmp_path / run_dir / "metrics.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_an_option_that_a_script_does_not_have_is_noticed(stops_when_parsed, monkeypatch, capsys):
    for script in ("scripts/mutation_check.py", "benchmarks/step.py"):
        monkeypatch.setattr(sys, "argv", [script, "--no_such_option", "3"])
        monkeypatch.syspath_prepend(str((ROOT / script).parent))
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert "--no_such_option" in capsys.readouterr().err


def test_shell_scripts_are_there():
    names = {command.split()[0] for command in printed(r"\bbash ([./]\S+)")}
    assert names == {".ci/run"}
    for name in names:
        subprocess.run(["bash", "-n", name], cwd=ROOT, check=True, timeout=60)


def test_checks_of_style_run_as_printed():
    commands = printed(r"`(ruff check \.)`")
    assert commands == ["ruff check ."]
    for command in commands:
        run = [sys.executable, "-m", *shlex.split(command)]
        assert subprocess.run(run, cwd=ROOT, timeout=120, capture_output=True).returncode == 0


@pytest.mark.slow
def test_calls_of_pytest_collect_tests():
    # They are what runs this test, so that they are only collected here.
    commands = printed(r"(?:\.venv/bin/python -m |`)(pytest(?: [^`\n]*)?)")
    assert set(commands) >= {'pytest -m "not slow" -n auto', "pytest -n auto --dist loadfile"}
    for command in commands:
        run = [sys.executable, "-m", *shlex.split(command), "--collect-only", "-q"]
        assert subprocess.run(run, cwd=ROOT, timeout=300, capture_output=True).returncode == 0, command
