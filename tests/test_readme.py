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
