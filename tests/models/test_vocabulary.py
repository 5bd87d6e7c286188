"""A model whose vocabulary is 5 larger than its tokenizer's, with large weights for those 5."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax.models import decoder_families
from grpo_jax.models.loading import encode, load_model, pad_prompts, save_model
from grpo_jax.policy.decoding import generate
from grpo_jax.policy.log_probs import completion_log_probs, token_log_probs, token_log_probs_and_kls

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
TOKENS, EXTRA = 288, 5
TABLES = {"transformer.wte.weight", "model.embed_tokens.weight", "lm_head.weight"}
CASES = [("gpt2", "decoder"), ("llama", "flax"), ("gemma2", "decoder")]
each_case = pytest.mark.parametrize(("name", "implementation"), CASES)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Padded copies of the fixtures."""
    root, rng = tmp_path_factory.mktemp("padded"), np.random.default_rng(0)
    for name in {name for name, _ in CASES}:
        shutil.copytree(FIXTURES / name, root / name)
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | {"vocab_size": TOKENS + EXTRA}))
        tensors = {k: v.astype(np.float32) for k, v in load_file(root / name / "model.safetensors").items()}
        for key in TABLES & tensors.keys():
            rows = 3 * rng.standard_normal((EXTRA, tensors[key].shape[1]))
            tensors[key] = np.concatenate([tensors[key], rows.astype(np.float32)])
        save_file(tensors, root / name / "model.safetensors")
    return root


@pytest.fixture(scope="module")
def models(directories):
    """A function: (name, implementation) -> (the model, its padded copy)."""

    @functools.cache
    def load(name, implementation):
        roots = (FIXTURES, directories)
        return tuple(load_model(str(root / name), implementation=implementation) for root in roots)

    return load


def sample(model, **settings):
    prompts = pad_prompts(encode(model, ["the answer is", "one and"]), 8)
    settings = {"group_size": 4, "max_new_tokens": 12, "eos_ids": jnp.array([], jnp.int32)} | settings
    return generate(model.policy, model.params, prompts, jax.random.key(0), **settings)


@each_case
def test_ids_without_a_token_have_no_probability(models, name, implementation):
    plain, padded = models(name, implementation)
    hidden = jnp.asarray(
        np.random.default_rng(1).standard_normal((3, 2, plain.config.hidden_size)), jnp.float32
    )
    logits = padded.policy.unembed(padded.params, hidden)
    assert logits.shape == (3, 2, TOKENS + EXTRA) and np.all(np.asarray(logits[..., TOKENS:]) == -np.inf)
    np.testing.assert_allclose(logits[..., :TOKENS], plain.policy.unembed(plain.params, hidden), atol=1e-5)
    assert encode(padded, ["the answer"]) == encode(plain, ["the answer"])


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 3.0}, {"temperature": 0.0}, {"top_k": 290}, {"top_p": 0.999}, {"min_p": 1e-4}],
    ids=lambda settings: next(iter(settings)) + str(next(iter(settings.values()))),
)
@each_case
def test_they_are_never_sampled_and_the_scorer_agrees(models, name, implementation, settings):
    plain, padded = models(name, implementation)
    rollout = sample(padded, **settings)
    assert np.asarray(rollout.tokens).max() < TOKENS
    np.testing.assert_array_equal(rollout.tokens, sample(plain, **settings).tokens)
    temperature = settings.get("temperature", 1.0)
    scored = completion_log_probs(padded.policy, padded.params, rollout, temperature=temperature)
    np.testing.assert_allclose(scored[0], rollout.log_probs, atol=1e-4)
    expected = completion_log_probs(plain.policy, plain.params, rollout, temperature=temperature)
    for actual, wanted in zip(scored, expected, strict=True):  # log-probs and entropies
        np.testing.assert_allclose(actual, wanted, atol=1e-4)


def test_they_would_be_sampled_without_the_limit(models):
    """Negative control."""
    _, padded = models("gpt2", "decoder")
    policy = decoder_families.make_policy(padded.config, dtype=jnp.float32)
    rollout = sample(replace(padded, policy=policy))
    assert np.asarray(rollout.tokens).max() >= TOKENS


@each_case
def test_gradients_are_those_of_the_model_without_padding(models, name, implementation):
    """Of log-probs, entropies and the exact KL; the rows without a token get none as outputs."""
    width = models(name, implementation)[0].config.hidden_size
    hidden, of_reference = jax.random.normal(jax.random.key(2), (2, 3, 5, width))
    tokens = jax.random.randint(jax.random.key(3), (3, 5), 0, TOKENS)

    def total(model, params, hidden):
        reference = jax.tree.map(lambda x: 0.9 * x, params)
        settings = {"temperature": 1.3, "chunk_size": 7}
        arguments = (params, reference, hidden, of_reference, tokens)
        exact = token_log_probs_and_kls(model.policy, *arguments, **settings)
        scores = token_log_probs(model.policy, params, hidden, tokens, **settings)
        terms = (*exact, *scores)
        return sum((i + 1) * jnp.mean(x) for i, x in enumerate(terms)), [jnp.mean(x) for x in terms]

    results = []
    for model in models(name, implementation):
        grad = jax.jit(jax.grad(functools.partial(total, model), argnums=(0, 1), has_aux=True))
        results.append(grad(model.params, hidden))
    (plain, plain_terms), (padded, padded_terms) = results
    np.testing.assert_allclose(padded_terms, plain_terms, atol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain))
    for wanted, actual in zip(jax.tree.leaves(plain), jax.tree.leaves(padded), strict=True):
        extra = [slice(0, size) for size in wanted.shape]
        assert np.isfinite(actual).all()
        np.testing.assert_allclose(actual[tuple(extra)], wanted, atol=1e-5 * largest)
        rest = np.asarray(actual).copy()
        rest[tuple(extra)] = 0
        assert not rest.any()


@pytest.mark.parametrize(("name", "implementation"), [("gpt2", "decoder"), ("llama", "flax")])
def test_without_padding_nothing_is_added(models, name, implementation):
    for model, count in zip(models(name, implementation), (0, 1), strict=True):
        hidden = jnp.zeros((1, model.config.hidden_size))
        jaxpr = str(jax.make_jaxpr(model.policy.unembed)(model.params, hidden))
        assert jaxpr.count("select_n") == count


def test_an_export_keeps_the_rows(models, tmp_path):
    _, padded = models("gpt2", "decoder")
    save_model(padded, padded.params, tmp_path)
    again = load_model(str(tmp_path))
    assert again.config.vocab_size == TOKENS + EXTRA
    jax.tree.map(np.testing.assert_array_equal, again.params, padded.params)


def test_an_end_that_could_never_be_drawn_is_refused(directories, tmp_path):
    shutil.copytree(directories / "gpt2", tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [290, 0]}))
    assert load_model(str(tmp_path / "gpt2")).eos_ids == (290, 0)
    path.write_text(json.dumps({"eos_token_id": 290}))
    assert load_model(str(tmp_path / "gpt2")).eos_ids == (290, 0)  # the tokenizer's own can be drawn
    raw = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(raw | {"eos_token_id": 290}))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = tmp_path / "gpt2" / name
        file.write_text(
            json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token"})
        )
    with pytest.raises(ValueError, match="eos_token_id 290 is beyond the tokenizer, whose ids go up to 287"):
        load_model(str(tmp_path / "gpt2"))
