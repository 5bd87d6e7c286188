"""Any model as a policy: linen and nnx modules and bare functions, beside a GPT-2 of transformers."""

import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from transformers import FlaxAutoModelForCausalLM, GPT2Config

from grpo_jax import (
    Experience,
    Lora,
    Target,
    completion_log_probs,
    experience_of,
    generate,
    grpo_loss,
    init_adapters,
    init_train_state,
    loss_weights,
    make_recipe,
    pad_prompts,
    policy_from_apply,
    policy_of,
    train_step,
)

N, G, S, T, V, D = 2, 4, 5, 6, 32, 16
B = N * G
KEY = jax.random.key(0)
PROMPTS = pad_prompts([[5, 6, 7], [8, 9, 10, 11, 12]], S)


class Linen(nn.Module):
    """A small transformer with the arguments of transformers, and with dropout."""

    @nn.compact
    def __call__(self, input_ids, attention_mask, position_ids, deterministic=False):
        length = input_ids.shape[1]
        x = nn.Embed(V, D)(input_ids) + nn.Embed(64, D)(position_ids)
        visible = jnp.tril(jnp.ones((length, length), int)) * attention_mask[:, None, None, :]
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=visible)
        x = nn.Dropout(0.5, deterministic=deterministic)(x)
        return SimpleNamespace(logits=nn.Dense(V)(nn.LayerNorm()(x)))


class Nnx(nnx.Module):
    """A small transformer that takes the tokens alone, with dropout and with a constant."""

    def __init__(self, rngs):
        self.wte = nnx.Embed(V, D, rngs=rngs)
        self.wpe = nnx.Embed(64, D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=D, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(D, V, rngs=rngs)
        self.scale = nnx.Variable(jnp.float32(0.5))

    def __call__(self, x):
        length = x.shape[1]
        x = self.wte(x) + self.wpe(jnp.arange(length))
        visible = jnp.tril(jnp.ones((length, length), bool))
        x = x + self.attention(self.norm(x), mask=visible)
        return self.head(self.dropout(self.norm(x))) * self.scale


LINEN = Linen()
VARIABLES = LINEN.init(KEY, *[jnp.ones((1, 4), int)] * 3, True)
NNX = Nnx(nnx.Rngs(0))
NNX_PARAMS = nnx.state(NNX, nnx.Param)
GPT2 = FlaxAutoModelForCausalLM.from_config(
    GPT2Config(n_embd=16, n_head=2, n_layer=1, n_positions=32, vocab_size=V, eos_token_id=1, bos_token_id=1)
)


def linen_function(params, tokens, mask, positions):
    return LINEN.apply({"params": params}, tokens, mask.astype(int), positions, deterministic=True).logits


def gpt2_function(params, tokens, mask, positions):
    return GPT2(
        tokens, attention_mask=mask.astype(int), position_ids=positions, params=params, train=False
    ).logits


def nnx_function(params, tokens, mask, positions):
    """Moves the rows to the left, because this module counts positions from the first token of the row."""
    model = nnx.merge(nnx.graphdef(NNX), params, nnx.state(NNX, nnx.Not(nnx.Param)))
    model.eval()
    padding = jnp.argmax(mask, axis=1)
    roll = jax.vmap(lambda row, places: jnp.roll(row, places, axis=0))
    return roll(model(roll(tokens, -padding)), padding)


# name -> (what policy_of takes, its params, the logits by hand)
MODELS = {
    "gpt2": (GPT2.__call__, GPT2.params, gpt2_function),
    "linen": (LINEN.apply, VARIABLES["params"], linen_function),
    "nnx": (NNX, NNX_PARAMS, nnx_function),
    "bare": (linen_function, VARIABLES["params"], linen_function),
}


@functools.partial(jax.jit, static_argnums=0)
def log_probs_by_hand(function, params, rollout):
    """Computes log-probs [B,T] from logits over left-padded prompts and their completions."""
    tokens = jnp.concatenate([rollout.prompt_tokens, rollout.tokens], axis=1)
    mask = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    logits = function(params, tokens, mask, positions)[:, S - 1 : -1]
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), rollout.tokens[..., None], axis=-1)
    return jnp.where(rollout.mask, log_probs[..., 0], 0)


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """One model, its policy, and what it sampled."""
    model, params, function = MODELS[request.param]
    policy = policy_of(model)
    rollout = generate(policy, params, PROMPTS, KEY, group_size=G, max_new_tokens=T, eos_ids=1)
    return SimpleNamespace(
        name=request.param, model=model, params=params, function=function, policy=policy, rollout=rollout
    )


