"""The rooms of the package: imports between two rooms run one way; a heavy library has one door.

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

# room -> the rooms that it may import from. A module on top is a room of its own. All may import `types` and
# `lazy_names`.
ROOMS = {
    "types": (),
    "objective": (),
    "policy": ("cpu_tuning", "objective"),
    # Of the models, only the policy of a Flax model object, which `train_step` asks for when it is given one.
    "training": ("models", "objective", "policy"),
    "config": ("named_objects", "objective", "spelling"),
    "models": ("config", "policy", "spelling"),
    "rewards": ("config", "error_places", "models", "named_objects", "policy", "spelling"),
    "data": ("config", "models", "named_objects", "rewards", "spelling"),
    "evaluation": ("data", "models", "policy", "rewards", "training"),
    "checkpoints": ("error_text",),
    "screen": (),
    "trackers": ("config", "error_text", "named_objects", "screen"),
    "run": (
        "checkpoints",
        "config",
        "data",
        "error_text",
        "evaluation",
        "models",
        "named_objects",
        "objective",
        "policy",
        "rewards",
        "screen",
        "trackers",
        "training",
        "version",
        "error_text",
    ),
    "cpu_tuning": (),
    "lazy_names": (),
    "moved": (),
    "error_places": (),
    "error_text": (),
    "named_objects": ("error_places", "spelling"),
    "spelling": (),
    "version": (),
    # What `from grpo_jax import ...` gives: the lower rooms only.
    "public": ("objective", "policy", "training"),
    "cli": ("cpu_tuning", "error_text", "screen"),
    # It loads a command by name, when it is asked for one.
    "__main__": ("cli", "screen", "spelling", "version"),
}
# A command may import from every room, and nobody imports a command.
COMMANDS = ("train", "evaluate", "generate", "plan", "score", "export", "env")
# Imports that run against the rules today, (module, imported); each is about to go.
STILL_WRONG: set[tuple[str, str]] = set()
# What the package's __init__ may import; it loads `public` when the first public name is asked for.
PACKAGE_IMPORTS = ("moved", "public", "version")

# library -> the modules, or rooms, that may import it
DOORS = {
    "transformers": {
        "models.flax_families",
        "models.hf_config",
        "models.loading",
        "models.tokenizer_files",
    },
    "huggingface_hub": {"models.directories", "run.model_card", "run.publishing"},
    "safetensors": {"models.tensor_files"},
    "orbax": {"checkpoints.manager"},
    "grain": {"data.loading"},
    "wandb": {"trackers"},
    "tensorboardX": {"trackers"},
    "rich": {"screen", "trackers"},
    "jsonargparse": {"config.parsing"},
    "datasets": {"data.hub"},
    "pyarrow": {"data.rows"},
    "jinja2": {"models.chat_templates", "data.templates"},
    "requests": {"rewards.http_connection", "rewards.http_endpoint"},
    "urllib3": {"rewards.http_connection"},
    "reasoning_gym": {"rewards.reasoning_gym"},
    "math_verify": {"rewards.answers.mathematics"},
    "torch": set(),
}
# Of other people's code, all that `types` and `objective` may import, and all that one loads to read a loss.
ALGEBRA = ("jax", "jaxtyping", "chex", "optax")
LOSS_LIBRARIES = ("jax", "jaxtyping", "chex", "optax")
LOSS_MODULES = ("advantages", "kl", "surrogates", "losses", "shaping", "recipes")
# module -> how many modules of the package one has to read to understand it, itself included
CLOSURES = {"training.actor": 18, **{f"objective.{name}": 6 for name in LOSS_MODULES}}
NAMES_OF_NOTHING = {"util", "utils", "common", "base", "misc", "helpers", "shared"}

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(ROOT.rglob("*.py"))
}  # "types", "objective", "objective.losses", ...; "" is the package itself
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


def room_of(module):
    return module.split(".")[0]


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
    assert {"objective.losses", "objective.kl", "types"} <= set(MODULES)
    assert IMPORTS["objective.losses"][0] == {"objective.kl", "objective.surrogates"}


def test_every_room_is_known_and_exists():
    rooms = {room_of(module) for module in MODULES}
    known = {*ROOMS, *COMMANDS}
    assert rooms - known == set(), "enter new rooms into ROOMS of this file"
    assert known - rooms == set(), "these rooms are gone"


def test_what_is_still_wrong_is_still_there():
    assert {(a, b) for a, b in STILL_WRONG if b not in IMPORTS[a][0]} == set(), (
        "take these out of STILL_WRONG"
    )


def test_the_rules_have_one_direction():
    try:
        TopologicalSorter(ROOMS).prepare()
    except CycleError as error:
        pytest.fail(f"rooms may import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    room = room_of(module)
    for imported in IMPORTS[module][0]:
        assert imported != "", f"{module} imports the package itself; import the module that has the name"
        other = room_of(imported)
        if other in (room, "types", "lazy_names") or (module, imported) in STILL_WRONG:
            continue
        assert other not in COMMANDS, f"{module} imports the command {imported}; move what it needs into run/"
        assert room in COMMANDS or other in ROOMS[room], (
            f"{module} imports {imported}, but {room} may import only types, {', '.join(ROOMS[room])}"
        )


def test_no_cycle():
    # A folder's __init__ may import from the folder, never the other way round: that is a cycle as well.
    try:
        TopologicalSorter({module: IMPORTS[module][0] for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) in ("types", "objective")])
def test_the_algebra_needs_only_jax(module):
    for name in IMPORTS[module][1]:
        known = name.split(".")[0] in sys.stdlib_module_names
        assert known or any(f"{name}.".startswith(f"{library}.") for library in ALGEBRA), (
            f"{module} imports {name}; types and objective import the standard library, {', '.join(ALGEBRA)}"
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


@pytest.mark.parametrize("module", CLOSURES)
def test_what_matters_can_be_read_in_one_sitting(module):
    closure = closure_of(module)
    assert module in closure
    assert len(closure) <= CLOSURES[module], f"to read {module} one reads {sorted(closure)}"


@pytest.mark.parametrize("module", [f"objective.{name}" for name in LOSS_MODULES])
def test_a_loss_needs_few_libraries(module):
    for part in closure_of(module):
        libraries = {name.split(".")[0] for name in IMPORTS[part][1]}
        strangers = libraries - set(LOSS_LIBRARIES) - sys.stdlib_module_names
        assert not strangers, f"{module} needs {part}, which imports {strangers}; only {LOSS_LIBRARIES}"


def test_closures_are_closed():
    losses = closure_of("objective.losses")
    assert losses == {"objective.losses", "objective.kl", "objective.surrogates"}
    assert closure_of("objective.recipes") > losses | {"objective.advantages"}
    assert len(closure_of("training.learner")) > 6


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_one_door(library):
    users = {m for m in FILES if any(name.split(".")[0] == library for name in IMPORTS[m][1])}
    doors = DOORS[library]
    strangers = {m for m in users if not any(f"{m}.".startswith(f"{door}.") for door in doors)}
    assert not strangers, f"{library} is imported by {strangers}; only {doors or 'nobody'} may"


def test_the_package_itself_imports_almost_nothing():
    assert {room_of(module) for module in IMPORTS[""][0]} <= set(PACKAGE_IMPORTS)


@pytest.mark.parametrize("module", MODULES)
def test_names_say_what_is_inside(module):
    assert not NAMES_OF_NOTHING & set(module.split(".")), f"{module}: a name that says nothing of the content"


def test_importing_the_package_loads_nothing_heavy():
    # flax loads rich on its own; what grpo_jax adds to its foundations is what counts.
    code = """
import sys
import chex, flax, jax, optax, flax.training.train_state
before = set(sys.modules)
from grpo_jax import *
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
    run = [sys.executable, "-c", "from grpo_jax import *"]
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    result = subprocess.run(
        run, cwd=ROOT.parent, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
