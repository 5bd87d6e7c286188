"""What a bug report needs: versions, devices, the compilation cache, extras, environment variables.

python -m grpo_jax.env --json

Nothing here relies on what may be broken: a JAX that does not load is reported like everything else.
"""

import argparse
import json
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from grpo_jax.screen.start import clear
from grpo_jax.version import __version__, version_of

# Only what selects code or devices is shown, never a token, a key or an address.
VARIABLES = re.compile(
    r"JAX_\w+|XLA_\w+|LIBTPU_INIT_ARGS|GRPO_JAX_\w+|CUDA_VISIBLE_DEVICES|TF_CPP_MIN_LOG_LEVEL|XDG_CACHE_HOME"
    r"|HF_HOME|HF_HUB_OFFLINE|WANDB_MODE|OMP_NUM_THREADS"
)
_ADDRESSES = re.compile(r"\w*(ADDRESS|TOKEN|KEY|SECRET|PASSWORD)\w*")
_REQUIREMENT = re.compile(r"([\w.-]+).*?(?:;.*extra == ['\"]([\w-]+)['\"].*)?")


def requirements() -> dict[str, list[str]]:
    """Returns the distributions that the package declares, by extra; those it always needs are under ''.

    It is empty where the package is not installed, only found on the path.
    """
    try:
        declared = metadata.requires("grpo-jax") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for line in declared:
        if (requirement := _REQUIREMENT.fullmatch(line)) is None:
            continue  # no requirement as we write them
        name, extra = requirement.groups()
        if name != "grpo-jax":
            found.setdefault(extra or "", []).append(name)
    return found


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = {"system": platform.platform(), "cores": os.cpu_count()}
    if hasattr(os, "sched_getaffinity"):
        found["usable_cores"] = len(os.sched_getaffinity(0))
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory_gib"] = round(size / 2**30, 1)
    return found


def _jax() -> dict[str, Any]:
    """Returns what JAX runs on and where it keeps compiled programs, or what its error says."""
    try:
        import jax

        from grpo_jax.cli import enable_compilation_cache

        cache = enable_compilation_cache()
        devices = [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()]
        return {"backend": jax.default_backend(), "devices": devices, "compilation_cache": _cache(cache)}
    except Exception as error:  # whatever is broken is what the report is about
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _cache(directory: Path) -> dict[str, Any]:
    files = [path for path in directory.glob("*-cache") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return {
        "directory": str(directory),
        "writable": os.access(directory, os.W_OK),
        "programs": len(files),
        "mib": round(size / 2**20, 1),
    }


def report() -> dict[str, Any]:
    """Returns the report as one document for JSON."""
    declared = requirements()
    needed = {name: version_of(name) for name in ["jaxlib", *declared.get("", ["jax", "flax", "optax"])]}
    extras = {
        extra: {name: version_of(name) for name in names}
        for extra, names in declared.items()
        if extra not in ("", "test")
    }
    return {
        "grpo_jax": {
            "version": __version__,
            "directory": str(Path(__file__).parent),
            "installed": bool(declared),
        },
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "machine": _machine(),
        "jax": _jax(),
        "distributions": dict(sorted(needed.items())),
        "extras": extras,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if VARIABLES.fullmatch(name) and not _ADDRESSES.fullmatch(name)
        },
    }


def _text(document: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {shown(inner)}" for name, inner in value.items())
        if isinstance(value, list):
            return ", ".join(map(shown, value))
        if isinstance(value, bool):
            return "yes" if value else "no"
        return "not installed" if value is None else str(value)

    lines = []
    for section, content in document.items():
        lines.append(section)
        lines += [f"  {name:<20} {shown(value)}" for name, value in content.items()] or ["  nothing"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo_jax.env",
        description="Print versions, devices, cache and extras, for a bug report.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    arguments = parser.parse_args(argv)
    document = report()
    clear()
    print(json.dumps(document) if arguments.json else _text(document))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
