"""Executes every notebook in notebooks/ from the first cell to the last; leaves the files as they are.

python scripts/execute_notebooks.py            check that they run
python scripts/execute_notebooks.py --write    and keep the outputs
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

directory = Path(__file__).parent.parent / "notebooks"
paths = sorted(directory.glob("*.ipynb"))
if not paths:
    sys.exit(f"no notebook in {directory}")
for path in paths:
    started = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(directory)}}
    # No timings and no split streams: a second --write changes nothing but what has changed.
    options = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources=resources, **options).execute()
    if "--write" in sys.argv[1:]:
        nbformat.write(notebook, path)
    print(f"{path.name}: {len(notebook.cells)} cells in {time.perf_counter() - started:.0f} s")
