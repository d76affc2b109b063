"""Safetensors checkpoints are written exactly, atomically, and only if they fit."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from permjax.io import checkpoint as module
from permjax.io.checkpoint import (
    CheckpointError,
    load_tree,
    open_checkpoint,
    save_checkpoint,
    save_tree,
)

pytestmark = pytest.mark.fast

DTYPES = ("bfloat16", "float16", "float32", "float64", "complex64", "bool", "int8", "uint8", "int16", "int64", "uint32")


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "model.embed.weight": rng.standard_normal((8, 4)).astype(ml_dtypes.bfloat16),
        "model.layers.0.weight": rng.standard_normal((4, 4)).astype(np.float32),
        "model.layers.1.weight": rng.standard_normal((4, 4)).astype(np.float16),
        "model.layers.1.mask": rng.integers(0, 2, 4).astype(bool),
        "model.steps": np.asarray(7, np.int64),
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        got, array = np.asarray(found[name]), np.asarray(array)
        assert (got.dtype, got.shape) == (array.dtype, array.shape), name
        assert got.tobytes() == array.tobytes(), name


def refused(*patterns: str):
    return pytest.raises(CheckpointError, match="(?s)" + ".*".join(patterns))


def visible(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


# round trips


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_survives_a_round_trip(tmp_path, dtype):
    raw = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    array = (raw % 2).astype(bool) if dtype == "bool" else raw.view(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    save_checkpoint(tmp_path / "m.safetensors", {"x": array.reshape(2, -1), "empty": array[:0], "scalar": array[0]})
    found = open_checkpoint(tmp_path / "m.safetensors")
    assert_same(found, {"x": array.reshape(2, -1), "empty": array[:0], "scalar": array[0]})
    assert found["x"].nbytes == array.nbytes


def test_all_65536_bfloat16_patterns_survive(tmp_path):
    array = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    save_checkpoint(tmp_path, {"x": array})
    np.testing.assert_array_equal(open_checkpoint(tmp_path)["x"].read().view(np.uint16), np.arange(2**16))


def test_jax_arrays_transposed_arrays_lazy_arrays_and_functions_are_written(tmp_path):
    values = tensors()
    embed = values["model.embed.weight"]
    save_checkpoint(tmp_path / "a.safetensors", {"jax": jnp.asarray(embed), "transposed": embed.T})
    lazy = open_checkpoint(tmp_path / "a.safetensors")
    save_checkpoint(tmp_path / "b.safetensors", {**lazy, "called": lambda: embed[::2]})
    expected = {"jax": embed, "transposed": embed.T, "called": embed[::2]}
    assert_same(open_checkpoint(tmp_path / "b.safetensors"), expected)


def test_metadata_and_config_are_kept(tmp_path):
    save_checkpoint(tmp_path / "plain", tensors())
    assert open_checkpoint(tmp_path / "plain").metadata == {"format": "pt"}
    assert open_checkpoint(tmp_path / "plain").config is None
    save_checkpoint(tmp_path / "own", tensors(), metadata={"made by": "a test"})
    (tmp_path / "own" / "config.json").write_text('{"model_type": "gpt2"}')
    for path in ("own", "own/model.safetensors"):
        found = open_checkpoint(tmp_path / path)
        assert found.metadata == {"made by": "a test"}
        assert found.config == {"model_type": "gpt2"}


def test_a_saved_file_has_the_bytes_and_the_mode_of_an_ordinary_file(tmp_path):
    save_checkpoint(tmp_path / "ours.safetensors", tensors())
    save_file(tensors(), tmp_path / "theirs.safetensors", {"format": "pt"})
    (tmp_path / "ordinary").write_text("")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert (tmp_path / "ours.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


# shards


def save_shards(path, values, **options):
    save_checkpoint(path, values, shard_size=100, **options)
    return open_checkpoint(path)


def test_shards_round_trip_by_folder_and_by_index(tmp_path):
    found = save_shards(tmp_path / "s", tensors())
    assert_same(found, tensors())
    assert list(found) == list(tensors())
    assert len(found.shards) == 3
    assert max(sum(found[n].nbytes for n in names) for names in found.shards.values()) <= 100
    index = json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors().values())
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert_same(open_checkpoint(found.path), tensors())


def test_like_keeps_shards_names_order_dtypes_metadata_and_companions(tmp_path):
    source = save_shards(tmp_path / "source", tensors(), metadata={"format": "pt", "note": "kept"})
    for name in ("config.json", "tokenizer.json", "merges.txt", "README.md"):
        (tmp_path / "source" / name).write_text("{}")
    (tmp_path / "licence").write_text("free")
    wide = {name: jnp.asarray(x, jnp.float32) if x.dtype.kind not in "bi" else x for name, x in tensors(1).items()}
    backwards = dict(reversed(wide.items()))
    save_checkpoint(tmp_path / "out", backwards, like=tmp_path / "source", extra_files=[tmp_path / "licence"])
    out = open_checkpoint(tmp_path / "out")
    assert_same(out, tensors(1))
    assert (list(out), out.shards, out.metadata) == (list(source), source.shards, source.metadata)
    assert visible(tmp_path / "source") - visible(tmp_path / "out") == {"README.md"}
    assert (tmp_path / "out" / "licence").read_text() == "free"
    save_checkpoint(tmp_path / "one" / "file.safetensors", tensors(1), like=source)
    assert visible(tmp_path / "one") == {"file.safetensors"}


def test_an_index_keeps_its_own_order_of_names(tmp_path):
    found = save_shards(tmp_path / "old", tensors())
    index = json.loads(found.path.read_text())
    order = [list(tensors())[i] for i in (1, 4, 0, 3, 2)]
    found.path.write_text(json.dumps({"weight_map": {name: index["weight_map"][name] for name in order}}))
    assert list(open_checkpoint(tmp_path / "old")) == order
    save_checkpoint(tmp_path / "new", tensors(), like=tmp_path / "old")
    assert list(open_checkpoint(tmp_path / "new")) == order


def test_one_shard_is_in_memory_at_a_time(tmp_path):
    made, alive = [], []

    def make():
        array = np.zeros(16, np.float32)
        made.append(weakref.ref(array))
        alive.append(sum(reference() is not None for reference in made))
        return array

    like = save_shards(tmp_path / "like", {f"x{i}": np.zeros(16, np.float32) for i in range(6)})
    assert len(like.shards) == 6
    save_checkpoint(tmp_path / "out", dict.fromkeys(like, make), like=like)
    assert alive == [1] * 6


@pytest.mark.parametrize("sharded", [(False, True), (True, False), (True, True), (False, False)])
def test_a_folder_can_be_written_over_even_from_itself(tmp_path, sharded):
    for seed, many in enumerate(sharded):
        (save_shards if many else save_checkpoint)(tmp_path, tensors(seed))
    found = open_checkpoint(tmp_path)
    assert_same(found, tensors(1))
    assert visible(tmp_path) == {*found.shards, *([found.path.name] if sharded[1] else [])}
    save_checkpoint(tmp_path, found, like=found)
    again = open_checkpoint(tmp_path)
    assert_same(again, tensors(1))
    assert len(visible(tmp_path)) == len(again.shards) + sharded[1]


# trees


def test_trees_round_trip_as_nested_dicts_or_like_a_given_tree(tmp_path):
    values = {
        "params": {"Dense_0": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}},
        "stats": {"mean": np.arange(3.0)},
    }
    save_tree(tmp_path / "t.safetensors", values)
    again = load_tree(tmp_path / "t.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(values)
    jax.tree.map(np.testing.assert_array_equal, again, values)
    listed = {"layers": [np.ones(2), np.zeros(1, np.int32)]}
    save_tree(tmp_path / "l.safetensors", listed)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), listed)
    jax.tree.map(np.testing.assert_array_equal, load_tree(tmp_path / "l.safetensors", like), listed)


def test_a_tree_that_does_not_fit_is_refused_by_leaf(tmp_path):
    save_tree(tmp_path / "t.safetensors", {"a": np.zeros(2), "b": np.zeros(3)})
    with refused("t.safetensors", r"'b' has shape \(4,\) in model 0 but \(3,\)"):
        load_tree(tmp_path / "t.safetensors", {"a": np.zeros(2), "b": np.zeros(4)})
    with refused("t.safetensors", "'c'", "missing"):
        load_tree(tmp_path / "t.safetensors", {"a": np.zeros(2), "c": np.zeros(3)})


# atomic writing


def test_an_error_in_the_middle_leaves_the_old_checkpoint_and_no_new_file(tmp_path):
    def fail():
        raise RuntimeError("no power")

    for folder, save in ((tmp_path / "one", save_checkpoint), (tmp_path / "many", save_shards)):
        save(folder, tensors(0))
        before = visible(folder)
        with pytest.raises(RuntimeError, match="no power"):
            save_checkpoint(folder, {**tensors(1), "model.steps": fail}, like=folder)
        assert visible(folder) == before
        assert_same(open_checkpoint(folder), tensors(0))


@pytest.mark.parametrize("save", [save_checkpoint, save_shards])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_failed_rename_leaves_the_old_tensors(tmp_path, monkeypatch, save, steps):
    save(tmp_path, tensors(0))
    (tmp_path / "config.json").write_text("{}")
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) > (steps if save is save_shards else 0):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with refused(str(tmp_path), "Input/output error", "intact"):
        save(tmp_path, tensors(1))
    assert_same(open_checkpoint(tmp_path), tensors(0))
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_reported_and_cleaned_up(tmp_path, monkeypatch):
    def half(values, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    save_checkpoint(tmp_path, tensors(0))
    monkeypatch.setattr(module, "save_file", half)
    with refused("was not written", "No space left"):
        save_checkpoint(tmp_path, tensors(1))
    assert visible(tmp_path) == {"model.safetensors"}
    assert_same(open_checkpoint(tmp_path), tensors(0))


KILLED = """
    import sys, time
    import numpy as np
    from permjax.io import checkpoint

    def half(values, path, metadata):
        write(values, path, metadata)
        if "model.steps" in values:
            path.write_bytes(path.read_bytes()[:-20])
            print("in the middle", flush=True)
            time.sleep(60)

    write, checkpoint.save_file = checkpoint.save_file, half
    old = checkpoint.open_checkpoint(sys.argv[1])
    new = {name: (lambda x=lazy: np.zeros(x.shape, x.dtype)) for name, lazy in old.items()}
    checkpoint.save_checkpoint(sys.argv[1], new, like=old)
