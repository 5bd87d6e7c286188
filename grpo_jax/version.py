"""The version of the package, which pyproject.toml reads here, and those of other distributions."""

from importlib import metadata

__version__ = "0.1.0"


def version_of(distribution: str) -> str | None:
    """Returns the version of a distribution that is installed, else None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
