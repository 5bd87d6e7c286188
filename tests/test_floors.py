"""The floors of the package: imports go down, or sideways without a cycle; a heavy library has one door.

Held by walking the syntax trees, so imports inside functions and under TYPE_CHECKING count as well.
"""

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "grpo_jax"

# Every module has a floor; the modules of a folder have the folder's. Some are still to be written.
FLOORS = {
    0: ("spelling", "types"),
    # the algebra
    1: ("advantages", "kl", "losses", "metrics", "recipes", "sampling", "shaping", "surrogates"),
    # the policy. The configuration is vocabulary, but it validates the names of recipes, so it stands here.
    2: ("algorithm_config", "attention", "config", "cpu_tuning", "data_config", "decoder", "decoder_cache", "decoding",
        "inert_settings",
        "log_probs", "lora", "meshes", "optimizers", "packing", "reference", "rotary", "sampling_config",
        "vocabulary"),
    # the outside world
    3: ("start_adapters",
        "adapters", "answer_equality", "answer_rewards", "answer_text", "architectures", "awaiting",
        "bad_rows", "categories", "chat_rows", "chat_templates", "checkpoints", "columns", "completions",
        "control_tokens", "csv_rows", "data", "digests", "encoded_examples", "endings", "estimates",
        "expressions", "families", "first_look", "flax_models", "gold_answers", "held_out", "http_scores",
        "hub_data", "implementations", "json_rows", "math_equality", "models", "notices", "polynomials",
        "prompt_lengths", "prompts", "quantities", "reward_calls", "reward_functions", "reward_models",
        "reward_pool", "reward_sources", "reward_worker", "rewards", "row_files", "row_templates",
        "silences", "sources", "stops", "stored_leaves", "tasks", "text", "token_texts", "tokenizer_files", "trackers",
        "verdicts", "verifiers", "verl_scores", "weights"),
    # the two halves
    4: ("actor", "experience", "groups", "learner", "outcomes", "standstill"),
    # the commands, and what they share
    5: ("best", "cli", "config_files", "continuing", "evaluate", "export", "generate", "model_card",
        "other_words", "parts", "plan", "progress", "runs", "score", "train"),
}  # fmt: skip
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules}
# What `import grpo_jax` may load: floors 0 to 2 and the train step.
PACKAGE_IMPORTS = {*FLOORS[0], *FLOORS[1], *FLOORS[2], "learner"}

# library -> the modules that may import it (a folder's name stands for the modules in it)
DOORS = {
    "transformers": {"models", "families", "tokenizer_files", "weights"},
    "huggingface_hub": {"sources"},
    "safetensors": {"weights"},
    "orbax": {"checkpoints"},
    "grain": {"data"},
    "wandb": {"trackers"},
    "tensorboardX": {"trackers"},
    "rich": {"trackers"},
    "jsonargparse": {"cli"},
    "datasets": {"hub_data"},
    "pyarrow": {"row_files"},
    "jinja2": {"chat_templates", "row_templates"},
    "reasoning_gym": {"tasks"},
    "math_verify": {"math_equality"},
    "torch": set(),
}
ALGEBRA = (
    "jax",
    "chex",
    "optax",
    "flax.struct",
)  # of other people's code, all that floors 0 and 1 may import
# The mathematics of the objective: what they import, directly or not, is at most six modules of the package
# and these libraries.
LOSS_MODULES = ("advantages", "kl", "surrogates", "losses", "shaping", "recipes")
LOSS_LIBRARIES = ("jax", "chex", "optax")
NAMES_OF_NOTHING = {"util", "utils", "common", "base", "misc", "helpers", "shared"}

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(ROOT.rglob("*.py"))
}  # "losses", "tasks", "tasks.arithmetic", ...; "" is the package itself
MODULES = sorted(set(FILES) - {""})


def imports_of(tree, module, modules):
    """Splits what a syntax tree imports into (modules of the package, names of other libraries)."""
    ours, others = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{module}: relative import in line {node.lineno}; write grpo_jax. in full"
            )
            # `from a import b` may mean the module a.b; the longer name tells which it is.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            by_name = called in ("import_module", "__import__") and node.args
            names = [node.args[0].value] if by_name and isinstance(node.args[0], ast.Constant) else []
        else:
            continue
        for name in names:
            if name.split(".")[0] != "grpo_jax":
                others.add(name)
                continue
            name = name.removeprefix("grpo_jax").removeprefix(".")
            while name not in modules:
                name = name.rpartition(".")[0]
            ours.add(name)
    return ours, others


IMPORTS = {
    module: imports_of(ast.parse(path.read_text(encoding="utf-8")), module, FILES)
    for module, path in FILES.items()
}


