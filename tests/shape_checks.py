"""Checks the shapes that the package's annotations promise, in tests and nowhere else.

The import hook of jaxtyping wraps every function and every record of CHECKED while Python imports them.
Without the hook, as users run the package, nobody looks at the annotations. JAXTYPING_DISABLE=1 turns the
checks off.
"""

import contextlib
import re
import sys

import jax
from beartype import BeartypeConf, beartype
from jaxtyping import config, install_import_hook

CHECKED = ("grpo_jax.types", "grpo_jax.objective", "grpo_jax.training")
# Files of JAX, and those of the checks themselves. The methods of a dataclass are in a file named <string>.
_JAX = re.compile(r".*[/\\]jax[/\\]_src[/\\]")
_CHECKS = re.compile(r".*[/\\](jaxtyping|beartype)[/\\]|.*shape_checks\.py$|<")
# An int is good where a float is wanted, as type checkers have it.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install():
    """Installs the hook. It acts on modules that are imported afterwards."""
    install_import_hook(CHECKED, "shape_checks.check_call")


@contextlib.contextmanager
def off():
    """Turns the checks off for a while, to see what users see who make a mistake."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)


def check_call(function):
    """Returns a function that compares its arguments with the annotations of `function`.

    The records are pytrees. JAX makes them of anything as it takes them apart and puts them together, such as
    shapes, truth values or bare objects. A record that JAX's own code makes is not checked. Neither is one
    of shapes, which the package makes to lower a program.
    """
    checked = _check(function)
    if function.__name__ != "__init__":
        return checked

    def check_record(self, *args, **kwargs):
        if not _is_made_by_jax(sys._getframe(1)) and not _has_shapes([*args, *kwargs.values()]):
            checked(self, *args, **kwargs)

    return check_record


def _has_shapes(tree):
    """Says whether there is a shape in the place of an array. A dict may be a row of data, of any keys."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda part: isinstance(part, dict))
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def _is_made_by_jax(frame):
    """Says whether the code that makes a record is JAX's own. The frames of the checks are passed over."""
    while frame is not None and _CHECKS.match(frame.f_code.co_filename):
        frame = frame.f_back
    return frame is not None and _JAX.match(frame.f_code.co_filename) is not None
