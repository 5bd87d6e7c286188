"""The READMEs are true: their Python runs, their links lead somewhere, their tables are those of the code."""

import dataclasses
import importlib.util
import re
import tomllib
from importlib import metadata
from pathlib import Path, PurePath

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.config.default import DEFAULT
from grpo_jax.config.run import AlgorithmConfig, Config
from grpo_jax.objective.advantages import ADVANTAGES
from grpo_jax.objective.kl import KL_ESTIMATORS
from grpo_jax.objective.recipes import RECIPES
from grpo_jax.objective.surrogates import SURROGATES
from grpo_jax.rewards import REWARDS
from grpo_jax.training import metrics as training_metrics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ROOMS = ("objective", "rewards", "models", "training")
REFERENCE = {room: (ROOT / "grpo_jax" / room / "README.md").read_text() for room in ROOMS}
KEYS = (ROOT / "configs" / "README.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md", "benchmarks/README.md")),
    *(ROOT / "grpo_jax" / room / "README.md" for room in ROOMS),
    *sorted((ROOT / "docs").glob("*.md")),
]
TITLES = {str(path.relative_to(ROOT)): path for path in PAGES}


def test_python_examples_run():
    names = {}  # a later example may use what an earlier one has defined
    for title, text in {"README.md": README, **REFERENCE}.items():
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)):
            exec(compile(block, f"{title}, Python block {number}", "exec"), names)
    assert int(names["state"].step) == 1 and float(names["metrics"]["grad_norm"]) > 0
    assert names["right"]([], ["3 4", ""], [3, 4]) == [1.0, 0.0]
    assert names["ends_with_a_full_stop"]([], ["a. ", "b"]) == [1.0, 0.0]
    gradient = jax.grad(names["loss_fn"])(names["old"])
    assert float(jnp.abs(gradient).max()) > 0


@pytest.mark.parametrize("title", TITLES)
def test_files_that_a_page_names_exist(title):
    text = TITLES[title].read_text()
    folders = r"(?:configs|benchmarks|scripts|notebooks|docs|tests|\.ci|grpo_jax)"
    names = set(re.findall(rf"(?<![\w./]){folders}/[\w./]+\w", text))
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("title", TITLES)
def test_links_of_a_page_lead_somewhere(title):
    links = re.findall(r"\]\(([^)\s]+)\)", TITLES[title].read_text())
    local = [link.split("#")[0] for link in links if "://" not in link]
    assert [link for link in local if not (TITLES[title].parent / link).exists()] == []


def test_the_readme_leads_to_every_page():
    links = set(re.findall(r"\]\(([^)\s]+)\)", README))
    for text in REFERENCE.values():
        links |= {link.removeprefix("../../") for link in re.findall(r"\]\(([^)\s]+)\)", text)}
    assert {title for title in TITLES if not title.startswith("docs/")} - {"README.md"} <= links
    # The start page of the site lists whatever is in docs/, see tests/test_site.py.
    assert "docs/index.md" in links and {"docs/data.md", "docs/api.md", "docs/from_trl.md"} <= links


def test_the_tables_of_keys_are_current():
    spec = importlib.util.spec_from_file_location("key_tables", ROOT / "scripts" / "key_tables.py")
    key_tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(key_tables)
    assert key_tables.updated(KEYS) == KEYS, "run python scripts/key_tables.py"
    shown = [name for name, _ in key_tables.records(Config)]
    assert len(shown) == 13 and all(f"\n### `{name}`\n" in KEYS for name in shown if name)
    assert "| `clip_range` | float or null | `null` | distance from 1" in KEYS
    assert "| `allow_changes` | list of `data`, `rewards` | `[]` |" in KEYS


def test_every_config_is_in_the_table_of_configs():
    rows = cells("| config | what | updates", KEYS)
    named = {name for row in rows for name in re.findall(r"`([\w.]+\.yaml)`", row[0])}
    assert named == {path.name for path in (ROOT / "configs").glob("*.yaml")}


def test_readmes_inside_the_package_are_not_shipped():
    # They are read on GitHub and on the site. A wheel holds the Python files and the data that is named.
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = [pattern for patterns in data.values() for pattern in patterns]
    for room in ROOMS:
        assert not any(PurePath(room, "README.md").match(pattern) for pattern in patterns)


TREE = README[README.index("\ngrpo_jax/\n") + 1 :].split("```")[0].splitlines()


