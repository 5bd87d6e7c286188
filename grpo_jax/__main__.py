"""The commands under one name: `grpo-jax train` is `python -m grpo_jax.train`.

A command is loaded when it is asked for, so the list of them and the version are there without JAX.
"""

import importlib
import sys

from grpo_jax.screen.start import begin
from grpo_jax.spelling import suggest
from grpo_jax.version import __version__

COMMANDS = {
    "train": "Train a causal language model with GRPO.",
    "evaluate": "Evaluate a model or a run on held-out prompts, or compare two.",
    "generate": "Complete a prompt with a model or a run.",
    "plan": "Show what a config will do, without doing it.",
    "score": "Rehearse a run: sample from the base model and call the rewards, without training.",
    "export": "Write a checkpoint of a run as a model directory that transformers opens.",
    "env": "Print versions, devices, cache and extras, for a bug report.",
}


def usage() -> str:
    """Returns the list of the commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: grpo-jax COMMAND [options]      (or: python -m grpo_jax.COMMAND [options])",
            "",
            *lines,
            "",
            "grpo-jax COMMAND --help shows the options of a command, grpo-jax --version the version.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first argument names.

    Args:
        argv: the command's name and its arguments. None means those of the process.

    Returns:
        the exit code, where there is no command to run; else the command exits.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if name in COMMANDS:
        begin(name, arguments)  # before the imports that take seconds
        from grpo_jax.cli import run_command

        run_command(lambda: importlib.import_module(f"grpo_jax.{name}").main(arguments))
    if name == "--version":
        print(f"grpo-jax {__version__}")
        return 0
    if name in ("--help", "-h"):
        print(usage())
        return 0
    if name == "":
        print(usage(), file=sys.stderr)
        return 2
    advice = suggest(name, COMMANDS, f"the commands are {', '.join(COMMANDS)}")
    print(f"error: there is no command `{name}`; {advice}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
