"""The choice between our decoder and the Flax classes of transformers, which version 5 does not have."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.models import decoder_families, flax_families
from grpo_jax.models.implementations import IMPLEMENTATIONS, load_implementation
from grpo_jax.models.interface import Implementation
from grpo_jax.models.loading import load_model
from grpo_jax.policy.decoding import pad_prompts

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "models"
# Takes away what transformers 5 took away: names that begin with Flax, and the module of their base class.
WITHOUT_FLAX = """
import sys
import transformers

lazy = type(transformers)
original = lazy.__getattr__

def without_flax(self, name):
    if name.lower().startswith("flax"):
        raise AttributeError(name)
    return original(self, name)

lazy.__getattr__ = without_flax
sys.modules["transformers.modeling_flax_utils"] = None
transformers.__version__ = "5.0.0"
try:
    transformers.FlaxAutoModelForCausalLM
except AttributeError:
    pass
else:
    raise AssertionError("there are Flax classes")
"""
LOGITS = """
import numpy as np
from grpo_jax.models.loading import load_model
from grpo_jax.policy.decoding import pad_prompts, prefill

model = load_model(sys.argv[1])
prompts = pad_prompts([[5, 6, 7], [8, 9, 10, 11]], 5)
hidden, _ = prefill(model.policy, model.params, prompts)
np.save(sys.argv[2], model.policy.unembed(model.params, hidden))
print(*(name for name in sys.modules if "flax" in name and name.startswith(("grpo_jax", "transformers"))))
"""
NO_FLAX = "transformers 5.0.0 has no Flax models: pip install 'transformers>=4.57,<5'"


def run_without_flax(code, *arguments):
    command = [sys.executable, "-c", WITHOUT_FLAX + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.parametrize("module", [decoder_families, flax_families])
def test_an_implementation_has_what_the_protocol_says(module):
    for name in vars(Implementation):
        if not name.startswith("_"):
            assert callable(getattr(module, name)), name


def test_both_are_found_by_name():
    assert [load_implementation(name) for name in IMPLEMENTATIONS] == [decoder_families, flax_families]


def test_the_decoder_needs_no_flax_classes(tmp_path):
    done = run_without_flax(LOGITS, FIXTURES / "llama3", tmp_path / "logits.npy")
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = done.stdout.split()
    assert set(loaded) <= {"grpo_jax.models.flax_configs", "transformers.modeling_flax_utils"}, loaded
    model = load_model(str(FIXTURES / "llama3"))
    prompts = pad_prompts([[5, 6, 7], [8, 9, 10, 11]], 5)
    positions = np.maximum(np.cumsum(prompts.mask, axis=1) - 1, 0)
    hidden, _ = model.policy.forward(model.params, prompts.tokens, prompts.mask, positions)
    expected = model.policy.unembed(model.params, hidden[:, -1])
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "wanted", "reason"),
    [
        ("opt", "auto", f"this opt configuration is not supported: {NO_FLAX}"),
        ("llama", "flax", f"not supported with model.implementation: flax: {NO_FLAX}"),
    ],
)
def test_a_model_that_needs_flax_classes_is_refused_in_one_clear_line(name, wanted, reason):
    code = "from grpo_jax.models.loading import load_model\n"
    code += f"load_model({str(FIXTURES / name)!r}, implementation={wanted!r})"
    done = run_without_flax(code)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: ") and last.endswith(reason), last
    assert done.stderr.count("Traceback") == 1


def test_the_module_of_the_flax_classes_says_what_is_missing():
    done = run_without_flax("import grpo_jax.models.flax_families")
    assert done.stderr.strip().splitlines()[-1] == f"ImportError: {NO_FLAX}"
    assert done.stderr.count("Traceback") == 1
