"""Strict reading and writing of checkpoint files, on a one-layer GPT-2 with an untied head."""

import json
import pickle
import shutil
from pathlib import Path

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from grpo_jax.models import flax_families, tensor_files
from grpo_jax.models.hf_config import read_config
from grpo_jax.models.loading import load_model, save_model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
UNTIED, TIED = FIXTURES / "gpt2_untied", FIXTURES / "gpt2"


def read(directory, fixture=UNTIED):
    """Reads `directory` as the fixture's configuration says."""
    config = read_config(json.loads((fixture / "config.json").read_text()), "here")
    return tensor_files.read_params(
        directory,
        flax_families.param_shapes(config),
        embedding=flax_families.embedding_path(config),
        buffers=flax_families.buffers(config),
    )


def tensors_of(fixture=UNTIED):
    return load_file(fixture / "model.safetensors")


def write(directory, tensors, name="model.safetensors"):
    save_file(tensors, directory / name)
    return directory


def assert_same(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, wanted)


def test_linear_layers_are_transposed_and_embeddings_are_not():
    params, tensors = read(UNTIED), tensors_of()
    np.testing.assert_array_equal(params["lm_head"]["kernel"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(
        params["transformer"]["wte"]["embedding"], tensors["transformer.wte.weight"]
    )


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_parameters_are_float32_whatever_the_file(tmp_path, dtype):
    cast = {name: tensor.astype(dtype) for name, tensor in tensors_of().items()}
    expected = write(tmp_path, {name: tensor.astype(np.float32) for name, tensor in cast.items()})
    expected = read(expected)
    assert_same(read(write(tmp_path, cast)), expected)


def test_integer_weights_are_refused(tmp_path):
    tensors = tensors_of() | {"lm_head.weight": np.zeros((288, 8), np.int8)}
    with pytest.raises(ValueError, match=r"tensor lm_head.weight is int8"):
        read(write(tmp_path, tensors))


def test_missing_tensor_is_named(tmp_path):
    tensors = tensors_of()
    del tensors["transformer.h.0.attn.c_attn.bias"]
    with pytest.raises(ValueError, match=r"missing tensor transformer\.h\.0\.attn\.c_attn\.bias$"):
        read(write(tmp_path, tensors))


def test_missing_untied_head_is_named_not_random(tmp_path):
    tensors = tensors_of()
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing tensor lm_head\.weight$"):
        read(write(tmp_path, tensors))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "model.", "a.b.c."])
def test_names_behind_those_of_a_wrapper(tmp_path, prefix):
    write(tmp_path, {prefix + name: value for name, value in tensors_of().items()})
    with pytest.raises(
        ValueError, match=rf"the file holds tensors .*every name begins with '{prefix}'"
    ) as error:
        read(tmp_path)
    assert "\n" not in str(error.value) and "missing tensors" in str(error.value)


def test_a_peft_model_that_was_not_merged(tmp_path):
    tensors, name = tensors_of(), "transformer.h.0.attn.c_attn"
    tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
    write(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"missing tensor {name}\.weight; .*PEFT model .*merge_and_unload"):
        read(tmp_path)


def test_a_file_of_another_model_is_described(tmp_path):
    write(tmp_path, {"encoder.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"missing tensors .*; the file holds tensor encoder\.weight$"):
        read(tmp_path)


def test_unexpected_tensor_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"unexpected tensor transformer\.h\.1\.ln_1\.weight$"):
        read(write(tmp_path, tensors_of() | {"transformer.h.1.ln_1.weight": np.ones(8, np.float32)}))


def test_wrong_shape_is_named_with_both_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"transformer\.wpe\.weight has shape \(31, 8\).* \(32, 8\)"):
        read(write(tmp_path, tensors_of() | {"transformer.wpe.weight": np.ones((31, 8), np.float32)}))


def test_names_without_prefix_and_with_constant_buffers_as_in_the_hubs_gpt2(tmp_path):
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(TIED).items()}
    tensors |= {
        "h.0.attn.bias": np.ones((1, 1, 32, 32), np.float32),
        "h.0.attn.masked_bias": np.float32([-1e4]),
    }
    assert_same(read(write(tmp_path, tensors), TIED), read(TIED, TIED))


def test_tied_head_in_the_file_must_equal_the_embedding(tmp_path):
    tensors = tensors_of(TIED)
    head = tensors["transformer.wte.weight"].copy()
    assert_same(read(write(tmp_path, tensors | {"lm_head.weight": head}), TIED), read(TIED, TIED))
    head[3, 3] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        read(write(tmp_path, tensors | {"lm_head.weight": head}), TIED)


def shards(directory, tensors, index="model.safetensors.index.json"):
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        write(directory, {name: tensors[name] for name in part}, file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def test_shards(tmp_path):
    assert_same(read(shards(tmp_path, tensors_of())), read(UNTIED))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard model-00002-of-00002\.safetensors is missing"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{}", "not an index"),
        ("nonsense", "not an index"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside the directory"),
    ],
)
def test_broken_index(tmp_path, index, reason):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=reason):
        read(tmp_path)


def test_tensor_in_the_index_but_in_no_shard(tmp_path):
    shards(tmp_path, tensors_of())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.h.7.ln_1.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"transformer\.h\.7\.ln_1\.weight named by .* but in no shard"):
        read(tmp_path)