def test_sampler_scorer_and_the_model_by_hand_agree(case):
    expected = log_probs_by_hand(case.function, case.params, case.rollout)
    np.testing.assert_allclose(case.rollout.log_probs, expected, atol=2e-5)
    scored, _ = completion_log_probs(case.policy, case.params, case.rollout, group_size=G)
    np.testing.assert_allclose(scored, expected, atol=2e-5)


def test_one_step_is_that_of_grpo_loss_by_hand(case):
    """With flax's own TrainState and a learning rate of 1, so the difference is the gradient."""
    rng = np.random.default_rng(0)
    old, ref = case.rollout.log_probs + 0.1 * rng.normal(size=(2, B, T)).astype(np.float32)
    experience = Experience(
        **{name: getattr(case.rollout, name) for name in ("prompt_tokens", "prompt_mask", "tokens", "mask")},
        advantages=jnp.asarray(rng.normal(size=B), jnp.float32),
        weights=loss_weights(case.rollout.mask),
        old_log_probs=old,
        ref_log_probs=ref,
    )

    def loss(params):
        e = experience
        log_probs = log_probs_by_hand(case.function, params, e)
        return grpo_loss(
            log_probs, old, e.advantages, mask=e.mask, weights=e.weights, ref_log_probs=ref, kl_coef=0.04
        )[0]

    gradients = jax.jit(jax.grad(loss))(case.params)
    state = TrainState.create(apply_fn=case.model, params=case.params, tx=optax.sgd(1.0))
    new, metrics = train_step(state, experience, recipe=make_recipe("grpo", kl_coef=0.04), group_size=G)
    assert type(new) is TrainState and int(new.step) == 1
    jax.tree.map(
        lambda before, after, gradient: np.testing.assert_allclose(before - after, gradient, atol=1e-5),
        case.params,
        new.params,
        gradients,
    )
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-4)
    assert metrics["grad_norm"] > 1e-2


def test_gpt2_as_a_bare_function_samples_as_gpt2_with_a_cache():
    settings = {"group_size": G, "max_new_tokens": T, "eos_ids": 1, "temperature": 0.0}
    cached = generate(policy_of(GPT2), GPT2.params, PROMPTS, KEY, **settings)
    bare = generate(policy_from_apply(gpt2_function), GPT2.params, PROMPTS, KEY, **settings)
    np.testing.assert_array_equal(bare.tokens, cached.tokens)
    np.testing.assert_allclose(bare.log_probs, cached.log_probs, atol=2e-5)


def test_equal_models_are_one_policy():
    assert policy_of(Linen()) is policy_of(LINEN) is policy_of(LINEN.apply) is policy_of(jax.jit(LINEN.apply))
    assert policy_of(NNX) is policy_of(NNX.__call__) is policy_of(NNX)
    assert policy_of(Nnx(nnx.Rngs(1))) is not policy_of(NNX)  # its dropout key is another one
    assert policy_of(linen_function) is policy_from_apply(linen_function)
    state = init_train_state(policy_of(LINEN), VARIABLES["params"], optax.sgd(0.1))
    assert policy_of(state) is policy_of(policy_of(LINEN)) is policy_of(LINEN)
    assert NNX.dropout.deterministic is False  # the user's module is as it was


def test_our_state_of_an_nnx_module_is_donated_and_keeps_its_type():
    state = init_train_state(policy_of(NNX), NNX_PARAMS, optax.adamw(1e-3))
    assert isinstance(state.params, nnx.State)
    moments = state.opt_state[0].mu
    assert jax.tree.structure(moments) == jax.tree.structure(NNX_PARAMS)