"""


@pytest.mark.parametrize("save", [save_checkpoint, save_shards])
def test_a_killed_save_leaves_the_old_checkpoint_and_no_half_file(tmp_path, save):
    save(tmp_path, tensors(0))
    before = visible(tmp_path)
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in the middle\n"
        process.send_signal(signal.SIGKILL)
    assert {name for name in visible(tmp_path) if not name.startswith(".")} == before
    assert_same(open_checkpoint(tmp_path), tensors(0))
    save(tmp_path, tensors(1))
    assert_same(open_checkpoint(tmp_path), tensors(1))


# refusals


def test_a_dtype_without_a_numpy_counterpart_is_refused_by_tensor(tmp_path):
    array = np.zeros(3, ml_dtypes.float8_e4m3fn)
    save_file({"x": array}, tmp_path / "m.safetensors")
    with refused("'x' of", "F8_E4M3"):
        open_checkpoint(tmp_path / "m.safetensors")
    for bad in (array, np.zeros(1, np.complex128), np.asarray(["text"]), {"nested": 1}):
        with refused("'x' has dtype"):
            save_checkpoint(tmp_path / "new.safetensors", {"x": bad})
    assert visible(tmp_path) == {"m.safetensors"}


@pytest.mark.parametrize(
    ("change", "patterns"),
    [
        (lambda t: {n: x for n, x in t.items() if n != "model.steps"}, ("'model.steps'", "missing")),
        (lambda t: {**t, "model.step": t["model.steps"]}, ("'model.step'", "nearest: 'model.steps'")),
        (lambda t: {**t, "model.layers.0.weight": np.zeros((4, 5))}, (r"layers.0.weight' has shape \(4, 5\)",)),
        (lambda t: {**t, "model.layers.0.weight": lambda: np.zeros(4)}, (r"layers.0.weight' has shape \(4,\)",)),
        (lambda t: {**t, "model.steps": np.asarray(7.5)}, ("'model.steps' has dtype float64",)),
        (lambda t: {**t, "model.layers.1.weight": np.full((4, 4), 1e6)}, ("layers.1.weight'", "too large")),
    ],
)
def test_tensors_that_differ_from_like_are_refused_by_name(tmp_path, change, patterns):
    save_checkpoint(tmp_path / "old", tensors())
    with refused(*patterns):
        save_checkpoint(tmp_path / "new", change(tensors()), like=tmp_path / "old")
    assert not (tmp_path / "new").exists() or not visible(tmp_path / "new")


def test_names_and_places_that_cannot_be_written_are_refused(tmp_path):
    with refused("__metadata__", "no name for a tensor"):
        save_checkpoint(tmp_path, {"__metadata__": np.zeros(2)})
    for name in ("model.bin", "model.safetensors.index.json"):
        with refused(name, "ends in .safetensors"):
            save_checkpoint(tmp_path / name, tensors())
    with refused("one file", "shard_size"):
        save_checkpoint(tmp_path / "m.safetensors", tensors(), shard_size=100)
    with refused("size of tensor 'x'", "`like`"):
        save_checkpoint(tmp_path, {"x": lambda: np.zeros(2)}, shard_size=100)
    with refused("absent.txt"):
        save_checkpoint(tmp_path, tensors(), extra_files=[tmp_path / "absent.txt"])
    assert not visible(tmp_path)
