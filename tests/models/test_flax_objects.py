"""A Flax model of transformers that is in memory: its plain TrainState in train_step, and its policy."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from toy import make_toy_policy
from transformers import FlaxAutoModel, FlaxAutoModelForCausalLM, GPT2Config, GPTNeoConfig

import grpo_jax
from grpo_jax.models.flax_objects import policy_of
from grpo_jax.objective.losses import grpo_loss, loss_weights
from grpo_jax.objective.recipes import make_recipe
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.training.learner import train_step
from grpo_jax.training.train_state import init_train_state
from grpo_jax.types import Experience, Prompts

N, G, S, T, VOCAB = 2, 4, 5, 6, 64
B = N * G
SIZES = {"vocab_size": VOCAB, "eos_token_id": 1, "bos_token_id": 1}
CONFIG = GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=32, **SIZES)
MODEL = FlaxAutoModelForCausalLM.from_config(CONFIG, seed=1)
NEO = GPTNeoConfig(
    hidden_size=16,
    num_heads=2,
    num_layers=2,
    attention_types=[[["global", "local"], 1]],
    window_size=3,
    max_position_embeddings=32,
    **SIZES,
)
OPTIMIZER = optax.sgd(0.1)  # what rounds to almost 0 stays there, unlike in Adam
RECIPE = make_recipe("grpo", kl_coef=0.04)


def by_hand(model, experience):
    """Returns log-probs [B,T] as a function of params, with nothing but the model's own call."""
    e = experience
    tokens = jnp.concatenate([e.prompt_tokens, e.tokens], axis=1)
    mask = jnp.concatenate([e.prompt_mask, e.mask], axis=1)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)

    @jax.jit
    def log_probs(params):
        logits = model(
            tokens, attention_mask=mask.astype(int), position_ids=positions, params=params, train=False
        ).logits[:, S - 1 : -1]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), e.tokens[..., None], axis=-1)[..., 0]

    return log_probs


