"""Prints what can be counted of the order of the package, next to what issue 11 wants.

python scripts/house_figures.py                  # the table
python scripts/house_figures.py --where          # also the places behind each figure
"""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "grpo_jax"
LONGEST_FILE = 350
# figure -> the most that it may be once issue 11 is done
TARGETS = {
    "modules to read for training.actor": 18,
    "modules to read for objective.losses": 6,
    "semicolons per 1,000 docstring words": 5,
    "paired tuple assignments per 1,000 lines": 3,
    "arguments that are described as 'name: of ...'": 0,
    f"files over {LONGEST_FILE} lines": 0,
}
_FRAGMENT = re.compile(r"^\s{8}\w+: of ", re.MULTILINE)
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def measure(package: Path = PACKAGE) -> dict[str, tuple[float, list[str]]]:
    """Measures a package.

    Returns:
        For each name in TARGETS, the figure and the places that it counts.
    """
    texts = {
        path.relative_to(package).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(package.rglob("*.py"))
    }
    trees = {file: ast.parse(text) for file, text in texts.items()}
    lines = {file: len(text.splitlines()) for file, text in texts.items()}
    docstrings = [(file, line, text) for file in trees for line, text in _docstrings(trees[file])]
    words = sum(len(text.split()) for _, _, text in docstrings)
    semicolons = [f"{file}:{line}" for file, line, text in docstrings for _ in range(text.count(";"))]
    pairs = [f"{file}:{line}" for file in trees for line in _paired_assignments(trees[file])]
    fragments = [
        f"{file}:{text.count(chr(10), 0, match.start()) + 1}"
        for file, text in texts.items()
        for match in _FRAGMENT.finditer(text)
    ]
    long_files = [f"{file} ({count})" for file, count in lines.items() if count > LONGEST_FILE]
    imports = _imports(trees, package.name)
    actor = sorted(_closure("training.actor", imports))
    losses = sorted(_closure("objective.losses", imports))
    found = (
        (len(actor), actor),
        (len(losses), losses),
        (1000 * len(semicolons) / words, semicolons),
        (1000 * len(pairs) / sum(lines.values()), pairs),
        (len(fragments), fragments),
        (len(long_files), long_files),
    )
    return dict(zip(TARGETS, found, strict=True))


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields the line and the text of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)) is not None:
            yield node.body[0].lineno, text


def _paired_assignments(tree: ast.Module) -> Iterator[int]:
    """Yields the line of each ``a, b = x, y``: two assignments that share a line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and len(target.elts) == len(node.value.elts) > 1:
                    yield node.lineno


def _imports(trees: dict[str, ast.Module], package: str) -> dict[str, set[str]]:
    """Returns the modules of the package that each module imports, wherever the import stands in it."""
    modules = {file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): file for file in trees}
    imports = {}
    for module, file in modules.items():
        names = set()
        for node in ast.walk(trees[file]):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # `from a import b` may mean the module a.b, so the longest name that is a module counts.
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        ours = {name.removeprefix(f"{package}.") for name in names if name.startswith(f"{package}.")}
        prefixes = {name: [name, name.rpartition(".")[0]] for name in ours}
        imports[module] = {next((p for p in prefixes[name] if p in modules), "") for name in ours} - {""}
    return imports


def _closure(module: str, imports: dict[str, set[str]]) -> set[str]:
    """Returns all modules of the package that one needs, itself included: what there is to read."""
    closure = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current not in closure:
            closure.add(current)
            waiting.extend(imports[current])
    return closure


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--where", action="store_true", help="print the places behind each figure as well")
    arguments = parser.parse_args()
    print("| figure | now | target |\n|---|---|---|")
    measured = measure()
    for name, (figure, _) in measured.items():
        print(f"| {name} | {figure:.3g} | {TARGETS[name]} |")
    if arguments.where:
        for name, (_, places) in measured.items():
            print(f"\n{name}:", *places, sep="\n  ")


if __name__ == "__main__":
    main()
