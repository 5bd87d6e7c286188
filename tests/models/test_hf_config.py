"""config.json as a configuration object: how older and newer files read, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.models import decoder_families
from grpo_jax.models.hf_config import read_config
from grpo_jax.models.loading import load_model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"


def config_of(name, **change):
    return read_config(json.loads((FIXTURES / name / "config.json").read_text()) | change, "here")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (
            "gpt2",
            {"model_type": "gpt_neox"},
            "model type 'gpt_neox' is not supported; supported: gpt2, llama, .*, gpt_neo",
        ),
        ("gpt2", {"model_type": None}, "model type None"),
        ("gpt2", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map.*never run"),
        ("gpt2", {"_attn_implementation": "kernels-community/x"}, "_attn_implementation"),
        ("gpt2", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ("llama", {"_sliding_window_pattern": 3}, "_sliding_window_pattern"),
        ("qwen3", {"layer_types": ["full_attention"]}, "no qwen3 configuration"),
        ("llama", {"rope_scaling": 2}, "no llama configuration"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "Missing required keys"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "one kind for all layers"),
        (
            "llama",
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta=10000.0 contradicts",
        ),
    ],
)
def test_what_is_no_configuration_is_refused(name, change, reason):
    with pytest.raises(ValueError, match=reason) as error:
        config_of(name, **change)
    assert str(error.value).startswith("here: ")
    assert "\n" not in str(error.value)


def test_rope_parameters_of_transformers_5_are_spelled_as_before():
    raw = json.loads((FIXTURES / "llama3" / "config.json").read_text())
    scaling, theta = raw.pop("rope_scaling"), raw.pop("rope_theta")
    config = read_config(raw | {"rope_parameters": {"rope_theta": theta} | scaling}, "here")
    assert config.to_dict() == config_of("llama3").to_dict()
    plain = {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}
    config = read_config(raw | plain, "here")
    assert (config.rope_theta, config.rope_scaling) == (1e5, None)


FULL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}


def gemma3_of_transformers_5(full=FULL, local=LOCAL, **changes):
    """Returns the config.json of the Gemma 3 fixture as transformers 5 writes it."""
    raw = json.loads((FIXTURES / "gemma3_text" / "config.json").read_text())
    older = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
    raw = {key: value for key, value in raw.items() if key not in older}
    return raw | {"rope_parameters": {"full_attention": full, "sliding_attention": local}} | changes


@pytest.mark.parametrize(
    ("full", "local", "expected"),
    [
        (FULL, LOCAL, (1e6, 1e4, {"rope_type": "linear", "factor": 8.0})),
        ({"rope_type": "default", "rope_theta": 5e5}, LOCAL | {"rope_theta": 2e4}, (5e5, 2e4, None)),
    ],
)
def test_rope_of_the_layer_types_of_gemma3_is_spelled_as_before(full, local, expected):
    config = read_config(gemma3_of_transformers_5(full, local), "here")
    assert (config.rope_theta, config.rope_local_base_freq, config.rope_scaling) == expected
    assert not list(decoder_families.problems(config))


def test_gemma3_of_transformers_5_computes_what_its_older_twin_does(tmp_path):
    shutil.copytree(FIXTURES / "gemma3_text", tmp_path / "twin")
    (tmp_path / "twin" / "config.json").write_text(json.dumps(gemma3_of_transformers_5()))
    twins = [load_model(str(path)) for path in (FIXTURES / "gemma3_text", tmp_path / "twin")]
    assert decoder_families.architecture_of(twins[0].config) == decoder_families.architecture_of(
        twins[1].config
    )
    tokens = np.arange(3, 13)[None]  # longer than the window
    mask, positions = np.ones_like(tokens, bool), np.arange(10)[None]
    old, new = (
        m.policy.unembed(m.params, m.policy.forward(m.params, tokens, mask, positions)[0]) for m in twins
    )
    np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (gemma3_of_transformers_5(local=FULL), "sliding_attention=.*only rope_type default"),
        (gemma3_of_transformers_5(local={"rope_type": "default"}), "sliding_attention=.*with a rope_theta"),
        (gemma3_of_transformers_5(rope_local_base_freq=1e5), r"rope_local_base_freq=100000\.0 contradicts"),
        (gemma3_of_transformers_5(rope_parameters={"full_attention": FULL}), "one kind for all layers"),
        (gemma3_of_transformers_5(full={"rope_type": "default"}), "one kind for all layers"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}},
            r"'gemma3' wraps a text model \(gemma3_text\).*save the text model alone",
        ),
    ],
)
def test_other_rope_parameters_and_wrappers_are_refused(raw, reason):
    with pytest.raises(ValueError, match=reason) as error:
        read_config(raw, "here")
    assert "\n" not in str(error.value)


def test_harmless_private_keys_are_accepted():
    config_of("gpt2", _name_or_path="x", _num_labels=1)
    config_of("opt", _remove_final_layer_norm=False)
    config_of("gemma3_text", _sliding_window_pattern=3)
