"""Worked values: every case of golden/*.json that the package has functions for, values and gradients."""

import ast
import functools
import importlib
import inspect
import json
import pkgutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax.objective
from grpo_jax.objective import advantages, kl, losses, surrogates
from grpo_jax.objective.advantages import group_advantages, leave_one_out_advantages
from grpo_jax.objective.losses import grpo_loss, loss_weights

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"
ADVANTAGES = json.loads((GOLDEN / "advantages.json").read_text())
OBJECTIVE = json.loads((GOLDEN / "objective.json").read_text())
INPUTS = ("log_probs", "old_log_probs", "ref_log_probs", "advantages")

# The golden files' names of a surrogate's keywords -> the package's. A surrogate of these files or an
# estimator of the package that is not here fails `test_no_golden_case_is_skipped_in_silence`. Surrogates
# without golden cases have their loops in tests/oracle.py, see `test_every_surrogate_is_its_loop`.
SURROGATES = {
    "clipped": (
        "clipped_surrogate",
        {
            "clip_low": "clip_range",
            "clip_high": "clip_range_high",
            "delta": "delta",
            "dual_clip": "dual_clip",
        },
    ),
    "cispo": ("cispo_surrogate", {"clip_high": "cap"}),
    "sapo": ("sapo_surrogate", {"tau_pos": "tau", "tau_neg": "tau_negative"}),
    "reinforce": ("reinforce_surrogate", {}),
}
KL = {"none": None, "k1": "kl_k1", "k2": "kl_k2", "k3": "kl_k3", "ratio_k3": "kl_k3"}
NUM_CASES = {"clipped": 4 * 24, "cispo": 24, "sapo": 24, "reinforce": 24}  # clipped: four kinds of clipping

# Tests that run over a whole table prove its functions, such as `test_every_surrogate_is_its_loop`.
TABLES = (
    advantages.ADVANTAGES,
    kl.KL_ESTIMATORS,
    losses.RATIO_LEVELS,
    losses.REDUCTIONS,
    surrogates.SURROGATES,
)
# Every other public function of the objective -> the file of this folder that proves it.
PROOFS = {
    "adapt_kl_coef": "test_kl.py",
    "bounded_exp": "test_kl.py",
    "check_shapes": "test_surrogates.py",
    "clip_keywords": "test_surrogates.py",
    "effective_weights": "test_advantages.py",
    "group_stds": "test_advantages.py",
    "grow": "test_advantages.py",
    "grpo_loss": "test_golden.py",
    "importance_weights": "test_shaping.py",
    "informative_groups": "test_advantages.py",
    "kl_exact": "test_kl.py",
    "kl_penalty": "test_shaping.py",
    "log_ratios": "test_losses.py",
    "loss_weights": "test_golden.py",
    "make_recipe": "test_recipes.py",
    "normalize_then_sum": "test_advantages.py",
    "overlong_penalty": "test_shaping.py",
    "scale_by_batch": "test_advantages.py",
    "shrink_factor": "test_advantages.py",
    "top_entropy_mask": "test_shaping.py",
    "with_mask": "test_surrogates.py",
}


def exists(case):
    return case["surrogate"]["name"] in SURROGATES and case["kl"] in KL


CASES = [case for case in OBJECTIVE["cases"] if exists(case)]


def test_no_golden_case_is_skipped_in_silence():
    named = {case["surrogate"]["name"] for case in OBJECTIVE["cases"]}
    assert named == set(SURROGATES), "give the surrogate of the new cases a row above"
    assert set(kl.KL_ESTIMATORS) == set(KL) - {"none", "ratio_k3"}, "give the new estimator a row above"
    assert len(OBJECTIVE["cases"]) == 168
    for name, number in NUM_CASES.items():
        assert sum(case["surrogate"]["name"] == name for case in CASES) == number
    assert len(CASES) == sum(NUM_CASES.values()) == 168
    assert len(ADVANTAGES["cases"]) == 8


