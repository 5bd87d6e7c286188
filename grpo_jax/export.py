"""Writes a checkpoint of a run as a model directory, or its LoRA adapters as one for peft.

python -m grpo_jax.export runs/arithmetic --to models/adder
python -m grpo_jax.export runs/arithmetic --to models/adder --push_to_hub owner/adder
"""

import sys

from grpo_jax.screen.start import begin, clear, enter

if __name__ == "__main__":
    begin("export", sys.argv[1:])  # before the imports that take seconds

import json
import re
from dataclasses import dataclass

from grpo_jax.cli import run_command
from grpo_jax.config.output import OutputArguments
from grpo_jax.config.parsing import parse_record
from grpo_jax.models.loading import save_model
from grpo_jax.models.peft import save_adapters
from grpo_jax.models.tensor_files import DTYPES
from grpo_jax.run.directory import load_adapters, load_run, read_config
from grpo_jax.run.model_card import write_card
from grpo_jax.run.publishing import check_push, push

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, kw_only=True)
class ExportArguments(OutputArguments):
    """Arguments of the command.

    Args:
        run: a run directory.
        to: directory that is written. It is made if it does not exist, and files of the same names are
            replaced.
        step: step of the checkpoint. `null` means the newest.
        max_shard_size: largest size of one file of weights, such as `5GB` or `500MB`.
        dtype: data type of the weights: `float32`, in which they are trained, or `bfloat16` or `float16`,
            which take half the space.
        adapter: whether the adapters of a LoRA run are written alone, as peft reads them. By default they are
            merged into the model.
        push_to_hub: name of a repository of the Hugging Face hub, `owner/name`, to which the directory is
            uploaded. It takes a token (`hf auth login` or HF_TOKEN). `null` publishes nothing.
        private: whether a repository that push_to_hub makes is private.
    """

    run: str
    to: str
    step: int | None = None
    max_shard_size: str = "5GB"
    dtype: str = "float32"
    adapter: bool = False
    push_to_hub: str | None = None
    private: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.adapter and self.dtype != "float32":
            raise ValueError(
                f"dtype: {self.dtype} is for whole models; adapters are small and are saved in float32"
            )


def parse_size(text: str) -> int:
    """Returns the number of bytes that a text such as `5GB`, `500 MB` or `1000` means.

    Raises:
        ValueError: the text is no size, or the size is 0.

    >>> parse_size("1.5kb")
    1500
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", text.strip().upper())
    size = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise ValueError(
            f"max_shard_size: {text!r}; it must be a size such as 5GB or 500MB, or a number of bytes"
        )
    return size


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    arguments = parse_record(
        ExportArguments,
        argv,
        command="python -m grpo_jax.export",
        description="Write a checkpoint of a run as a model directory that transformers opens.",
        config_option=False,
        positional="run",
    )
    size = parse_size(arguments.max_shard_size)
    config = read_config(arguments.run)
    if arguments.private and arguments.push_to_hub is None:
        raise ValueError("private: it is for push_to_hub; give the name of a repository there")
    if arguments.push_to_hub is not None:
        check_push(arguments.push_to_hub, arguments.to)
    enter("exporting", arguments.to)
    if arguments.adapter:
        base, lora, adapters, step = load_adapters(arguments.run, step=arguments.step)
        save_adapters(base, lora, adapters, arguments.to)
    else:
        model, step = load_run(arguments.run, step=arguments.step)
        save_model(model, model.params, arguments.to, max_shard_size=size, dtype=arguments.dtype)
        write_card(config, arguments.to, step=step, run_dir=arguments.run)
    opens = "peft" if arguments.adapter else "transformers"
    address = None
    if arguments.push_to_hub is not None:
        enter("publishing", arguments.push_to_hub)
        message = f"Add the model of step {step}"
        address = push(arguments.push_to_hub, arguments.to, private=arguments.private, message=message)
    clear()
    if arguments.json:
        document = {"run": arguments.run, "step": step, "to": arguments.to, "opens": opens}
        print(json.dumps({**document, **({"address": address} if address else {})}))
        return 0
    print(f"saved step {step} of {arguments.run} in {arguments.to}, a directory that {opens} opens")
    if address:
        print(f"published it as {address}")
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
