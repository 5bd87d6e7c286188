"""The page docs/from_trl.md: its tables are those of the package, its example is a config of TRL."""

import importlib.util
import re
from pathlib import Path

import yaml

from grpo_jax.config.from_trl import translate
from grpo_jax.config.translation import flat_defaults
from grpo_jax.config.trl_fields import TRL_FIELDS

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("trl_page", ROOT / "scripts" / "trl_page.py")
trl_page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trl_page)
PAGE = trl_page.PAGE.read_text(encoding="utf-8")


def test_the_page_is_current():
    assert trl_page.page() == PAGE, "run python scripts/trl_page.py --write"
    rows = re.findall(r"^\| `(\w+)` \| `.*?` \| (.+) \|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == list(TRL_FIELDS)


ROWS = {
    "algorithm.reduction": "loss | `dapo`",
    "algorithm.kl_coef": "(`beta: 0`) | `kl_coef: 0.04`",
    "algorithm.missing": "a missing reward among several | counts as 0",
    "model.dtype": "precision | bfloat16 | float32",
    "model.remat": "gradient checkpointing | on | off",
    "sampling.max_new_tokens": "new tokens | 512 | 64 |",
    "training.batch_size": "completions per update | 8 | 32 |",
    "training.learning_rate": "`1e-6`, linear to 0 | `1e-5`, constant |",
    "training.lr_schedule": "`1e-6`, linear to 0 | `1e-5`, constant |",
    "training.adam_b2": "`0.999` | `0.99` |",
    "training.num_epochs": "3 epochs | 1 epoch |",
    "training.seed": "seed | 42 | 0 |",
    "checkpoints.every": "every 500 updates, all kept | every 50,",
    "run_dir": "an existing directory |",
}


def test_every_default_that_differs_is_on_the_page():
    out = translate(
        yaml.safe_load("{model_name_or_path: x, dataset_name: y, reward_funcs: [a.b, a.c]}"), "trl.yaml"
    )
    assert {*out.defaults, "algorithm.missing"} == set(ROWS)
    for key, row in ROWS.items():
        assert row in PAGE, key
        for value in (out.settings[key], flat_defaults()[key]):
            if type(value) in (int, float) and key != "algorithm.kl_coef":
                assert re.search(
                    rf"(?<![\d.]){re.escape(f'{value:g}'.replace('e-0', 'e-'))}(?![\d.])", row
                ), key


def test_the_example_is_a_config_of_trl():
    path = ROOT / "configs" / "trl" / "grpo.yaml"
    text = path.read_text(encoding="utf-8")
    out = translate(yaml.safe_load(text), str(path), text=text)
    assert not out.missing and out.settings["training.batch_size"] == 64