def batch(model) -> Experience:
    """Returns groups of left-padded prompts whose old and reference log-probs lie around the model's."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, VOCAB, (B, S + T))
    tokens[:, :S] = np.repeat(tokens[::G, :S], G, axis=0)
    mask = jnp.asarray(np.arange(T) < rng.integers(1, T + 1, (B, 1)))
    experience = Experience(
        prompt_tokens=jnp.asarray(tokens[:, :S], jnp.int32),
        prompt_mask=jnp.asarray(np.arange(S) >= np.repeat([0, 2], G)[:, None]),
        tokens=jnp.asarray(tokens[:, S:], jnp.int32),
        mask=mask,
        advantages=jnp.asarray(rng.normal(size=B), jnp.float32),
        weights=loss_weights(mask),
        old_log_probs=None,
    )
    around = by_hand(model, experience)(model.params) + 0.1 * rng.normal(size=(2, B, T)).astype(np.float32)
    return experience.replace(old_log_probs=around[0], ref_log_probs=around[1])


EXPERIENCE = batch(MODEL)
LOG_PROBS = by_hand(MODEL, EXPERIENCE)


class WithDropoutKey(TrainState):
    """As in the Flax examples of transformers."""

    dropout_rng: jax.Array


def plain_state(params=MODEL.params, apply_fn=MODEL.__call__, optimizer=OPTIMIZER, cls=TrainState, **more):
    return cls.create(apply_fn=apply_fn, params=params, tx=optimizer, **more)


def stepped_by_hand(experience) -> dict:
    e = experience

    def loss(params):
        log_probs = LOG_PROBS(params)
        old = jax.lax.stop_gradient(log_probs) if e.old_log_probs is None else e.old_log_probs
        reference = {} if e.ref_log_probs is None else {"ref_log_probs": e.ref_log_probs, "kl_coef": 0.04}
        return grpo_loss(log_probs, old, e.advantages, e.mask, e.weights, **reference)[0]

    return plain_state().apply_gradients(grads=jax.grad(loss)(MODEL.params)).params


def assert_close(params, expected, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), params, expected)


@pytest.mark.parametrize("group_size", [1, G])
def test_one_step_is_that_of_grpo_loss_by_hand(group_size):
    expected = stepped_by_hand(EXPERIENCE)
    state, metrics = train_step(plain_state(), EXPERIENCE, recipe=RECIPE, group_size=group_size)
    assert type(state) is TrainState and int(state.step) == 1
    assert_close(state.params, expected)
    assert (
        np.max(
            np.abs(
                expected["transformer"]["wte"]["embedding"] - MODEL.params["transformer"]["wte"]["embedding"]
            )
        )
        > 1e-3
    )
    assert metrics["skipped_updates"] == metrics["skipped_updates_in_a_row"] == metrics["idle_updates"] == 0


def test_without_old_and_reference_log_probs():
    e = EXPERIENCE.replace(old_log_probs=None, ref_log_probs=None)
    state, metrics = train_step(plain_state(), e, recipe=make_recipe("grpo", kl_coef=0.0), group_size=G)
    assert_close(state.params, stepped_by_hand(e))
    assert metrics["ratio/max"] == 1


def test_the_model_keeps_its_params_and_nothing_is_compiled_twice():
    state, _ = train_step(plain_state(), EXPERIENCE, recipe=RECIPE)
    compiled, state_of_before = train_step._cache_size(), state
    for count in (2, 3):
        state, _ = train_step(state, EXPERIENCE, recipe=RECIPE)
        assert int(state.step) == count
    assert int(state_of_before.step) == 1 and np.isfinite(LOG_PROBS(state_of_before.params)).all()
    assert np.isfinite(LOG_PROBS(MODEL.params)).all()
    assert train_step._cache_size() == compiled


@pytest.mark.parametrize(
    "state",
    [
        plain_state(apply_fn=MODEL),
        plain_state(apply_fn=MODEL.module.apply),
        plain_state(apply_fn=policy_of(MODEL)),
        plain_state(params=flax.core.freeze(MODEL.params)),
        plain_state(cls=WithDropoutKey, dropout_rng=jax.random.key(3)),
        plain_state(cls=grpo_jax.TrainState),
    ],
    ids=["model", "module", "policy", "frozen dict", "subclass", "our class"],
)
def test_other_ways_to_make_the_state(state):
    cls = type(state)
    new, _ = train_step(state, EXPERIENCE, recipe=RECIPE)
    assert type(new) is cls
    assert_close(flax.core.unfreeze(new.params), stepped_by_hand(EXPERIENCE))
    if cls is WithDropoutKey:
        assert new.dropout_rng == jax.random.key(3)


def test_inside_a_jit_of_the_user_and_with_adam():
    adam = optax.adam(1e-3, eps=1e-3)  # an eps over rounding
    step = jax.jit(lambda state: train_step(state, EXPERIENCE, recipe=RECIPE)[0])
    theirs = step(plain_state(optimizer=adam))
    ours, _ = train_step(init_train_state(policy_of(MODEL), MODEL.params, adam), EXPERIENCE, recipe=RECIPE)
    assert_close(theirs.params, ours.params)
    assert int(theirs.opt_state[0].count) == 1


def test_one_state_serves_again_directly_and_inside_a_jit_of_the_user():
    adam = optax.adam(1e-3, eps=1e-3)  # an eps over rounding
    state, _ = train_step(plain_state(optimizer=adam), EXPERIENCE, recipe=RECIPE)  # now its counts are arrays
    theirs = jax.jit(train_step)
    steps = [train_step, theirs, train_step, theirs]
    first, *others = [step(state, EXPERIENCE, recipe=RECIPE)[0] for step in steps]
    assert int(first.step) == 2 and int(state.step) == 1
    for other in others:
        assert_close((other.step, other.params, other.opt_state), (first.step, first.params, first.opt_state))


def test_an_update_that_is_not_made_is_counted_for_itself():
    state = plain_state()
    broken = EXPERIENCE.replace(advantages=EXPERIENCE.advantages.at[0].set(jnp.nan))
    still = EXPERIENCE.replace(advantages=jnp.zeros(B))
    no_kl = make_recipe("grpo", kl_coef=0.0)
    for count, (e, skipped, idle) in enumerate([(broken, 1, 0), (still, 0, 1), (broken, 1, 0)], start=1):
        state, metrics = train_step(state, e, recipe=no_kl)
        assert int(state.step) == count
        assert (metrics["skipped_updates"], metrics["idle_updates"]) == (skipped, idle)
        assert metrics["skipped_updates_in_a_row"] == skipped
    assert_close(state.params, MODEL.params, 0)


@pytest.mark.parametrize("config", [CONFIG, NEO], ids=lambda config: config.model_type)
def test_the_policy_samples_and_scores_as_the_model(config):
    model = FlaxAutoModelForCausalLM.from_config(config, seed=2)
    policy = policy_of(model)
    assert policy == policy_of(model.__call__) == policy_of(shapeless(config))
    prompts = Prompts(tokens=EXPERIENCE.prompt_tokens[::G], mask=EXPERIENCE.prompt_mask[::G])
    settings = {"group_size": G, "max_new_tokens": T, "eos_ids": jnp.array([1])}
    rollout = grpo_jax.generate(policy, model.params, prompts, jax.random.key(0), **settings)
    expected = np.where(rollout.mask, by_hand(model, rollout)(model.params), 0)
    np.testing.assert_allclose(rollout.log_probs, expected, atol=2e-5)
    scored, _ = completion_log_probs(policy, model.params, rollout, group_size=G)
    np.testing.assert_allclose(scored, expected, atol=2e-5)


def test_it_computes_in_the_dtype_of_the_model():
    half = shapeless(CONFIG, dtype=jnp.bfloat16)
    assert policy_of(half) != policy_of(MODEL)
    scored, _ = completion_log_probs(policy_of(half), MODEL.params, EXPERIENCE)
    exact = np.where(EXPERIENCE.mask, LOG_PROBS(MODEL.params), 0)
    assert 1e-4 < np.max(np.abs(scored - exact)) < 0.1


class Dense(flax.linen.Module):
    """Somebody's own model."""

    @flax.linen.compact
    def __call__(self, tokens):
        return flax.linen.Dense(3)(tokens)


