"""The program of a reward worker. It loads one reward function, then judges batch after batch.

The pool starts it as a script and nobody imports it. So neither the package's own imports nor the main module
of the run are repeated here: a worker has no JAX and no device, and is up in a tenth of a second.
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
    """Serves the pool behind the file descriptor in argv[1]. The pool's process id is argv[2]."""
    atexit.register(_end)
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)
    try:
        setup = json.loads(connection.recv_bytes())
        sys.path[:] = setup["path"]
        _stand_in_for_package(Path(__file__).parents[1])
        answer, judge = _load(setup)
        while True:
            _send(connection, answer)
            answer = judge(connection.recv())
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the pool is closed
        return


def _load(setup: dict) -> tuple[dict, Callable[[dict], dict] | None]:
    """Returns the first message to the pool, and the function that turns a call into an answer."""
    try:
        from grpo_jax.rewards.calling import call_rewards
        from grpo_jax.rewards.extras import Extras, TrainerState
        from grpo_jax.rewards.loading import RewardError, load_rewards

        settings = {"function": setup["function"], "arguments": setup["arguments"], "weight": 1.0}
        rewards = load_rewards([SimpleNamespace(**settings, timeout=None)])
    except Exception as error:
        return {"error": f"{error} (in a worker process)"}, None

    def answer(call: dict) -> dict:
        state = TrainerState(**call.pop("trainer_state"))
        extras = Extras(completion_ids=call.pop("completion_ids"), trainer_state=state)
        try:
            scores = call_rewards(rewards, **call, extras=extras)[:, 0].tolist()
            return {"rewards": scores, "logged": extras.logged.metrics, "columns": extras.logged.columns}
        except RewardError as error:
            return {"error": str(error)}

    return {"ready": True}, answer


def _send(connection: Connection, answer: dict) -> None:
    # The answer is JSON, not a pickle, so that nothing from here can run code in the process that trains.
    connection.send_bytes(json.dumps(answer).encode())


def _end() -> None:
    """Ends this process and all that the function started, which are one process group."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.killpg(0, signal.SIGKILL)


def _end_with(parent: int) -> None:
    """Ends this process and all that it started when the run has ended, even in the middle of a call."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def _stand_in_for_package(directory: Path) -> None:
    """Installs a stand-in for our package, so that its modules load without the imports of its `__init__`.

    A reward function that needs something from the package itself gets it, and JAX is loaded with it.
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
        if "__getattr__" not in vars(package):  # the package is loaded and has no such name
            raise AttributeError(name)
        del package.__getattr__
        spec.loader.exec_module(package)
        return getattr(package, name)

    package.__getattr__ = load
    sys.modules["grpo_jax"] = package


if __name__ == "__main__":
    main()