def test_flax_safetensors_and_msgpack(tmp_path):
    params = read(UNTIED)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir(), (tmp_path / "c").mkdir()
    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep=".").items()}
    assert_same(read(write(tmp_path / "a", flat)), params)

    (tmp_path / "b" / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(params))
    assert_same(read(tmp_path / "b"), params)

    weight_map = {}
    for i, part in enumerate(("lm_head", "transformer")):
        file = f"flax_model-0000{i + 1}-of-00002.msgpack"
        (tmp_path / "c" / file).write_bytes(flax.serialization.to_bytes({part: params[part]}))
        weight_map |= dict.fromkeys(flatten_dict({part: params[part]}, sep="/"), file)
    (tmp_path / "c" / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(read(tmp_path / "c"), params)

    del params["transformer"]["ln_f"]["scale"]
    (tmp_path / "b" / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(params))
    with pytest.raises(ValueError, match=r"missing tensor transformer\.ln_f\.scale"):
        read(tmp_path / "b")


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack"])
def test_broken_file_is_one_line_that_names_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=name) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_pickle_is_refused_unread(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle.*convert it to model\.safetensors"):
        read(tmp_path)
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "pytorch_model.bin").read_bytes())
    with pytest.raises(ValueError, match="not a safetensors file"):
        read(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_no_weights_at_all(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no weights: neither model\.safetensors nor flax_model\.msgpack"
    ):
        read(tmp_path)


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))
def test_export_equals_what_pytorch_wrote_and_loads_bit_identically(tmp_path, name):
    model = load_model(str(FIXTURES / name))
    save_model(model, model.params, tmp_path)
    exported, original = load_file(tmp_path / "model.safetensors"), tensors_of(FIXTURES / name)
    assert exported.keys() == original.keys()
    for key, tensor in original.items():
        np.testing.assert_array_equal(exported[key], tensor)
    again = load_model(str(tmp_path))
    assert_same(again.params, model.params)
    assert (again.eos_ids, again.max_positions) == (model.eos_ids, model.max_positions)
    assert again.config.to_dict() == model.config.to_dict() | {"dtype": again.config.to_dict()["dtype"]}
    assert not list(tmp_path.glob("*.unfinished"))


def test_export_replaces_the_file_it_was_loaded_from(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(UNTIED, directory)
    model = load_model(str(directory))
    params = jax.tree.map(lambda leaf: leaf + 1, model.params)
    save_model(model, params, directory)
    assert_same(load_model(str(directory)).params, params)


def test_export_refuses_foreign_parameters(tmp_path):
    model = load_model(str(UNTIED))
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), model.params)
    with pytest.raises(ValueError, match="bfloat16"):
        save_model(model, half, tmp_path)
    with pytest.raises(ValueError, match=r"lm_head.* is None"):
        save_model(model, {"transformer": model.params["transformer"]}, tmp_path)


def test_export_keeps_the_one_private_key_that_matters(tmp_path):
    shutil.copytree(FIXTURES / "opt", tmp_path / "opt")
    raw = json.loads((tmp_path / "opt" / "config.json").read_text()) | {"_remove_final_layer_norm": True}
    (tmp_path / "opt" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"unexpected tensors model\.decoder\.final_layer_norm\.bias"):
        load_model(str(tmp_path / "opt"))
    write(
        tmp_path / "opt", {k: v for k, v in tensors_of(FIXTURES / "opt").items() if "decoder.final" not in k}
    )
    model = load_model(str(tmp_path / "opt"))
    save_model(model, model.params, tmp_path / "export")
    assert_same(load_model(str(tmp_path / "export")).params, model.params)


def test_a_written_file_can_be_read_by_others(tmp_path):
    tensor_files.write_params(tmp_path, {"a": {"kernel": np.zeros((2, 3), np.float32)}})
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_large_exports_are_cut_into_shards(tmp_path):
    """As PyTorch transformers cuts them; a tensor over the limit has a file of its own."""
    model = load_model(str(UNTIED))
    save_model(model, model.params, tmp_path, max_shard_size=4000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes) == sum(t.nbytes for t in tensors_of().values())
    assert max(sizes) > 4000  # the embedding
    for file, size in zip(files, sizes, strict=True):
        names = load_file(file).keys()
        assert {index["weight_map"][name] for name in names} == {file.name}
        assert size <= 4000 or len(names) == 1
        assert file.stat().st_mode & 0o777 == 0o644
    assert_same(load_model(str(tmp_path)).params, model.params)


@pytest.mark.parametrize(("first", "second"), [(4000, 10**9), (10**9, 4000), (4000, 9000)])
def test_an_export_leaves_nothing_of_the_one_before(tmp_path, first, second):
    model = load_model(str(UNTIED))
    save_model(model, model.params, tmp_path / "fresh", max_shard_size=second)
    moved = jax.tree.map(lambda leaf: leaf + 1, model.params)
    save_model(model, moved, tmp_path / "again", max_shard_size=first)
    save_model(model, model.params, tmp_path / "again", max_shard_size=second)
    names = [sorted(path.name for path in (tmp_path / d).iterdir()) for d in ("fresh", "again")]
    assert names[0] == names[1]
    assert_same(load_model(str(tmp_path / "again")).params, model.params)
