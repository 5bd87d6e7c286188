"""What surrounds the code agrees with it: contributing, citation, changelog, workflow, pre-commit."""

import re
import tomllib
from pathlib import Path

import yaml

from grpo_jax.version import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MOST_UNCHECKED = 53  # modules; lower it when the list has become shorter
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def load(name: str):
    return yaml.safe_load((ROOT / name).read_text())


def test_files_that_contributing_names_exist():
    names = set(re.findall(r"`([\w.]+/[\w./]*)`", CONTRIBUTING))
    assert len(names) > 15
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


def test_tables_that_contributing_names_are_there():
    rows = re.findall(r"^\| an? (?:[^|]*) \| ([^|]*) \| ([^|]*) \|", CONTRIBUTING, re.MULTILINE)
    assert len(rows) == 10
    for where, table in rows:
        file = (re.findall(r"`([\w./]+\.py)`", table) or re.findall(r"`([\w./]+\.py)`", where))[0]
        for name in re.findall(r"`(\w+)`", table):
            assert re.search(rf"^(def )?{name}\b", (ROOT / file).read_text(), re.MULTILINE), (name, file)


def test_the_licence_is_the_one_that_is_declared():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and len(text.splitlines()) == 201
    assert PROJECT["license"] == load("CITATION.cff")["license"] == "Apache-2.0"


def test_versions_agree():
    assert load("CITATION.cff")["version"] == __version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"[{__version__}]" in changelog or f"will be {__version__}." in changelog


def test_the_workflow_runs_what_done_means_on_every_python_that_is_declared():
    (job,) = load(".github/workflows/ci.yml")["jobs"].values()
    declared = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: Python :: 3." in line]
    assert job["strategy"]["matrix"]["python"] == declared
    assert job["steps"][-1]["run"] == "bash .ci/run"


def test_one_version_of_ruff():
    (pinned,) = (line for line in PROJECT["optional-dependencies"]["test"] if line.startswith("ruff"))
    assert re.fullmatch(r"ruff==[\d.]+", pinned)
    hooks = [hook for repo in load(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format"]
    assert all(hook["additional_dependencies"] == [pinned] for hook in hooks)
    assert r"grep -o 'ruff==[0-9.]*' pyproject.toml" in (ROOT / ".ci" / "run").read_text()


def test_types_are_checked_before_the_tests():
    steps = re.findall(r'^step "(.*?)"', (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert steps.index("types") < steps.index("tests, as the README prints them")


def test_modules_whose_types_are_not_checked_exist():
    """The list may only become shorter: a mended module leaves it, and a new one never enters."""
    (listed,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    assert listed["ignore_errors"] and len(listed["module"]) <= MOST_UNCHECKED
    files = [ROOT / f"{module.replace('.', '/')}.py" for module in listed["module"]]
    assert [str(file) for file in files if not file.is_file()] == []
