"""The README is true: its Python runs, its files exist, its length is kept."""

import dataclasses
import re
from pathlib import Path

from grpo_jax.config.default import DEFAULT
from grpo_jax.config.run import AlgorithmConfig
from grpo_jax.objective.advantages import ADVANTAGES
from grpo_jax.objective.kl import KL_ESTIMATORS
from grpo_jax.objective.recipes import RECIPES
from grpo_jax.objective.surrogates import SURROGATES
from grpo_jax.training import metrics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_python_examples_run(capsys):
    names = {}  # a later example may use what an earlier one has defined
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md, Python block {number}", "exec"), names)
    assert int(names["state"].step) == 1 and float(names["metrics"]["grad_norm"]) > 0


def test_files_it_names_exist():
    names = set(re.findall(r"(?:configs|benchmarks|scripts|notebooks|\.ci|grpo_jax)/[\w./]+\w", README))
    assert names
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


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


def cells(heading: str) -> list[list[str]]:
    """Returns the rows of the table with that first line, without it."""
    table = README[README.index(heading) :]
    rows = table[: table.index("\n\n")].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def numbers(text: str) -> list[float]:
    return [float(x) for x in text.split("/")]


def test_choices_of_the_recipe_table_are_those_of_the_recipes():
    rows = cells("| recipe | paper | choices |")
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
    rows = cells("| `algorithm` key |")
    named = {key for row in rows for key in re.findall(r"`(\w+)`", row[0])}
    named |= set(re.findall(r"`algorithm\.(\w+)`", README))
    assert named == {field.name for field in dataclasses.fields(AlgorithmConfig)}


def test_metrics_with_healthy_ranges_are_logged():
    rows = cells("| metric | healthy |")
    for name in (name for row in rows for name in re.findall(r"`([\w/<>]+)`", row[0])):
        assert re.search(rf"^    (.*, )?{name}(,|  )", metrics.__doc__, re.MULTILINE), name


def test_length():
    # One table maps every recipe to three other libraries, one every key around the loss to two.
    assert len(README.splitlines()) <= 330
