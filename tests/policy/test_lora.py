"""LoRA: the merged kernels, and one update of the adapters, against what full fine-tuning computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import make_toy_policy, off_policy_experience

from grpo_jax.objective.recipes import RECIPES, grpo, make_recipe
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.policy.lora import Lora, Target, init_adapters, match_targets, merge_adapters
from grpo_jax.training.learner import train_step
from grpo_jax.training.optimizers import make_optimizer
from grpo_jax.training.train_state import init_train_state, policy_params

WIDTH = 16
TARGETS = (
    Target(path=("qkv",), inputs=WIDTH, outputs=3 * WIDTH),
    Target(path=("down",), inputs=2 * WIDTH, outputs=WIDTH),
)
LORA = Lora(rank=3, alpha=6.0, targets=TARGETS)
SGD = optax.sgd(0.1)
S, T, B = 4, 6, 8


def names(*modules):
    return tuple(Target(path=(*name.split("."), "kernel"), inputs=1, outputs=1) for name in modules)


LAYERS = names(
    "model.layers.0.attn.q", "model.layers.0.mlp.q", "model.layers.1.attn.q", "model.layers.1.mlp.up", "head"
)


def random_adapters(lora, seed=0):
    """Adapters with no zeros in them."""
    rng = np.random.default_rng(seed)
    shapes = init_adapters(lora, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def experience(toy_policy):
    mask = np.arange(T) < np.array([[6, 2, 1, 5, 6, 3, 0, 4]]).T
    return off_policy_experience(*toy_policy, mask, np.random.default_rng(0), prompt_length=S)


def step(policy, adapters, experience, frozen, *, lora=LORA, recipe=grpo, optimizer=SGD, **settings):
    state = init_train_state(policy, adapters, optimizer, lora=lora)
    return train_step(state, experience, recipe=recipe, frozen=frozen, **settings)


# ------------------------------------------------------------------------------------------ the algebra
@pytest.mark.parametrize("output_first", [False, True])
def test_merge_is_the_literal_sum(output_first):
    lora = Lora(
        rank=2,
        alpha=5.0,
        targets=(Target(path=("x", "kernel"), inputs=4, outputs=3, output_first=output_first),),
    )
    adapters = random_adapters(lora)
    a, b = np.asarray(adapters["x"]["kernel"]["a"]), np.asarray(adapters["x"]["kernel"]["b"])
    assert a.shape == (4, 2) and b.shape == (2, 3)
    kernel = np.random.default_rng(1).normal(size=(3, 4) if output_first else (4, 3)).astype(np.float32)
    expected = kernel.astype(np.float64).T if output_first else kernel.astype(np.float64)
    for i in range(4):
        for j in range(3):
            expected[i, j] += 5.0 / 2 * sum(a[i, k].astype(float) * b[k, j] for k in range(2))
    base = {"x": {"kernel": jnp.asarray(kernel), "bias": jnp.ones(3)}, "y": jnp.zeros(2)}
    for function in (merge_adapters, jax.jit(merge_adapters, static_argnums=0)):
        merged = function(lora, base, adapters)
        actual = merged["x"]["kernel"].T if output_first else merged["x"]["kernel"]
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        assert jax.tree.structure(merged) == jax.tree.structure(base)
        assert (merged["x"]["bias"] == 1).all() and (merged["y"] == 0).all()


def test_what_has_no_adapter_is_not_copied(toy_policy):
    base = toy_policy[1]
    merged = merge_adapters(LORA, base, random_adapters(LORA))
    assert [name for name in base if merged[name] is not base[name]] == ["qkv", "down"]


def test_adapters_of_step_0():
    adapters = init_adapters(LORA, jax.random.key(0))
    for target in TARGETS:
        pair = adapters[target.path[0]]
        assert pair["a"].shape == (target.inputs, 3) and pair["b"].shape == (3, target.outputs)
        assert (pair["b"] == 0).all()
        bound = target.inputs**-0.5  # kaiming_uniform_ with a = sqrt(5), as PEFT
        assert 0.8 * bound < np.abs(pair["a"]).max() <= bound
        assert np.asarray(pair["a"]).std() == pytest.approx(bound / 3**0.5, rel=0.2)
    other = init_adapters(LORA, jax.random.key(1))
    assert (other["qkv"]["a"] != adapters["qkv"]["a"]).all()
    alone = Lora(rank=3, alpha=1.0, targets=TARGETS[1:])
    np.testing.assert_array_equal(init_adapters(alone, jax.random.key(0))["down"]["a"], adapters["down"]["a"])


def test_before_the_first_update_the_policy_is_the_base(toy_policy, experience):
    policy, base = toy_policy
    adapters = init_adapters(LORA, jax.random.key(0))
    plain = completion_log_probs(policy, base, experience)
    np.testing.assert_array_equal(
        completion_log_probs(policy, merge_adapters(LORA, base, adapters), experience), plain
    )
    moved = completion_log_probs(policy, merge_adapters(LORA, base, random_adapters(LORA)), experience)
    assert np.abs(np.asarray(moved[0]) - np.asarray(plain[0])).max() > 1e-2


# -------------------------------------------------------------------------------------------- the names
@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ((), [0, 1, 2, 3]),  # what is in a numbered layer
        (("q",), [0, 1, 2]),
        (("attn.q",), [0, 2]),
        (("layers.1.*",), [2, 3]),
        (("model.layers.0.mlp.q", "head"), [1, 4]),
        (("up", "q"), [0, 1, 2, 3]),
        (("*",), [0, 1, 2, 3, 4]),
    ],
)
def test_patterns(patterns, chosen):
    assert match_targets(LAYERS, patterns) == tuple(LAYERS[i] for i in chosen)


@pytest.mark.parametrize("pattern", ["down", "odel.layers.0.attn.q", "layers.0", "Q"])
def test_a_pattern_without_a_match_lists_the_names(pattern):
    with pytest.raises(ValueError, match="matches no dense layer") as error:
        match_targets(LAYERS, ("q", pattern))
    assert repr(pattern) in str(error.value)
    assert str(error.value).endswith("there are model.layers.*.attn.q, model.layers.*.mlp.q, "
                                     "model.layers.*.mlp.up, head")  # fmt: skip
    with pytest.raises(ValueError, match="numbered layer; there are head"):
        match_targets(LAYERS[-1:], ())


# ------------------------------------------------------------------------------------------ the dropout
DROPPED = Lora(rank=3, alpha=6.0, targets=TARGETS, dropout=0.25)


def test_dropout_zeroes_rows_of_a_and_keeps_the_mean(toy_policy):
    base, adapters = toy_policy[1], random_adapters(DROPPED)
    zeros = jax.tree.map(jnp.zeros_like, base)
    whole = merge_adapters(LORA, zeros, adapters)
    np.testing.assert_array_equal(merge_adapters(DROPPED, zeros, adapters)["down"], whole["down"])
    keys = jax.random.split(jax.random.key(0), 300)
    deltas = jax.vmap(lambda key: merge_adapters(DROPPED, zeros, adapters, dropout_key=key))(keys)
    kept = {}
    for name in ("qkv", "down"):
        delta, expected = np.asarray(deltas[name]), np.asarray(whole[name])
        kept[name] = (delta != 0).all(axis=-1)  # [keys, inputs]
        assert kept[name].mean() == pytest.approx(0.75, abs=0.02)
        assert kept[name].mean(axis=0).min() > 0.5 and kept[name].mean(axis=0).max() < 0.95
        np.testing.assert_allclose(delta, kept[name][..., None] * expected / 0.75, rtol=1e-5, atol=1e-6)
    assert (kept["qkv"] != kept["down"][:, :WIDTH]).any(axis=1).mean() > 0.9  # each kernel its own


def test_dropout_of_an_update(toy_policy, experience):
    """One mask for all micro-batches, another for another key; ratios stay those of a fresh rollout."""
    policy, base = toy_policy
    adapters, key = random_adapters(LORA), jax.random.key(3)
    settings = {"lora": DROPPED, "dropout_key": key}
    state, metrics = step(policy, adapters, experience, base, **settings)
    sliced, _ = step(policy, adapters, experience, base, **settings, num_microbatches=4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), sliced.params, state.params)
    for name in ("qkv", "down"):  # what is dropped gets no gradient
        still = (state.params[name]["a"] == adapters[name]["a"]).all(axis=1)
        assert 0 < still.sum() < still.size
    other, _ = step(policy, adapters, experience, base, **settings | {"dropout_key": jax.random.key(4)})
    without, plain = step(policy, adapters, experience, base)
    for different in (other, without):
        assert (different.params["qkv"]["b"] != state.params["qkv"]["b"]).all()
    assert "sampling/logp_difference_max" not in metrics
    fresh = experience.replace(old_log_probs=None)
    assert step(policy, adapters, fresh, base, **settings)[1]["ratio/max"] == 1
    assert metrics["grad_norm"] != plain["grad_norm"]


@pytest.mark.parametrize(("lora", "key"), [(DROPPED, None), (LORA, 0)])
def test_dropout_and_its_key_go_together(lora, key, toy_policy, experience):
    key = None if key is None else jax.random.key(key)
    with pytest.raises(ValueError, match="dropout_key is that of adapters with dropout"):
        step(*toy_policy, experience, toy_policy[1], lora=lora, dropout_key=key)


# ------------------------------------------------------------------------------------------- the update
def test_one_step_is_the_chain_rule_from_the_gradient_of_the_kernels(toy_policy, experience):
    """dA = s dW B^T, dB = s A^T dW, for the gradient dW that full fine-tuning has at the merged kernels."""
    policy, base = toy_policy
    adapters = random_adapters(LORA)
    state, metrics = step(policy, adapters, experience, base)
    merged = merge_adapters(LORA, base, adapters)
    whole, whole_metrics = train_step(init_train_state(policy, merged, SGD), experience, recipe=grpo)
    square = 0.0
    for target in TARGETS:
        (name,) = target.path
        gradient = (np.asarray(merged[name]) - np.asarray(whole.params[name])) / 0.1
        a, b = np.asarray(adapters[name]["a"]), np.asarray(adapters[name]["b"])
        by_a, by_b = 2.0 * gradient @ b.T, 2.0 * a.T @ gradient
        square += (by_a**2).sum() + (by_b**2).sum()
        np.testing.assert_allclose(state.params[name]["a"], a - 0.1 * by_a, atol=2e-6)
        np.testing.assert_allclose(state.params[name]["b"], b - 0.1 * by_b, atol=2e-6)
        assert np.abs(by_a).max() > 1e-3 and np.abs(by_b).max() > 1e-3
    np.testing.assert_allclose(metrics["grad_norm"], square**0.5, rtol=1e-3)
    different = {name for name in metrics if abs(metrics[name] - whole_metrics[name]) > 1e-5}
    assert different == {"grad_norm"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_moves_the_adapters_and_nothing_else(name, toy_policy, experience):
    policy, base = toy_policy
    before = jax.tree.map(np.array, base)
    adapters, recipe = random_adapters(LORA), make_recipe(name)
    state, metrics = step(policy, adapters, experience, base, recipe=recipe)
    assert jax.tree.structure(state.params) == jax.tree.structure(adapters)
    moved = jax.tree.map(lambda new, old: bool((new != old).any()), state.params, adapters)
    assert all(jax.tree.leaves(moved)) and metrics["grad_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, base, before)
    sliced, _ = step(policy, adapters, experience, base, recipe=recipe, num_microbatches=4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), sliced.params, state.params)


def test_optimizer_state_is_of_the_adapters(toy_policy):
    policy, _ = toy_policy
    adapters = init_adapters(LORA, jax.random.key(0))
    state = init_train_state(policy, adapters, make_optimizer(0.01), lora=LORA)
    count = sum(x.size for x in jax.tree.leaves(adapters))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * count + 1  # a counter


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_exact_kl_is_to_the_base(num_microbatches, toy_policy, experience):
    policy, base = toy_policy
    recipe = make_recipe("grpo", kl_estimator="exact", kl_coef=0.3)
    experience = experience.replace(ref_log_probs=None)
    settings = {"recipe": recipe, "ref_params": base, "num_microbatches": num_microbatches}
    start = init_adapters(LORA, jax.random.key(0))
    assert abs(step(policy, start, experience, base, **settings)[1]["kl"]) < 1e-7
    adapters = random_adapters(LORA)
    state, metrics = step(policy, adapters, experience, base, **settings)
    whole = init_train_state(policy, merge_adapters(LORA, base, adapters), SGD)
    _, expected = train_step(whole, experience, **settings)
    assert metrics["kl"] > 1e-2
    np.testing.assert_allclose(metrics["kl"], expected["kl"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-4, atol=1e-6)
    assert all((x != y).any() for x, y in zip(*map(jax.tree.leaves, (state.params, adapters)), strict=True))


def test_the_base_is_an_argument_of_the_program(toy_policy, experience):
    policy, base = toy_policy
    adapters = random_adapters(LORA)
    results, programs = [], []
    for factor in (1.0, 0.5):
        scaled = jax.tree.map(lambda x, factor=factor: factor * x, base)
        results.append(float(step(policy, adapters, experience, scaled)[1]["loss"]))
        programs.append(train_step._cache_size())
    assert results[0] != results[1] and programs[0] == programs[1]


def test_no_gradient_of_the_base_exists():
    """A head of 20 MB, in chunks whose logits are small beside it."""
    vocab, width = 20_000, 256
    policy, base = make_toy_policy(vocab=vocab, width=width)
    mask = np.ones((2, 8), bool)
    experience = off_policy_experience(policy, base, mask, np.random.default_rng(0), prompt_length=2)
    lora = Lora(rank=2, alpha=2.0, targets=(Target(path=("out",), inputs=width, outputs=width),))

    def temporary(state, **frozen):
        lowered = train_step.lower(state, experience, recipe=grpo, chunk_size=4, **frozen)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    head = 4 * vocab * width
    adapted = init_train_state(policy, init_adapters(lora, jax.random.key(0)), SGD, lora=lora)
    assert temporary(adapted, frozen=base) < head / 2
    assert temporary(init_train_state(policy, base, SGD)) > head


def test_base_and_state_go_together(toy_policy, experience):
    policy, base = toy_policy
    adapted = init_train_state(policy, init_adapters(LORA, jax.random.key(0)), SGD, lora=LORA)
    whole = init_train_state(policy, base, SGD)
    for state, frozen in ((adapted, None), (whole, base)):
        with pytest.raises(ValueError, match="frozen parameters are those of the base"):
            train_step(state, experience, recipe=grpo, frozen=frozen)
        with pytest.raises(ValueError, match="frozen parameters are those of the base"):
            policy_params(state, frozen)
    assert policy_params(whole) is whole.params
    merged = policy_params(adapted, base)
    jax.tree.map(np.testing.assert_array_equal, merged, base)
