"""Completions of a prompt, from a model or a run.

python -m grpo_jax.generate --model runs/arithmetic --prompt "12+34=" --num_samples 4
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import jax

from grpo_jax.cli import enable_compilation_cache, run_command
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import ModelConfig, spelled_values
from grpo_jax.config.sampling import SamplingConfig, check_drawing, check_endings, endings
from grpo_jax.models.completing import complete
from grpo_jax.models.endings import stop_notes
from grpo_jax.models.loading import Model, encode
from grpo_jax.run.directory import load_model_or_run, read_config, run_of


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Arguments of the command.

    Args:
        model: a local directory, a hub id, `packaged:<name>`, or a run directory.
        prompt: the text to complete.
        chat: send the prompt as a user message through the model's chat template.
        chat_template: of a model, see --help of train: `auto`, `plain` or a Jinja file; a run has its own.
        chat_template_arguments: variables of the model's chat template, such as `enable_thinking: false`;
            a run has its own.
        num_samples: completions.
        max_new_tokens: completion tokens at most. null: as many as the run trained with, 64 for a model, or
            fewer where the positions of the model end earlier.
        temperature: 0 is greedy. null: that of the run, 1 for a model.
        top_k: keep the k most likely tokens; 0 keeps all. null: that of the run, 0 for a model.
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all. null: that of the
            run, 1 for a model.
        min_p: drop tokens below this fraction of the most likely one; 0 keeps all. null: that of the run, 0
            for a model.
        eos_token_ids: the tokens that end a completion, as ids or texts; None: those of the model or run.
        stop: texts that end a completion, which is printed up to there; None: those of a run.
        include_stop: print the text that ended a completion as well.
        seed: of the sampling noise.
        dtype: compute dtype of a model; `float32` or `bfloat16`.
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
        for ok, message in (
            (self.prompt != "", "prompt: it is empty; give at least one character"),
            (self.num_samples >= 1, f"num_samples: {self.num_samples}; at least 1"),
            (
                self.temperature is None or self.temperature >= 0,
                f"temperature: {self.temperature}; 0 (greedy) or above",
            ),
        ):
            if not ok:
                raise ValueError(message)
        drawn = with_defaults(self, SamplingConfig())
        check_drawing("", **{name: drawn[name] for name in ("max_new_tokens", "top_k", "top_p", "min_p")})
        check_endings("", eos_token_ids=self.eos_token_ids, stop=self.stop, include_stop=self.include_stop)


def with_defaults(arguments: GenerateArguments, sampling: SamplingConfig) -> dict[str, Any]:
    """Returns how to draw: what the arguments say, and where they are silent what a config says."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(arguments, name) for name in names}
    return {name: getattr(sampling, name) if value is None else value for name, value in given.items()}


def fit_positions(wanted: int, length: int, model: Model, *, exact: bool) -> int:
    """Returns how many tokens to complete a prompt with.

    Args:
        wanted: completion tokens.
        length: tokens of the prompt.
        model: whose positions limit the sum.
        exact: the user has named that number, so fewer are an error.

    Raises:
        ValueError: prompt and completion do not fit.
    """
    if model.max_positions is None or length + wanted <= model.max_positions:
        return wanted
    room = model.max_positions - length
    if room < 1:
        raise ValueError(
            f"prompt of {length} tokens: the {model.max_positions} positions of {model.source} leave none "
            "for a completion; give a shorter prompt"
        )
    if exact:
        raise ValueError(
            f"prompt of {length} tokens + max_new_tokens {wanted} exceed the {model.max_positions} positions "
            f"of {model.source}; lower one of them"
        )
    return room


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    arguments = parse_record(
        GenerateArguments,
        argv,
        command="python -m grpo_jax.generate",
        description="Complete a prompt with a model or a run.",
    )
    enable_compilation_cache()
    run = run_of(arguments.model)
    drawn = with_defaults(arguments, SamplingConfig() if run is None else read_config(run).sampling)
    # The export of a run has its template; what the template was given is in the run's config.
    named = ModelConfig() if run is None else read_config(run).model
    model = load_model_or_run(
        arguments.model,
        dtype=arguments.dtype,
        chat_template=arguments.chat_template,
        chat_template_arguments=spelled_values(arguments.chat_template_arguments)
        or named.chat_template_arguments,
        chat_template_date=named.chat_template_date,
        **endings(
            eos_token_ids=arguments.eos_token_ids, stop=arguments.stop, include_stop=arguments.include_stop
        ),
    )
    for note in stop_notes(model):
        print(f"note: {note}", file=sys.stderr)
    prompt = [{"role": "user", "content": arguments.prompt}] if arguments.chat else arguments.prompt
    sequences = encode(model, [prompt])
    length = len(sequences[0])
    exact = arguments.max_new_tokens is not None
    drawn["max_new_tokens"] = fit_positions(drawn["max_new_tokens"], length, model, exact=exact)
    texts, _ = complete(
        model,
        model.params,
        sequences,
        jax.random.key(arguments.seed),
        prompt_length=length,
        group_size=arguments.num_samples,
        **drawn,
    )
    for text in texts:
        print(text)
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