def test_every_public_function_has_a_proof():
    """A function of a table needs no entry here. Any other that is new is noticed."""
    modules = [
        importlib.import_module(f"grpo_jax.objective.{module.name}")
        for module in pkgutil.iter_modules(grpo_jax.objective.__path__)
    ]
    public = {
        function.__name__
        for module in modules
        for _, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not function.__name__.startswith("_")
    }
    in_tables = {getattr(f, "func", f).__name__ for table in TABLES for f in table.values()}
    assert public == in_tables | set(PROOFS), "enter the new function into a table or into PROOFS"
    assert not in_tables & set(PROOFS)
    assert {function for function, _ in SURROGATES.values()} <= in_tables
    for name, file in PROOFS.items():
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert name in called, f"{file} does not use {name}"


def objective(inputs, mask, weights, clip, kl_coef, *, surrogate, level, kl_name):
    def loss(log_probs):
        return grpo_loss(
            log_probs,
            inputs["old_log_probs"],
            inputs["advantages"],
            mask,
            weights,
            ref_log_probs=None if kl_name == "none" else inputs["ref_log_probs"],
            ratio_level=level,
            surrogate=functools.partial(getattr(losses, surrogate), **clip),
            **({} if kl_name == "none" else {"kl_estimator": getattr(kl, KL[kl_name])}),
            kl_coef=kl_coef,
            kl_ratio_corrected=kl_name.startswith("ratio_"),
        )[0]

    return jax.value_and_grad(loss)(inputs["log_probs"])


# The weights are an argument: reductions share a compilation, as in training.
jitted = jax.jit(objective, static_argnames=("surrogate", "level", "kl_name"))


def check_case(function, case, dtype, tolerance):
    inputs = {name: jnp.asarray(OBJECTIVE[name], dtype) for name in INPUTS}
    mask = jnp.asarray(OBJECTIVE["mask"], bool)
    name, keywords = SURROGATES[case["surrogate"]["name"]]
    clip = {keywords[key]: value for key, value in case["surrogate"].items() if key != "name"}
    if (
        function is jitted and name == "clipped_surrogate"
    ):  # a cap out of reach is no cap: one compilation for all four kinds of clipping
        clip = {"delta": 1e9, "dual_clip": 1e9, **clip}
    weights = loss_weights(mask, reduction=case["reduction"], max_length=case["max_length"])
    choices = {"surrogate": name, "level": case["level"], "kl_name": case["kl"]}
    loss, gradient = function(inputs, mask, weights, clip, case["kl_coef"], **choices)
    assert loss.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(loss, case["loss"], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(gradient, case["grad"], rtol=tolerance, atol=tolerance)


def label(case):
    surrogate = "-".join(str(value) for value in case["surrogate"].values())
    return f"{surrogate}-{case['level']}-{case['kl']}-{case['reduction']}"


@pytest.mark.parametrize("function", [objective, jitted], ids=["eager", "jit"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_objective_float32(case, function):
    check_case(function, case, jnp.float32, 1e-6)


@pytest.mark.parametrize("function", [objective, jitted], ids=["eager", "jit"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_objective_float64(case, function):
    with jax.enable_x64(True):
        check_case(function, case, jnp.float64, 1e-12)


@pytest.mark.parametrize("index", range(len(ADVANTAGES["cases"])))
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_advantages(index, jit):
    case = ADVANTAGES["cases"][index]
    if case["scale"] == "leave_one_out":
        function = leave_one_out_advantages
    else:
        function = functools.partial(
            group_advantages, scale=case["scale"], ddof=case["ddof"], epsilon=case["epsilon"]
        )
    function = jax.jit(function) if jit else function
    expected, valid = np.array(case["advantages"]), jnp.asarray(case["valid"])
    # 1e-6 of the largest advantage: float32 rewards such as 1.1 are themselves 2e-8 off, and the mean is too.
    result = function(jnp.asarray(ADVANTAGES["rewards"], jnp.float32), valid=valid)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    assert (np.asarray(result)[expected == 0] == 0).all()
    with jax.enable_x64(True):
        result = function(jnp.asarray(ADVANTAGES["rewards"], jnp.float64), valid=valid)
        assert result.dtype == jnp.float64
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)
        assert (np.asarray(result)[expected == 0] == 0).all()


def test_every_advantage_function_has_golden_cases():
    scales = {case["scale"] for case in ADVANTAGES["cases"]}
    assert scales == {"std", "batch", "none", "leave_one_out"}
    assert advantages.leave_one_out_advantages is leave_one_out_advantages
