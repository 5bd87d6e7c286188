"""Writes the LoRA adapters under tests/fixtures/adapters, and the logits that PEFT computes with them.

    python scripts/make_adapter_fixtures.py write      # with this package: adapter directories
    python scripts/make_adapter_fixtures.py peft       # with torch, transformers and peft: peft_logits.npz

The second needs an environment of its own (`pip install torch peft`), as nothing else here needs torch. It
puts each adapter on its base under tests/fixtures/models with `PeftModel.from_pretrained`, and runs the token
rows of the base's reference.npz, each alone. Both run from the root of the repository.
"""

import sys
from pathlib import Path

import numpy as np

FIXTURES = Path("tests/fixtures")
# base -> settings of the adapter; a Conv1D model, and one of Linear with another kind of targets
ADAPTERS = {
    "gpt2": {"rank": 3, "alpha": 6.0},
    "llama": {"rank": 2, "alpha": 5.0, "targets": ("q_proj", "v_proj", "down_proj", "lm_head")},
}


def write(name: str) -> None:
    """Writes an adapter of random numbers, none of them 0."""
    import jax

    from grpo_jax.models.loading import load_model
    from grpo_jax.models.peft import make_lora, save_adapters
    from grpo_jax.policy.lora import init_adapters

    model = load_model(str(FIXTURES / "models" / name))
    lora = make_lora(model, **ADAPTERS[name])
    rng = np.random.default_rng(0)
    shapes = init_adapters(lora, jax.random.key(0))
    adapters = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), shapes)
    save_adapters(model, lora, adapters, FIXTURES / "adapters" / name)


def peft(name: str) -> None:
    """Writes the logits of every row."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = FIXTURES / "models" / name
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, FIXTURES / "adapters" / name).eval()
    reference = np.load(base / "reference.npz")
    rows = np.split(reference["tokens"], np.cumsum(reference["lengths"])[:-1])
    with torch.no_grad():
        logits = [model(torch.tensor(row[None].astype(np.int64))).logits[0].numpy() for row in rows]
    logits = np.concatenate(logits)
    print(name, "largest change of a logit by the adapter:", np.abs(logits - reference["logits"]).max())
    np.savez_compressed(FIXTURES / "adapters" / name / "peft_logits.npz", logits=logits)


if __name__ == "__main__":
    for fixture in ADAPTERS:
        {"write": write, "peft": peft}[sys.argv[1]](fixture)
