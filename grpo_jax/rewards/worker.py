"""The program of a reward worker: loads one reward function, then scores batch after batch.

Started by `reward_pool` as a script, never imported: neither the package's own imports nor the main module
of the run are repeated here, so that a worker has no JAX and no device, and is up in a tenth of a second.
"""

import atexit
import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace


def main() -> None:
    """Serves the pool at the other end of the file descriptor in argv[1], whose process is argv[2]."""
    atexit.register(_end)
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)
    try:
        setup = json.loads(connection.recv_bytes())
        sys.path[:] = setup["path"]
        _stand_in_for_package(Path(__file__).parents[1])
        answer, score = _load(setup)
        while True:
            _send(connection, answer)
            answer = score(connection.recv())
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the pool is closed
        return


def _load(setup: dict) -> tuple[dict, Callable[[dict], dict] | None]:
    """Returns what to tell the pool, and the function that turns a call into an answer."""
    try:
        from grpo_jax.rewards.loading import RewardError, load_rewards, score

        settings = {"function": setup["function"], "arguments": setup["arguments"], "weight": 1.0}
        rewards = load_rewards([SimpleNamespace(**settings, timeout=None)])
    except Exception as error:
        return {"error": f"{error} (in a worker process)"}, None

    def answer(call: dict) -> dict:
        try:
            return {"scores": score(rewards, **call)[:, 0].tolist()}
        except RewardError as error:
            return {"error": str(error)}

    return {"ready": True}, answer


def _send(connection: Connection, answer: dict) -> None:
    # JSON, not a pickle: the process that trains runs nothing that comes from here.
    connection.send_bytes(json.dumps(answer).encode())


def _end() -> None:
    """Ends this process and what the function has started and left behind: they are one process group."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.killpg(0, signal.SIGKILL)


def _end_with(parent: int) -> None:
    """Ends this process and what it started when the run is gone, even in the middle of a call."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def _stand_in_for_package(directory: Path) -> None:
    """Puts a package in place whose modules can be imported without what the package itself imports.

    A reward function that asks the package for something of its own gets it, and JAX with it.
    """
    file = directory / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "grpo_jax", file, submodule_search_locations=[str(directory)]
    )
    package: ModuleType = importlib.util.module_from_spec(spec)

    def load(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if (directory / f"{name}.py").is_file() or (directory / name).is_dir():
            return importlib.import_module(f"grpo_jax.{name}")
        if "__getattr__" not in vars(package):  # it is loaded, and has no such name
            raise AttributeError(name)
        del package.__getattr__
        spec.loader.exec_module(package)
        return getattr(package, name)

    package.__getattr__ = load
    sys.modules["grpo_jax"] = package


if __name__ == "__main__":
    main()