def paths(lines: list[str]) -> list[str]:
    """Returns the paths that a tree names. Two spaces of indentation are one folder.

    A file or folder that a description names is in the folder that it describes, or beside the file.
    """
    found, folders = [], []
    for line in lines:
        name, _, description = line.strip().partition("  ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name] if name.endswith("/") else []
        beside = "".join(folders)
        found += [beside] if name.endswith("/") else [beside + file for file in name.split()]
        found += [beside + file for file in re.findall(r"\w+\.py|\w+/", description)]
    return found


def test_how_a_tree_is_read():
    lines = [
        "a/  has x.py and y/",
        "  b.py c.py   beside d.py",
        "  d/   a folder",
        "    e.py",
        "  f.py",
        "g/",
    ]
    assert paths(lines) == [
        *("a/", "a/x.py", "a/y/", "a/b.py", "a/c.py", "a/d.py", "a/d/", "a/d/e.py", "a/f.py", "g/")
    ]


def test_the_tree_names_what_exists_and_every_room():
    named = paths(TREE)
    assert [name for name in named if not (ROOT / name).exists()] == []
    folders = [path for path in (ROOT / "grpo_jax").iterdir() if any(path.glob("*.py"))]
    assert {f"grpo_jax/{folder.name}/" for folder in folders} <= set(named)
    assert len(TREE) <= 30


def test_the_packaged_config_is_that_of_the_main_job():
    shown = ROOT / "configs" / "grpo_config.yaml"
    assert DEFAULT.read_text() == shown.read_text(), f"copy {shown} to {DEFAULT}"


def cells(heading: str, text: str) -> list[list[str]]:
    """Returns the rows of a text's table with that first line, without it."""
    table = text[text.index(heading) :]
    rows = table.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def numbers(text: str) -> list[float]:
    return [float(x) for x in text.split("/")]


def test_choices_of_the_recipe_table_are_those_of_the_recipes():
    rows = cells("| recipe | paper | choices |", REFERENCE["objective"])
    assert [row[0].strip("`") for row in rows] == list(RECIPES)
    names = {f: name for table in (ADVANTAGES, SURROGATES, KL_ESTIMATORS) for name, f in table.items()}
    for recipe, (_, paper, choices, *_) in zip(RECIPES.values(), rows, strict=True):
        advantage, ratio_level, surrogate, kl, reduction = choices.split(";")[0].split(", ")
        assert (advantage, ratio_level, reduction) == (
            names[recipe.advantage],
            recipe.ratio_level,
            recipe.reduction,
        )
        name, *clip = surrogate.split()
        assert name == names[recipe.surrogate]
        assert (numbers(clip[0]) if clip else []) == list(recipe.clip.values())
        if kl == "–":
            assert recipe.kl_coef == 0
        else:
            estimator, coefficient, *where = kl.split()
            assert (estimator, float(coefficient)) == (names[recipe.kl_estimator], recipe.kl_coef)
            assert recipe.kl_placement == (where[-1] if where else "loss")
        assert ("dynamic sampling" in choices) == recipe.dynamic_sampling
        assert ("overlong" in choices) == (recipe.overlong_tokens(100) > 0)
        links = re.findall(r"\(https://(.*)\)", paper)
        assert all(link in recipe.paper for link in links)


def test_keys_of_the_algorithm_are_all_explained():
    rows = cells("| `algorithm` key |", REFERENCE["objective"])
    named = {key for row in rows for key in re.findall(r"`(\w+)`", row[0])}
    named |= set(re.findall(r"`algorithm\.(\w+)`", KEYS))
    assert named == {field.name for field in dataclasses.fields(AlgorithmConfig)}


def test_metrics_with_healthy_ranges_are_logged():
    rows = cells("| metric | healthy |", REFERENCE["training"])
    for name in (name for row in rows for name in re.findall(r"`([\w/<>]+)`", row[0])):
        assert re.search(rf"^    (.*, )?{name}(,|  )", training_metrics.__doc__, re.MULTILINE), name


def test_built_in_rewards_are_all_listed():
    rows = cells("| built-in reward |", REFERENCE["rewards"])
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert named == set(REWARDS) | {"reward_model"}


def test_length():
    assert len(README.split()) <= 1200
    assert len(README.splitlines()) <= 150
    assert [line for line in README.splitlines() if len(line) > 120] == []


def test_the_commands_that_ci_reads():
    first, second = (line for line in README.splitlines() if line.startswith("python3 -m venv"))
    assert first.endswith(".venv/bin/grpo-jax train --config configs/grpo_config.yaml")
    assert second.endswith(".venv/bin/python -m pytest -n auto --dist loadfile")


def test_extras_that_pages_install_exist():
    ours = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    extras = {"grpo-jax": ours, ".": ours, "jax": set(metadata.metadata("jax").get_all("Provides-Extra"))}
    text = "".join(path.read_text() for path in PAGES)
    found = re.findall(r"pip install (?:-q )?(?:-e )?\"?([\w.-]+)\[([\w,-]+)\]", text)
    assert {("jax", "cuda13"), ("jax", "tpu"), (".", "test")} <= set(found)
    assert [pair for pair in found if not set(pair[1].split(",")) <= extras[pair[0]]] == []
