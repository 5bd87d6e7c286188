"""Does a model still write English? Nats per token of a fixed passage before and after, and some samples.

    python benchmarks/coherence.py --before models/smollm2 --after runs/smollm2_addition

Both are a model directory, a hub id or a run.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import generate, token_log_probs
from grpo_jax.cli import enable_compilation_cache
from grpo_jax.models.loading import Model, decode, encode, pad_prompts
from grpo_jax.run.directory import load_model_or_run

# Charles Darwin, On the Origin of Species (1859), from its last paragraph.
PASSAGE = (
    "It is interesting to contemplate an entangled bank, clothed with many plants of many kinds, with birds "
    "singing on the bushes, with various insects flitting about, and with worms crawling through the damp "
    "earth, and to reflect that these elaborately constructed forms, so different from each other, and "
    "dependent on each other in so complex a manner, have all been produced by laws acting around us."
)
PROMPTS = ("The best thing about the sea is", "Once upon a time there was a", "To make good bread, you")


def passage_nll(model: Model) -> float:
    """Returns the nats per token of the passage, its first token given."""
    tokens = jnp.asarray(encode(model, [PASSAGE]), jnp.int32)
    mask, positions = jnp.ones(tokens.shape, bool), jnp.arange(tokens.shape[1])[None]
    hidden, _ = model.policy.forward(model.params, tokens, mask, positions, None)
    log_probs, _ = token_log_probs(model.policy, model.params, hidden[:, :-1], tokens[:, 1:])
    return -float(jnp.mean(log_probs))


def samples(model: Model, num_tokens: int) -> list[str]:
    """Returns a greedy continuation of each prompt."""
    sequences = encode(model, list(PROMPTS))
    prompts = pad_prompts(sequences, max(map(len, sequences)))
    settings = {"group_size": 1, "max_new_tokens": num_tokens, "temperature": 0.0}
    eos_ids = jnp.asarray(model.eos_ids, jnp.int32)
    rollout = generate(model.policy, model.params, prompts, jax.random.key(0), eos_ids=eos_ids, **settings)
    return decode(model, np.asarray(rollout.tokens), np.asarray(rollout.mask))


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", required=True)
    parser.add_argument("--after", required=True)
    parser.add_argument("--num-tokens", type=int, default=24, help="of each sample")
    arguments = parser.parse_args()
    enable_compilation_cache()
    nll = {}
    for name in ("before", "after"):
        model = load_model_or_run(getattr(arguments, name))
        nll[name] = passage_nll(model)
        print(f"{name}: {nll[name]:.3f} nats per token of the passage")
        for prompt, text in zip(PROMPTS, samples(model, arguments.num_tokens), strict=True):
            print(f"  {prompt}{text!r}")
    print(f"rise: {nll['after'] - nll['before']:.3f} nats")


if __name__ == "__main__":
    main()
