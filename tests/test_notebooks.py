"""The notebooks are stored as they ran, and the page of pictures needs nothing above the algebra.

That they run is checked by `scripts/execute_notebooks.py`.
"""

import ast
import json
import sys
from pathlib import Path

import pytest
from test_rooms import FILES, imports_of, room_of

PATHS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_stored_outputs_are_those_of_one_run_from_top_to_bottom(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


def test_loss_variants_imports_the_algebra_only():
    path = next(path for path in PATHS if path.stem == "loss_variants")
    lines = "".join("".join(cell["source"]) + "\n" for cell in code_cells(path)).splitlines()
    code = "\n".join(line for line in lines if not line.startswith("%"))
    ours, others = imports_of(ast.parse(code), path.name, FILES)
    assert {room_of(module) for module in ours} == {"objective"}
    libraries = {name.split(".")[0] for name in others} - sys.stdlib_module_names
    assert libraries == {"jax", "numpy", "matplotlib"}
