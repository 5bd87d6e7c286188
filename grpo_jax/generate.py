"""Completions of a prompt, from a model or a run.

python -m grpo_jax.generate --model runs/arithmetic --prompt "12+34=" --num_samples 4
"""

import sys
from dataclasses import dataclass

import jax
import numpy as np

from grpo_jax.cli import enable_compilation_cache, parse_record, run_command
from grpo_jax.decoding import generate
from grpo_jax.endings import end_arguments, stop_notes
from grpo_jax.models import decode, encode, pad_prompts
from grpo_jax.runs import load_model_or_run
from grpo_jax.sampling_config import check_drawing, check_endings, endings


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Arguments of the command.

    Args:
        model: a local directory, a hub id, `packaged:<name>`, or a run directory.
        prompt: the text to complete.
        chat: send the prompt as a user message through the model's chat template.
        chat_template: of a model, see --help of train: `auto`, `plain` or a Jinja file; a run has its own.
        num_samples: completions.
        max_new_tokens: tokens at most.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
        min_p: drop tokens below this fraction of the most likely one; 0 keeps all.
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
    num_samples: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    eos_token_ids: list[int | str] | int | str | None = None
    stop: list[str] | str | None = None
    include_stop: bool = False
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        for ok, message in (
            (self.prompt != "", "prompt: it is empty; give at least one character"),
            (self.num_samples >= 1, f"num_samples: {self.num_samples}; at least 1"),
            (self.temperature >= 0, f"temperature: {self.temperature}; 0 (greedy) or above"),
        ):
            if not ok:
                raise ValueError(message)
        check_drawing(
            "",
            max_new_tokens=self.max_new_tokens,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        )
        check_endings("", eos_token_ids=self.eos_token_ids, stop=self.stop, include_stop=self.include_stop)


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    arguments = parse_record(
        GenerateArguments,
        argv,
        command="python -m grpo_jax.generate",
        description="Complete a prompt with a model or a run.",
    )
    enable_compilation_cache()
    model = load_model_or_run(
        arguments.model,
        dtype=arguments.dtype,
        chat_template=arguments.chat_template,
        **endings(
            eos_token_ids=arguments.eos_token_ids, stop=arguments.stop, include_stop=arguments.include_stop
        ),
    )
    for note in stop_notes(model):
        print(f"note: {note}", file=sys.stderr)
    prompt = [{"role": "user", "content": arguments.prompt}] if arguments.chat else arguments.prompt
    sequences = encode(model, [prompt])
    length = len(sequences[0])
    if model.max_positions is not None and length + arguments.max_new_tokens > model.max_positions:
        raise ValueError(
            f"prompt of {length} tokens + max_new_tokens {arguments.max_new_tokens} exceed the "
            f"{model.max_positions} positions of {model.source}; lower one of them"
        )
    rollout = generate(
        model.policy,
        model.params,
        pad_prompts(sequences, length),
        jax.random.key(arguments.seed),
        group_size=arguments.num_samples,
        max_new_tokens=arguments.max_new_tokens,
        **end_arguments(model),
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
    )
    for text in decode(model, np.asarray(rollout.tokens), np.asarray(rollout.mask)):
        print(text)
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
