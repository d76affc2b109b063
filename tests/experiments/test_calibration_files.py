"""Calibration inputs are read, checked and cut into batches, and refused in one line if they do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.experiments.architectures import Architecture
from permjax.experiments.calibration_files import check_outputs, read_calibration
from permjax.io.checkpoint import save_tree

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(0)
X = RNG.random((10, 4), np.float32)


def given(params, *inputs):
    return inputs


def architecture(*examples, apply=given):
    return Architecture(apply, tuple(map(jnp.asarray, examples)), {}, "a test")


ONE = architecture(np.zeros((2, 4), np.float32))
TWO = architecture(np.zeros((2, 4), np.float32), np.zeros((2, 3), np.float32))


def cut(params, tokens):
    """A network of at most six tokens."""
    if tokens.shape[1] > 6:
        raise ValueError("too many tokens\nsecond line")
    return tokens


TOKENS = architecture(np.zeros((2, 5), np.int32), apply=cut)


def read(given, of=ONE, *, models=2, samples=None, batch_size=4, seed=0):
    return read_calibration(str(given), of, models=models, samples=samples, batch_size=batch_size, seed=seed)


def rows(calibration, place=0):
    return np.concatenate([batch[place] for batch in calibration.batches])


def test_all_samples_come_once_in_batches_of_nearly_equal_size(tmp_path):
    np.savez(tmp_path / "d.npz", x=X, y=np.zeros(10))
    found = read(tmp_path / "d.npz")
    assert [len(batch[0]) for batch in found.batches] == [4, 3, 3]
    assert found.samples == 10
    assert not found.generated
    assert found.owners is None
    assert sorted(map(tuple, rows(found))) == sorted(map(tuple, X))
    assert (rows(found) != X).any()


def test_the_seed_decides_the_order_and_the_choice(tmp_path):
    np.save(tmp_path / "d.npy", X)
    one, same, other = (rows(read(tmp_path / "d.npy", samples=3, seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert one.shape == (3, 4)
    assert (one != other).any()


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_several_inputs_and_owners_stay_together(tmp_path, ending):
    arrays = {"first": X, "second": X[:, :3] + 1, "owner": np.arange(10) % 2}
    path = tmp_path / f"d.{ending}"
    np.savez(path, **arrays) if ending == "npz" else save_tree(path, arrays)
    found = read(path, TWO)
    np.testing.assert_array_equal(rows(found, 0)[:, :3] + 1, rows(found, 1))
    owners = np.concatenate(found.owners)
    for row, owner in zip(rows(found), owners, strict=True):
        assert owner == np.flatnonzero((row == X).all(1))[0] % 2


def test_bytes_are_scaled_as_the_data_sets_are_and_doubles_rounded(tmp_path):
    np.save(tmp_path / "d.npy", np.full((3, 4), 51, np.uint8))
    found = read(tmp_path / "d.npy")
    np.testing.assert_array_equal(rows(found), np.full((3, 4), np.float32(0.2)))
    assert "scaled to [0, 1]" in found.source
    np.save(tmp_path / "d.npy", X.astype(np.float64))
    assert rows(read(tmp_path / "d.npy")).dtype == np.float32


def test_tokens_may_have_another_length_that_the_network_takes(tmp_path):
    np.save(tmp_path / "d.npy", np.ones((3, 6), np.uint8))
    found = read(tmp_path / "d.npy", TOKENS)
    assert (rows(found).dtype, rows(found).shape) == (np.int32, (3, 6))
    assert "scaled" not in found.source
    np.save(tmp_path / "d.npy", np.ones((3, 7), np.int64))
    with pytest.raises(
        ValueError, match=r"d\.npy: the network does not take inputs of shape \(7,\) \(too many tokens\)"
    ):
        read(tmp_path / "d.npy", TOKENS)


def test_noise_has_the_shape_of_the_inputs_and_is_known_as_such():
    found = read("generated:white_noise:6", TWO)
    assert (found.samples, found.generated) == (6, True)
    assert rows(found, 1).shape == (6, 3)
    assert ((rows(found) >= 0) & (rows(found) <= 1)).all()
    assert read("generated:white_noise", batch_size=500).samples == 1000
    np.testing.assert_array_equal(rows(found), rows(read("generated:white_noise:6", TWO)))


def with_value(value):
    x = X.copy()
    x[3, 2] = value
    return x


REFUSED = {
    "other shape": ({"x": np.ones((5, 3), np.float32)}, r"d\.npz: the array 'x' has shape \(5, 3\), .* \[samples, 4\]"),
    "other rank": ({"x": np.ones(4, np.float32)}, r"has shape \(4,\)"),
    "no samples": ({"x": np.ones((0, 4), np.float32)}, r"has shape \(0, 4\)"),
    "NaN": ({"x": with_value(np.nan)}, r"d\.npz: the array 'x' holds 1 numbers that are NaN or infinite"),
    "infinite": ({"x": with_value(np.inf)}, "holds 1 numbers that are NaN or infinite"),
    "too large": ({"x": with_value(1.0).astype(np.float64) * 1e300}, "NaN or infinite"),
    "whole numbers": ({"x": np.ones((5, 4), np.int64)}, "'x' holds int64, but the network takes float32"),
    "several arrays": ({"a": X, "b": X}, "holds a, b, but the network takes one input: call it 'x'"),
    "only owners": ({"owner": np.zeros(4, int)}, "holds no arrays"),
    "owners of others": ({"x": X, "owner": np.full(10, 2)}, "'owner' must hold one whole number from 0 to 1"),
    "few owners": ({"x": X, "owner": np.zeros(9, int)}, r"not int64 of shape \(9,\)"),
    "owners no whole numbers": ({"x": X, "owner": np.zeros(10)}, "not float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_that_do_not_fit_are_refused(tmp_path, case):
    arrays, pattern = REFUSED[case]
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ValueError, match=pattern) as caught:
        read(tmp_path / "d.npz")
    assert "\n" not in str(caught.value)


def test_inputs_of_unlike_length_are_refused(tmp_path):
    np.savez(tmp_path / "d.npz", one=X, two=X[:9, :3])
    with pytest.raises(ValueError, match=r"unlike numbers of samples: 10 in the array 'one', 9 in the array 'two'"):
        read(tmp_path / "d.npz", TWO)
    np.savez(tmp_path / "d.npz", one=X)
    with pytest.raises(ValueError, match="holds one, but the network takes 2 inputs"):
        read(tmp_path / "d.npz", TWO)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    for name in ("broken.npz", "broken.npy", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(ValueError, match=rf"--calibration .*{name} cannot be read"):
            read(tmp_path / name)
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects\.npy cannot be read"):
        read(tmp_path / "objects.npy")
    with pytest.raises(ValueError, match=r"none\.npz cannot be read \(.*No such file"):
        read(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"inputs\.csv is no \.npz, \.npy or \.safetensors"):
        read(tmp_path / "inputs.csv")


@pytest.mark.parametrize(
    ("given", "options", "pattern"),
    [
        ("generated:whit_noise", {}, "what can be generated is generated:white_noise"),
        ("generated:white_noise:many", {}, "what can be generated"),
        ("generated:white_noise", {"of": TOKENS}, "whole numbers"),
        ("generated:white_noise:0", {}, "cannot be drawn from the 0"),
        ("generated:white_noise:5", {"samples": 6}, "--samples 6 cannot be drawn from the 5"),
        ("generated:white_noise:5", {"samples": 0}, "--samples 0"),
        ("generated:white_noise:5", {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_numbers_and_noise_that_cannot_be_had_are_refused(given, options, pattern):
    with pytest.raises(ValueError, match=pattern):
        read(given, **options)


def test_models_that_give_no_numbers_for_an_input_are_named():
    data = read("generated:white_noise:5")
    models = ({"w": jnp.ones(())}, {"w": jnp.asarray(jnp.inf)})
    check_outputs(data, lambda params, x: x * params["w"], models[:1], ["a"])
    with pytest.raises(ValueError, match="the outputs of b on the calibration data"):
        check_outputs(data, lambda params, x: jax.nn.relu(x) * params["w"], models, ["a", "b"])
