"""Writes PyTorch reference logits of sequence classifiers to tests/fixtures/classifiers.

    python scripts/make_classifier_fixtures.py

Needs an environment of its own, as nothing else here needs torch:

    pip install torch "transformers>=4.57" safetensors

A classifier is the backbone of a fixture under tests/fixtures/models with a random score layer. Its fixture
holds that layer, token rows, and the logits of the rows as one padded batch, in float32. Two rows end with
the padding token, where PyTorch takes the logits of the token before.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
NAMES = ("gpt2", "llama", "qwen2")
PAD, NUM_LABELS, VOCAB = 0, 3, 288


def main() -> None:
    """Writes all of them."""
    rows = [np.random.default_rng(n).integers(3, VOCAB, n).tolist() for n in (5, 9, 1, 12)]
    rows[0][-1] = PAD
    rows[1][-2:] = [PAD, PAD]
    rows[3][4] = PAD  # in the middle it counts as any other
    padded = torch.tensor([row + [PAD] * (12 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (12 - len(row)) for row in rows])
    (FIXTURES / "classifiers").mkdir(exist_ok=True)
    for name in NAMES:
        model = AutoModelForSequenceClassification.from_pretrained(
            FIXTURES / "models" / name,
            num_labels=NUM_LABELS,
            pad_token_id=PAD,
            dtype=torch.float32,
            attn_implementation="eager",
        ).eval()
        torch.manual_seed(len(name))
        torch.nn.init.normal_(model.score.weight, std=0.2)
        with torch.no_grad():
            logits = model(input_ids=padded, attention_mask=mask).logits
        np.savez_compressed(
            FIXTURES / "classifiers" / f"{name}.npz",
            architecture=type(model).__name__,
            score=model.score.weight.detach().numpy(),
            tokens=np.concatenate(rows).astype(np.int32),
            lengths=np.array([len(row) for row in rows]),
            logits=logits.numpy(),
        )
        print(name, type(model).__name__, logits.numpy().round(3).tolist())


if __name__ == "__main__":
    main()