def test_variables_are_parameters_too():
    policy = policy_of(LINEN)
    settings = {"group_size": 1, "max_new_tokens": T, "eos_ids": 1}
    of_variables = generate(policy, VARIABLES, PROMPTS, KEY, **settings)
    of_params = generate(policy, VARIABLES["params"], PROMPTS, KEY, **settings)
    np.testing.assert_array_equal(of_variables.tokens, of_params.tokens)


def test_a_pure_dict_of_an_nnx_module_is_its_parameters_too():
    pure = nnx.to_pure_dict(NNX_PARAMS)
    rollout = generate(policy_of(NNX), pure, PROMPTS, KEY, group_size=1, max_new_tokens=1, eos_ids=1)
    expected = log_probs_by_hand(nnx_function, NNX_PARAMS, rollout)
    np.testing.assert_allclose(rollout.log_probs, expected, atol=2e-5)


class Unmasked(nn.Module):
    """Looks at all real tokens, as an attention of flax does by default."""

    @nn.compact
    def __call__(self, tokens, mask):
        x = nn.Embed(V, D)(tokens)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask[:, None, None, :])
        return nn.Dense(V)(x)


class AlwaysDropout(nnx.Module):
    """Drops by the key that it holds, whatever its mode."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V, V, rngs=rngs)
        self.key = nnx.Variable(jax.random.key(0))

    def __call__(self, tokens):
        x = self.embed(tokens)
        return x * jax.random.bernoulli(self.key[...], 0.5, x.shape)


@pytest.mark.parametrize("own", [False, True], ids=["flax's state", "our state"])
@pytest.mark.parametrize("model", [Unmasked(), AlwaysDropout(nnx.Rngs(0))], ids=["unmasked", "dropout"])
def test_a_model_that_is_not_causal_is_refused(model, own):
    if isinstance(model, nnx.Module):
        params = nnx.state(model, nnx.Param)
    else:
        params = model.init(KEY, *[jnp.ones((1, 4), int)] * 2)["params"]
    with pytest.raises(
        ValueError, match=r"not causal: its logits of a token change by .* with later"
    ) as error:
        if own:
            init_train_state(policy_of(model), params, optax.sgd(0.1))
        else:
            state = TrainState.create(apply_fn=model, params=params, tx=optax.sgd(0.1))
            train_step(state, None, recipe=make_recipe("dr_grpo"))
    assert "\n" not in str(error.value)


def test_inside_a_jit_of_the_user():
    rollout = generate(policy_of(LINEN), VARIABLES, PROMPTS, KEY, group_size=G, max_new_tokens=T, eos_ids=1)
    experience = experience_of(rollout, make_recipe("dr_grpo"), rewards=np.arange(B).reshape(N, G) % 3)

    @jax.jit
    def step(state):
        return train_step(state, experience, recipe=make_recipe("dr_grpo"))[0]

    fresh = Linen.__class__("Fresh", (Linen,), {})()  # equal to no model whose policy has been checked
    state = step(TrainState.create(apply_fn=fresh.apply, params=VARIABLES["params"], tx=optax.sgd(0.1)))
    assert int(step(state).step) == 2


def test_lora_of_an_nnx_module_has_a_pure_dict_as_its_base():
    """The gradient of B at the start is A^T times the gradient of the kernel."""
    policy = policy_of(NNX)
    base = nnx.to_pure_dict(NNX_PARAMS)
    rollout = generate(policy, NNX_PARAMS, PROMPTS, KEY, group_size=G, max_new_tokens=T, eos_ids=1)
    lora = Lora(rank=2, alpha=2.0, targets=(Target(path=("head", "kernel"), inputs=D, outputs=V),))
    state = init_train_state(policy, init_adapters(lora, KEY), optax.sgd(1.0), lora=lora)
    recipe = make_recipe("dr_grpo")
    experience = experience_of(rollout, recipe, advantages=np.arange(B).reshape(N, G) - 3.0)
    plain = init_train_state(policy, base, optax.sgd(1.0))
    expected = (
        base["head"]["kernel"] - train_step(plain, experience, recipe=recipe)[0].params["head"]["kernel"]
    )
    a = state.params["head"]["kernel"]["a"].copy()
    new, _ = train_step(state, experience, recipe=recipe, frozen=base)
    np.testing.assert_allclose(-new.params["head"]["kernel"]["b"], a.T @ expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"nested dicts, and they are a State: for an nnx.*to_pure_dict"):
        train_step(new, experience, recipe=recipe, frozen=NNX_PARAMS)


def test_a_graphdef_of_parameters_alone():
    model = nnx.Sequential(nnx.Embed(V, D, rngs=nnx.Rngs(0)), nnx.Linear(D, V, rngs=nnx.Rngs(1)))

    class Bigram(nnx.Module):
        def __init__(self, layers):
            self.layers = layers

        def __call__(self, tokens):
            return self.layers(tokens)

    graphdef, params = nnx.split(Bigram(model))
    policy = policy_of(graphdef)
    assert policy is policy_of(graphdef.apply) is policy_of(Bigram(model))
    logits, _ = policy.forward(params, PROMPTS.tokens, PROMPTS.mask, jnp.zeros((N, S), int))
    np.testing.assert_allclose(logits[PROMPTS.mask], model(PROMPTS.tokens)[PROMPTS.mask], atol=1e-6)


def module_with(call):
    """Returns an nnx module whose `__call__` is a function of self and others."""
    return type("Own", (nnx.Module,), {"__call__": call})()


SIGNATURES = {
    "tokens alone": (lambda self, x: x, {}),
    "mask": (lambda self, ids, mask: ids, {"mask": bool}),
    "transformers": (
        lambda self, input_ids, attention_mask=None, position_ids=None, *, deterministic: input_ids,
        {"attention_mask": np.int32, "position_ids": np.int32, "deterministic": True},
    ),
    "train": (lambda self, x, positions, train=True, **more: x, {"positions": np.int32, "train": False}),
    "defaults stay": (lambda self, x, segment_ids=None, decoder_mask=None, *rest: x, {}),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_are_given_by_their_names(name):
    from grpo_jax.models.call_arguments import arguments_of

    call, expected = SIGNATURES[name]
    given = arguments_of(module_with(call).__call__, "Own")(jnp.ones((1, 2), bool), jnp.ones((1, 2), int))
    assert given.keys() == expected.keys()
    for key, value in given.items():
        assert value is expected[key] if isinstance(value, bool) else value.dtype == expected[key]


class Normed(nn.Module):
    """A linen module with statistics of batches."""

    @nn.compact
    def __call__(self, tokens, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Embed(V, V)(tokens))


NORMED = Normed()
BAD = {
    "required": (
        module_with(lambda self, tokens, cache: 0),
        {},
        r"Own\(tokens, cache\) requires cache",
    ),
    "two masks": (
        module_with(lambda self, x, mask, input_mask: 0),
        {},
        "has both mask and input_mask; wri",
    ),
    "mask first": (
        module_with(lambda self, mask, tokens: 0),
        {},
        "takes mask before the tokens; w",
    ),
    "no tokens": (
        module_with(lambda self, *, tokens: 0),
        {},
        "has no first argument for the to",
    ),
    "statistics": (
        NORMED,
        NORMED.init(KEY, jnp.ones((1, 2), int)),
        r"Normed hold batch_stats beside params, .* give variables\['params'\]",
    ),
    "whole state": (NNX, nnx.state(NNX), r"nnx module: dropout\.rngs\.count is \(\), and not there in the"),
    "other sizes": (
        NNX,
        jax.tree.map(lambda x: x[..., :-1], NNX_PARAMS),
        r"attention\.key\.bias is .* in the module; give nnx\.state\(module, nnx\.Param\)",
    ),
    "function": (
        lambda params, x, extra, other: 0,
        {},
        r"lambda> is no model that grpo_jax knows: .*from_apply",
    ),
    "a name": ("gpt2", {}, r"'gpt2' is a name and no model: give grpo_jax\.models\.load_model\('gpt2'\)"),
    "a number": (3, {}, "int is no model that grpo_jax knows"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_one_line(name):
    model, params, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        generate(policy_of(model), params, PROMPTS, KEY, group_size=1, max_new_tokens=1, eos_ids=1)
    assert "\n" not in str(error.value)
