"""The list of slow test modules in conftest.py names what exists."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.fixture
def conftest(request):
    plugins = request.config.pluginmanager.get_plugins()
    return next(p for p in plugins if getattr(p, "__file__", None) == str(TESTS / "conftest.py"))


def test_what_is_slow_exists(conftest):
    missing = [name for name in conftest.SLOW if not (TESTS / name).exists()]
    assert not missing, "take these out of SLOW in tests/conftest.py, or give them their new names"


def test_folders_and_modules_are_slow_as_a_whole(conftest):
    assert conftest.is_slow(TESTS / "nightly" / "test_every_recipe.py")
    assert conftest.is_slow(TESTS / "run" / "test_resume.py")
    assert not conftest.is_slow(TESTS / "objective" / "test_kl.py")
    assert not conftest.is_slow(Path(__file__))