def floor_of(module):
    top = module.split(".")[0]
    assert top in FLOOR, f"grpo_jax/{module} has no floor: put it into the table of {Path(__file__).name}"
    return FLOOR[top]


def test_the_walk_sees_every_kind_of_import():
    code = """
import os, grpo_jax.kl
from grpo_jax import families
from grpo_jax.losses import grpo_loss as loss
def f():
    import wandb
    from rich.table import Table
    importlib.import_module("torch")
if TYPE_CHECKING:
    from grpo_jax.config import Config
"""
    ours, others = imports_of(ast.parse(code), "x", {"", "kl", "families", "losses", "config"})
    assert ours == {"kl", "families", "losses", "config"}
    assert others == {"os", "wandb", "rich.table.Table", "torch"}
    with pytest.raises(AssertionError, match="relative import"):
        imports_of(ast.parse("from .kl import kl_k1"), "x", set())
    assert {"losses", "kl", "types"} <= set(MODULES) and IMPORTS["losses"][0] == {"kl", "surrogates"}


def test_no_module_stands_on_two_floors():
    assert sum(map(len, FLOORS.values())) == len(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_or_sideways(module):
    floor = floor_of(module)
    for imported in IMPORTS[module][0]:
        assert imported != "", f"{module} imports the package itself; import the module that has the name"
        assert floor_of(imported) <= floor, (
            f"{module} (floor {floor}) imports {imported} (floor {floor_of(imported)}); imports only go down"
        )


def test_no_cycle():
    # A folder's __init__ may import from the folder, never the other way round: that is a cycle as well.
    try:
        TopologicalSorter({module: IMPORTS[module][0] for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", [module for module in MODULES if FLOOR.get(module.split(".")[0], 9) <= 1])
def test_the_algebra_needs_only_jax(module):
    for name in IMPORTS[module][1]:
        known = name.split(".")[0] in sys.stdlib_module_names
        assert known or any(f"{name}.".startswith(f"{library}.") for library in ALGEBRA), (
            f"{module} imports {name}; floors 0 and 1 import the standard library, {', '.join(ALGEBRA)}"
        )


def closure_of(module):
    """All modules of the package that one needs, itself included: what there is to read."""
    closure, waiting = set(), [module]
    while waiting:
        module = waiting.pop()
        if module not in closure:
            closure.add(module)
            waiting.extend(IMPORTS[module][0])
    return closure


@pytest.mark.parametrize("module", LOSS_MODULES)
def test_the_losses_can_be_read_in_one_sitting(module):
    closure = closure_of(module)
    assert module in closure and len(closure) <= 6, f"to read {module} one reads {sorted(closure)}"
    for part in closure:
        libraries = {name.split(".")[0] for name in IMPORTS[part][1]}
        strangers = libraries - set(LOSS_LIBRARIES) - sys.stdlib_module_names
        assert not strangers, f"{module} needs {part}, which imports {strangers}; only {LOSS_LIBRARIES}"


def test_closures_are_closed():
    assert closure_of("losses") == {"losses", "kl", "surrogates"}
    assert closure_of("recipes") > closure_of("losses") | {"advantages"}
    assert len(closure_of("learner")) > 6


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_one_door(library):
    users = {m for m in FILES if any(name.split(".")[0] == library for name in IMPORTS[m][1])}
    strangers = {module for module in users if module.split(".")[0] not in DOORS[library]}
    assert not strangers, f"{library} is imported by {strangers}; only {DOORS[library] or 'nobody'} may"


def test_the_package_reexports_the_lower_floors_only():
    assert IMPORTS[""][0] <= PACKAGE_IMPORTS


@pytest.mark.parametrize("module", MODULES)
def test_names_say_what_is_inside(module):
    assert not NAMES_OF_NOTHING & set(module.split(".")), f"{module}: a name that says nothing of the content"


def test_importing_the_package_loads_nothing_heavy():
    # flax loads rich on its own; what grpo_jax adds to its foundations is what counts.
    code = """
import sys
import chex, flax, jax, optax, flax.training.train_state
before = set(sys.modules)
import grpo_jax
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""
    run = [sys.executable, "-c", code]
    output = subprocess.run(
        run, cwd=ROOT.parent, capture_output=True, text=True, check=True, timeout=120
    ).stdout
    loaded = set(output.split())
    assert "grpo_jax" in loaded
    assert not loaded & set(DOORS), f"import grpo_jax loads {loaded & set(DOORS)}"


def test_importing_the_package_computes_nothing():
    # With a platform that does not exist, the first computation would be an error.
    run = [sys.executable, "-c", "import grpo_jax"]
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    result = subprocess.run(
        run, cwd=ROOT.parent, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
