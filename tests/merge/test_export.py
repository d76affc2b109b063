"""Merged networks come back from a file bit by bit, and run as they did."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax import tree
from permjax.io.checkpoint import load_tree, open_checkpoint, save_checkpoint, save_tree
from permjax.merge.block_apply import block_apply
from permjax.merge.export import CONFIG_KEY, HEADER, is_merged, load_merged, read_structure, save_merged
from permjax.merge.heads import own_heads
from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.partial import partial_plan
from permjax.symmetry.trace import trace_spec

pytestmark = pytest.mark.fast

WIDTHS = (4, 6, 5, 3)
X = np.random.default_rng(9).standard_normal((7, 4), np.float32)


def apply(params, x):
    for layer in ("a", "b"):
        x = jax.nn.relu(x @ params[layer]["kernel"] + params[layer]["bias"][None])
    return x @ params["c"]["kernel"]


def model(seed):
    rng = np.random.default_rng(seed)
    draw = {n: rng.standard_normal((i, o), np.float32) for n, i, o in zip("abc", WIDTHS, WIDTHS[1:], strict=False)}
    biases = {n: {"bias": rng.standard_normal(draw[n].shape[1], np.float32)} for n in "ab"}
    return {n: {"kernel": draw[n], **biases.get(n, {})} for n in "abc"}


def merged(models=2, ratio=0.5, own=False):
    """A merged network before any fit, and its function."""
    parents = [model(seed) for seed in range(models)]
    spec, apart = trace_spec(apply, parents[0], X[:2]), {}
    if own:
        heads = own_heads(spec, apply, parents[0], X[:2])
        spec, apart = heads.spec, dict.fromkeys(heads.groups, 1.0)
    ratios = {g.name: ratio for g in spec.groups} | apart
    plan = partial_plan(spec, ratios=ratios, models=models)
    network = block_apply(spec, plan, apply, joined="concatenate" if own else "mean")
    return wide_average(network.wide, parents, contracted_axes(apply, parents[0], X)), network


def assert_same_bits(found, expected):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].tobytes()) == (array.dtype, array.tobytes()), name


@pytest.mark.parametrize(("models", "own"), [(2, False), (3, True)])
def test_a_merged_network_comes_back_bit_by_bit_and_gives_the_same_outputs(tmp_path, models, own):
    params, network = merged(models, own=own)
    save_merged(tmp_path / "m.safetensors", params, network, source="a function")
    found, again = load_merged(tmp_path / "m.safetensors", apply)
    assert_same_bits(found, params)
    assert (again.joined, again.wide.spec, again.wide.models) == (network.joined, network.wide.spec, models)
    assert again(found, X).shape == (7, 3 * models if own else 3)
    np.testing.assert_array_equal(again(found, X), network(params, X))


def test_the_file_holds_dense_arrays_with_zero_blocks_and_says_which(tmp_path):
    params, network = merged()
    save_merged(tmp_path / "m.safetensors", params, network, metadata={"note": "kept"})
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert checkpoint.metadata["note"] == "kept"
    assert json.loads(checkpoint.metadata[HEADER])["plan"]["widths"] == dict(network.wide.plan.widths)
    assert checkpoint["b/kernel"].shape == (9, 8)  # 3 + 2 x 3 units, 2 + 2 x 3
    here, there = (np.asarray(network.wide.owners(axis)) for axis in network.wide.spec.leaf("b/kernel").axes)
    nobody = ~(here[:, :, None] & there[:, None, :]).any(0)
    assert nobody.sum() == 2 * 3 * 3
    assert (checkpoint["b/kernel"].read()[nobody] == 0).all()


def test_a_folder_gets_shards_and_a_configuration_that_says_that_widths_differ(tmp_path):
    params, network = merged()
    config = {"model_type": "of the models"}
    save_merged(tmp_path / "out", params, network, config=config, shard_size=200, constants={"mask": np.ones(2)})
    checkpoint = open_checkpoint(tmp_path / "out")
    assert len(checkpoint.shards) > 1
    assert checkpoint.config is not None
    assert checkpoint.config["model_type"] == "of the models"
    assert checkpoint.config[CONFIG_KEY] == {
        "models": 2,
        "joined": "mean",
        "widths": dict(network.wide.plan.widths),
    }
    assert read_structure(checkpoint).config == config
    np.testing.assert_array_equal(checkpoint["mask"].read(), np.ones(2))
    assert_same_bits(load_merged(tmp_path / "out", apply)[0], params)


def test_beside_a_single_file_no_configuration_is_written(tmp_path):
    params, network = merged()
    save_merged(tmp_path / "m.safetensors", params, network, config={"model_type": "x"})
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_floating_leaves_can_be_read_in_another_dtype(tmp_path):
    params, network = merged()
    half = tree.map_named(lambda _, leaf: leaf.astype(jnp.bfloat16), params)
    save_merged(tmp_path / "m.safetensors", half, network)
    assert_same_bits(load_merged(tmp_path / "m.safetensors", apply)[0], half)
    wide, again = load_merged(tmp_path / "m.safetensors", apply, dtype=np.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(again(wide, X), network(params, X), rtol=0.1, atol=0.2)


def test_an_ordinary_checkpoint_is_no_merged_network(tmp_path):
    save_tree(tmp_path / "a.safetensors", model(0))
    assert not is_merged(open_checkpoint(tmp_path / "a.safetensors"))
    assert read_structure(open_checkpoint(tmp_path / "a.safetensors")) is None
    with pytest.raises(ValueError, match=r"a\.safetensors holds no merged network.*load_tree"):
        load_merged(tmp_path / "a.safetensors", apply)


@pytest.mark.parametrize(
    "changes",
    [{"plan": {}}, {"spec": {"groups": []}}, {"plan": None}, {"joined": None, "spec": 3}],
)
def test_damaged_metadata_are_refused_by_the_name_of_the_file(tmp_path, changes):
    params, network = merged()
    path = tmp_path / "m.safetensors"
    save_merged(path, params, network)
    values = json.loads(open_checkpoint(path).metadata[HEADER]) | changes
    save_checkpoint(path, tree.flatten(load_tree(path)), metadata={HEADER: json.dumps(values)})
    with pytest.raises(ValueError, match=r"block structure in the metadata of .*m\.safetensors cannot be read"):
        load_merged(path, apply)


def test_leaves_that_do_not_fit_the_structure_are_refused(tmp_path):
    params, network = merged()
    path = tmp_path / "m.safetensors"
    save_merged(path, params, network)
    named = tree.flatten(params)
    for changes, pattern in (({"a/bias": named["a/bias"][:-1]}, "'a/bias', axis 0"), ({"a/bias": None}, "'a/bias'")):
        kept = {name: leaf for name, leaf in (named | changes).items() if leaf is not None}
        save_checkpoint(path, kept, metadata=open_checkpoint(path).metadata)
        with pytest.raises(ValueError, match=pattern):
            load_merged(path, apply)


def test_parameters_of_another_size_are_refused_and_nothing_is_written(tmp_path):
    _, network = merged()
    with pytest.raises(ValueError, match="the merged model has size 6, the spec expects 9"):
        save_merged(tmp_path / "m.safetensors", model(0), network)
    assert list(tmp_path.iterdir()) == []
