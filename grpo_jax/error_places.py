"""Finds the line of a user's own code that raised an error."""

import sysconfig
import traceback
from pathlib import Path

_LIBRARIES = tuple(Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib", "purelib", "platlib"))


def user_frame(error: BaseException, module: str | None = None) -> traceback.FrameSummary | None:
    """Returns the innermost frame of an error that a user can edit.

    Deeper frames belong to code that the user's code called. An example is ``sys.exit``, which is a Python
    function of Weights & Biases once a run is logged there.

    Args:
        error: a raised error.
        module: file of the module in question. A frame in it counts even if the module is installed.

    Returns:
        The frame. If all of them are in installed libraries, it is the innermost one. `None` without frames.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == module or not _is_installed(frame.filename)]
    found = own or frames
    return found[-1] if found else None


def _is_installed(filename: str) -> bool:
    path = Path(filename)
    return filename.startswith("<") or any(path.is_relative_to(library) for library in _LIBRARIES)
