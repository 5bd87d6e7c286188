"""Completions of a prompt, from a model or a run.

python -m grpo_jax.generate --model runs/arithmetic --prompt "12+34=" --num_samples 4
"""

import sys

from grpo_jax.screen.start import begin, clear, enter, say_aside, say_more

if __name__ == "__main__":
    begin("generate", sys.argv[1:])  # before the imports that take seconds

import json
from dataclasses import dataclass, field
from typing import Any

import jax

from grpo_jax.cli import enable_compilation_cache, run_command
from grpo_jax.config.checks import check_ranges, require
from grpo_jax.config.model import spelled_values
from grpo_jax.config.output import OutputArguments
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.config.sampling import SAMPLING_RANGES, SamplingConfig, check_endings, endings
from grpo_jax.models.completing import complete
from grpo_jax.models.endings import stop_notes
from grpo_jax.models.loading import Model, encode
from grpo_jax.run.directory import load_model_or_run, read_config, run_of


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(OutputArguments):
    """Arguments of the command. With `json` each completion is an object on a line of its own.

    Args:
        model: a local directory, a hub id, `packaged:<name>`, or a run directory.
        prompt: the text to complete.
        chat: whether the prompt is sent as a user message, through the chat template.
        chat_template: chat template of a model: `auto`, `plain` or the path of a Jinja file, as in training.
            A run has its own.
        chat_template_arguments: variables of the chat template by name, such as `enable_thinking: false`.
            Without any, those of the run are taken.
        num_samples: number of completions.
        max_new_tokens: largest number of completion tokens. `null` means that of the run, or 64 for a model,
            or fewer if the positions of the model end earlier.
        temperature: divisor of the logits. 0 decodes greedily. `null` means that of the run, or 1 for a
            model.
        top_k: number of the most likely tokens that are kept. 0 keeps all. `null` means that of the run, or 0
            for a model.
        top_p: probability mass that is kept: the smallest set of tokens with at least this probability. 1
            keeps all. `null` means that of the run, or 1 for a model.
        min_p: smallest probability of a kept token, as a fraction of the most likely token's. 0 keeps all.
            `null` means that of the run, or 0 for a model.
        eos_token_ids: the tokens that end a completion, as ids or texts. `null` means those of the model or
            run.
        stop: texts that end a completion, which is printed up to there. `null` means those of the run.
        include_stop: whether the text that ended a completion is printed as well.
        seed: seed of the sampling noise.
        dtype: data type of a model's computation, `float32` or `bfloat16`. A run has its own.
    """

    model: str
    prompt: str
    chat: bool = False
    chat_template: str = "auto"
    chat_template_arguments: dict = field(default_factory=dict)
    num_samples: int = 1
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    eos_token_ids: list[int | str] | int | str | None = None
    stop: list[str] | str | None = None
    include_stop: bool = False
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        require(self.prompt != "", "prompt: it is empty; give at least one character")
        check_ranges("", vars(self), (*SAMPLING_RANGES, *_RANGES))
        check_endings("", eos_token_ids=self.eos_token_ids, stop=self.stop, include_stop=self.include_stop)


_RANGES = (
    ("num_samples", lambda x: x >= 1, "at least 1"),
    ("temperature", lambda x: x >= 0, "0 (greedy) or above"),
)


def with_defaults(arguments: GenerateArguments, sampling: SamplingConfig) -> dict[str, Any]:
    """Returns how to sample: as the arguments say, and as a config says where they say nothing."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(arguments, name) for name in names}
    return {name: getattr(sampling, name) if value is None else value for name, value in given.items()}


def fit_positions(wanted: int, length: int, model: Model, *, exact: bool) -> int:
    """Returns the largest number of tokens that a prompt is completed with.

    Args:
        wanted: number of completion tokens that are wanted.
        length: number of tokens of the prompt.
        model: the model, whose positions limit the sum of the two.
        exact: whether the user has named the wanted number, so that fewer are an error.

    Raises:
        ValueError: prompt and completion do not fit.
    """
    if model.max_positions is None or length + wanted <= model.max_positions:
        return wanted
    left = model.max_positions - length
    if left < 1:
        raise ValueError(
            f"the prompt has {length} tokens: the {model.max_positions} positions of {model.source} leave "
            "none for a completion; give a shorter prompt"
        )
    if exact:
        raise ValueError(
            f"the {length} tokens of the prompt + max_new_tokens {wanted} exceed the {model.max_positions} "
            f"positions of {model.source}; lower one of them"
        )
    return left


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    arguments = parse_record(
        GenerateArguments,
        argv,
        command="python -m grpo_jax.generate",
        description="Complete a prompt with a model or a run.",
    )
    say_more(f"compilation cache: {enable_compilation_cache()}")
    run = run_of(arguments.model)
    config = Config() if run is None else read_config(run)
    settings = with_defaults(arguments, config.sampling)
    # The export of a run holds its chat template, but the template's arguments are in the run's config.
    template_arguments = (
        spelled_values(arguments.chat_template_arguments) or config.model.chat_template_arguments
    )
    model = load_model_or_run(
        arguments.model,
        dtype=arguments.dtype,
        chat_template=arguments.chat_template,
        chat_template_arguments=template_arguments,
        chat_template_date=config.model.chat_template_date,
        **endings(
            eos_token_ids=arguments.eos_token_ids, stop=arguments.stop, include_stop=arguments.include_stop
        ),
    )
    for note in stop_notes(model):
        say_aside(f"note: {note}")
    prompt = [{"role": "user", "content": arguments.prompt}] if arguments.chat else arguments.prompt
    sequences = encode(model, [prompt])
    length = len(sequences[0])
    settings["max_new_tokens"] = fit_positions(
        settings["max_new_tokens"], length, model, exact=arguments.max_new_tokens is not None
    )
    enter("sampling", f"{arguments.num_samples} completions")
    texts, _ = complete(
        model,
        model.params,
        sequences,
        jax.random.key(arguments.seed),
        prompt_length=length,
        group_size=arguments.num_samples,
        **settings,
    )
    clear()
    for text in texts:
        print(json.dumps({"prompt": arguments.prompt, "completion": text}) if arguments.json else text)
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
