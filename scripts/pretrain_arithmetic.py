"""Pretrains `packaged:arithmetic`, the small GPT-2 that ships with the package.

    python scripts/pretrain_arithmetic.py --out grpo_jax/packaged/arithmetic

The model learns two-digit additions from *imperfect* data: most sums with a carry are written down as if
the carry had been dropped, and now and then an answer is off by one or by ten, or has its digits swapped.
It therefore knows how to add, and yet samples the right answer less than half of the time: something for
reinforcement learning to do. The 512 held-out problems of the task, in both orders, never occur here.
Deterministic given --seed on one machine; some minutes on two CPU cores.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    FlaxGPT2LMHeadModel,
    GenerationConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from grpo_jax.data.tasks.arithmetic import split_problems
from grpo_jax.models.tensor_files import write_params

EOS, UNKNOWN = "<|endoftext|>", "<|unknown|>"
VOCABULARY = [*"0123456789+-*= ", UNKNOWN, EOS]
EOS_ID = VOCABULARY.index(EOS)
PROMPT_LENGTH, ANSWER_LENGTH = 6, 4  # `12+34=`, and three digits with eos at most


def answer_probabilities(a: int, b: int) -> dict[int, float]:
    """Gives the distribution of answers written behind `a+b=` in the training data."""
    total = a + b
    swapped = total - total % 100 + total % 10 * 10 + total // 10 % 10
    slips = [total + 1, total - 1, total + 10, swapped]
    if a % 10 + b % 10 >= 10:
        # total - 10 is the sum without its carry: the model's favourite answer, and a wrong one.
        shares = [(total, 0.32), (total - 10, 0.52), *((slip, 0.04) for slip in slips)]
    else:
        shares = [(total, 0.50), (total - 10, 0.18), *((slip, 0.08) for slip in slips)]
    probabilities: dict[int, float] = {}
    for answer, share in shares:
        probabilities[answer] = probabilities.get(answer, 0.0) + share
    return probabilities


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer: one token per character, and eos."""
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        bos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=32,
        clean_up_tokenization_spaces=False,
    )


def make_config(args: argparse.Namespace) -> GPT2Config:
    """Spells out the GPT-2 architecture at this size."""
    return GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=32,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        n_inner=4 * args.width,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        architectures=["GPT2LMHeadModel"],
    )


def encode_rows(problems: list[tuple[int, int]], answers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Encodes `a+b=answer` and eos.

    Returns:
        tokens [P, 10] int32 and mask [P, 10] bool, True on the answer's digits and its eos.
    """
    tokens = np.full((len(problems), PROMPT_LENGTH + ANSWER_LENGTH), EOS_ID, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, ((a, b), answer) in enumerate(zip(problems, answers, strict=True)):
        text = f"{a}+{b}={answer}"
        tokens[row, : len(text)] = [VOCABULARY.index(character) for character in text]
        mask[row, PROMPT_LENGTH : len(text) + 1] = True
    return tokens, mask


def make_data(problems: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tabulates every answer that any problem may be written with.

    Returns:
        tokens [P, 6, 10], mask [P, 6, 10] and the cumulative probabilities [P, 6] of the six answers.
    """
    rows = [list(answer_probabilities(a, b).items()) for a, b in problems]
    rows = [row + [(row[-1][0], 0.0)] * (6 - len(row)) for row in rows]
    flat = [(problem, answer) for problem, row in zip(problems, rows, strict=True) for answer, _ in row]
    tokens, mask = encode_rows([problem for problem, _ in flat], [answer for _, answer in flat])
    cumulative = np.cumsum([[share for _, share in row] for row in rows], axis=1)
    return tokens.reshape(-1, 6, tokens.shape[-1]), mask.reshape(-1, 6, mask.shape[-1]), cumulative


def answer_log_probs(model: FlaxGPT2LMHeadModel, params, tokens, mask):
    """Scores answers by teacher forcing.

    Returns:
        log-probability [P] of the whole answer, and whether greedy decoding writes it [P].
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1] - 1), tokens[:, 1:].shape)
    attention = jnp.ones_like(positions)
    logits = model.module.apply(
        {"params": params}, tokens[:, :-1], attention, positions, deterministic=True
    ).logits
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    greedy = log_probs.argmax(-1) == tokens[:, 1:]
    return jnp.where(mask[:, 1:], chosen, 0).sum(1), (greedy | ~mask[:, 1:]).all(1)


def pretrain(model: FlaxGPT2LMHeadModel, args: argparse.Namespace):
    """Minimises the cross-entropy of the answers; returns the parameters."""
    train, held_out = split_problems()
    tokens, mask, cumulative = make_data(train)
    truth = encode_rows(held_out, [a + b for a, b in held_out])

    def matrices(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, 100, args.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.98,
            weight_decay=args.weight_decay,
            mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
        ),
    )

    def loss_fn(params, tokens, mask):
        return -answer_log_probs(model, params, tokens, mask)[0].sum() / mask.sum()

    @jax.jit
    def step(params, state, tokens, mask):
        loss, gradient = jax.value_and_grad(loss_fn)(params, tokens, mask)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    evaluate = jax.jit(lambda params: answer_log_probs(model, params, *truth))
    random = np.random.default_rng(args.seed)
    params, start = model.params, time.time()
    state = optimizer.init(params)
    for i in range(1, args.steps + 1):
        rows = random.integers(len(train), size=args.batch_size)
        # Which of the six answers stands behind the problem is drawn anew each time.
        column = (random.random((args.batch_size, 1)) > cumulative[rows, :-1]).sum(1)
        params, state, loss = step(params, state, tokens[rows, column], mask[rows, column])
        if i % args.report_every == 0 or i == args.steps:
            log_probs, greedy = evaluate(params)
            print(
                f"step {i:5d}  loss {loss:.4f}  held-out accuracy: sampled {jnp.exp(log_probs).mean():.4f}"
                f"  greedy {greedy.mean():.4f}  worst probability of a right answer"
                f" {jnp.exp(log_probs.min()):.4f}  {time.time() - start:.0f} s",
                flush=True,
            )
    return params


def save(params, config: GPT2Config, directory: Path) -> None:
    """Writes weights, configuration and tokenizer in the Hugging Face layout."""
    directory.mkdir(parents=True, exist_ok=True)
    write_params(directory, params)
    # save_pretrained leaves out what equals today's defaults; this file should say all about the model.
    fields = config.to_dict()
    own = fields.keys() - PretrainedConfig().to_dict().keys()
    shared = {"architectures", "model_type", "bos_token_id", "eos_token_id", "tie_word_embeddings"}
    spelled_out = {key: fields[key] for key in sorted(own | shared)}
    (directory / "config.json").write_text(json.dumps(spelled_out | {"dtype": "float32"}, indent=2) + "\n")
    GenerationConfig(bos_token_id=EOS_ID, eos_token_id=EOS_ID).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--report-every", type=int, default=250)
    return parser.parse_args()


def main() -> None:
    """Pretrains and writes the model directory."""
    args = parse_args()
    config = make_config(args)
    model = FlaxGPT2LMHeadModel(config, seed=args.seed, input_shape=(1, 8))
    save(pretrain(model, args), config, args.out)
    print(f"wrote {args.out}: {(args.out / 'model.safetensors').stat().st_size / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