def shapeless(config, **settings):
    """Returns a model without parameters."""
    return FlaxAutoModelForCausalLM.from_config(config, _do_init=False, **settings)


BAD = {
    "a function": ({"apply_fn": lambda *_, **__: 0}, r"init_train_state\(policy, params"),
    "linen": (
        {"apply_fn": Dense().apply, "params": Dense().init(jax.random.key(0), jnp.ones((8, 10), int))},
        r"returns float32 \[8, 3\] for tokens \[8, 10\], and it must return .* logits \[8, 10, V\]",
    ),
    "another method": ({"apply_fn": Dense().init}, r"init is no model that grpo_jax knows.*init_train_state"),
    "no head": (
        {"apply_fn": FlaxAutoModel.from_config(CONFIG, _do_init=False).__call__},
        r"__call__ is no causal Flax language model",
    ),
    "float16": (
        {"apply_fn": shapeless(CONFIG, dtype=jnp.float16).__call__},
        r"computes in float16; load it with dtype=jnp\.float32 or",
    ),
    "configuration": (
        {"apply_fn": shapeless(GPT2Config(scale_attn_by_inverse_layer_idx=True)).__call__},
        "this FlaxGPT2LMHeadModule: this gpt2 configuration is not supported: .*inverse_layer_idx",
    ),
    "nested params": (
        {"params": {"params": MODEL.params}},
        r"params of the state: params\.transformer.* not there in the model; give params=model\.params",
    ),
    "other sizes": (
        {"apply_fn": shapeless(GPT2Config(**CONFIG.to_dict() | {"n_positions": 31}))},
        r"transformer\.wpe\.embedding is \(32, 32\), and \(31, 32\) in the model",
    ),
    "bfloat16": (
        {"params": jax.tree.map(lambda x: x.astype(jnp.bfloat16), MODEL.params)},
        "training needs float32 parameters",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_trained_says_what_to_do(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        train_step(plain_state(**changes), EXPERIENCE, recipe=RECIPE)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_shape_checks")
def test_what_is_no_state_says_what_to_make():
    with pytest.raises(ValueError, match=r"dict is no TrainState; make one with grpo_jax\.init_train_state"):
        train_step({"params": MODEL.params}, EXPERIENCE, recipe=RECIPE)


def test_a_policy_without_the_keyword_num_tokens_has_shared_prompts():
    policy, params = make_toy_policy(vocab=VOCAB)

    def forward(params, tokens, mask, positions, cache=None):
        return policy.forward(params, tokens, mask, positions, cache)

    scored, _ = completion_log_probs(policy.replace(forward=forward), params, EXPERIENCE, group_size=G)
    expected, _ = completion_log_probs(policy, params, EXPERIENCE)
    np.testing.assert_allclose(scored, expected, atol=1e-5)
