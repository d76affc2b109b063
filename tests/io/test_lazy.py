"""Checkpoints are opened without reading them, and what is no checkpoint is refused by name."""

import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from permjax.io.checkpoint import CheckpointError, open_checkpoint, save_checkpoint

pytestmark = pytest.mark.fast


def tensors() -> dict[str, np.ndarray]:
    return {
        "model.embed.weight": np.arange(32).reshape(8, 4).astype(ml_dtypes.bfloat16),
        "model.layers.0.weight": np.arange(16).reshape(4, 4).astype(np.float32),
        "model.layers.1.mask": np.asarray([True, False]),
        "model.steps": np.asarray(7, np.int64),
    }


def refused(*patterns: str):
    return pytest.raises(CheckpointError, match="(?s)" + ".*".join(patterns))


def save_shards(path):
    save_checkpoint(path, tensors(), shard_size=100)
    return open_checkpoint(path)


# reading


def test_opening_knows_shapes_without_reading_a_huge_sparse_file(tmp_path):
    shape = [2**18, 2**16]
    header = json.dumps({"x": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 2**35]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2**35)
    tracemalloc.start()
    lazy = open_checkpoint(tmp_path)["x"]
    assert (lazy.shape, lazy.dtype, lazy.nbytes) == (tuple(shape), ml_dtypes.bfloat16, 2**35)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_lazy_arrays_become_numpy_and_jax_arrays(tmp_path):
    save_checkpoint(tmp_path, tensors())
    lazy = open_checkpoint(tmp_path)["model.layers.0.weight"]
    np.testing.assert_array_equal(np.asarray(lazy, np.float64), tensors()["model.layers.0.weight"])
    np.testing.assert_array_equal(jnp.asarray(lazy), tensors()["model.layers.0.weight"])
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(lazy, copy=False)


def test_load_takes_names_and_casts_floating_tensors_only(tmp_path):
    save_checkpoint(tmp_path, tensors())
    found = open_checkpoint(tmp_path)
    for name, array in found.load().items():
        np.testing.assert_array_equal(array, tensors()[name], strict=True)
    assert list(found.load(["model.steps"])) == ["model.steps"]
    wide = found.load(dtype=np.float32)
    assert {x.dtype.name for x in wide.values()} == {"float32", "bool", "int64"}
    with refused("model.stepz", "nearest: 'model.steps'"):
        found.load(["model.stepz"])


# refusals


def test_nothing_is_where_the_path_points(tmp_path):
    with refused("no checkpoint at", "absent"):
        open_checkpoint(tmp_path / "absent")
    with refused(str(tmp_path), "holds neither model.safetensors nor"):
        open_checkpoint(tmp_path)
    save_file(tensors(), tmp_path / "adapter_model.safetensors")
    with refused("give one of its files", "adapter_model.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: data[:5],
        lambda data: data[:0],
        lambda data: struct.pack("<Q", 10**6) + data[8:],
        lambda data: struct.pack("<Q", 2**63) + data[8:],
        lambda data: data[:8] + b"?" * (len(data) - 8),
        lambda data: data + b"tail",
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    save_checkpoint(tmp_path, tensors())
    path.write_bytes(damage(path.read_bytes()))
    for target in (path, tmp_path):
        with refused("model.safetensors cannot be opened", "copy or download it again") as caught:
            open_checkpoint(target)
        assert "\n" not in str(caught.value)


class Bomb:
    def __reduce__(self):
        return (os._exit, (1,))  # unpickling this would end the test run


@pytest.mark.parametrize("name", ["pytorch_model.bin", "m.pt", "m.pth", "m.ckpt", "m.pkl"])
def test_a_pickle_is_refused_by_its_name_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    for target in (tmp_path / name, tmp_path):
        with refused(name, "is a pickle", "safetensors.torch.save_file"):
            open_checkpoint(target)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_recognised_by_its_content(tmp_path, protocol):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb(), protocol))
    with refused("is a pickle", "safetensors.torch.save_file"):
        open_checkpoint(path)


def test_a_torch_archive_is_recognised_by_its_content(tmp_path):
    path = tmp_path / "model.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    with refused("archive", "safetensors.torch.save_file"):
        open_checkpoint(tmp_path)


def test_a_header_that_starts_like_a_pickle_is_no_pickle(tmp_path):
    path = tmp_path / "m.safetensors"
    for size in range(400, 800):
        save_file({"x": np.zeros(2)}, path, {"note": "." * size})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert open_checkpoint(path)["x"].shape == (2,)


def test_an_index_with_a_missing_shard_or_tensor_is_refused(tmp_path):
    found = save_shards(tmp_path)
    index = json.loads(found.path.read_text())
    first, *_, last = found.shards
    broken = {**index["weight_map"], "model.steps": first}
    found.path.write_text(json.dumps({"weight_map": broken}))
    with refused("'model.steps'", first):
        open_checkpoint(tmp_path)
    found.path.write_text(json.dumps(index))
    (tmp_path / last).unlink()
    with refused("index.json names the shard", last, "not in its folder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("{", "no readable JSON"),
        ("[]", "JSON list"),
        ('{"weight_map": {}}', "no 'weight_map'"),
        ('{"weight_map": {"x": "../x.safetensors"}}', "plain file name"),
        ('{"weight_map": {"x": 3}}', "names the shard 3"),
    ],
)
def test_a_bad_index_is_refused_by_name(tmp_path, content, pattern):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with refused("index.json", pattern):
        open_checkpoint(tmp_path)


def test_a_bad_config_is_refused_by_name(tmp_path):
    save_checkpoint(tmp_path, tensors())
    (tmp_path / "config.json").write_text("{")
    with refused("config.json is no readable JSON"):
        open_checkpoint(tmp_path)
