"""Second moments of keys, and the parameters they belong to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.edit.covariance import check, collect_covariances, fingerprint, load_covariances, save_covariances
from permjax.edit.places import mlp_place
from permjax.nets.gpt import GPT2Config
from permjax.nets.language import record
from permjax.nets.registry import build

pytestmark = pytest.mark.fast

CONFIG = GPT2Config(vocab_size=19, n_positions=9, n_embd=8, n_layer=3, n_head=2, n_inner=12)
LAYERS = (0, 2)


@pytest.fixture(scope="module")
def model():
    net = build(CONFIG)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return net, {name: jnp.asarray(rng.normal(0, 1, leaf.shape), jnp.float32) for name, leaf in shapes.items()}


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 10, (3, 4, 1))
    return [(rng.integers(0, 19, (4, 9)).astype(np.int32), np.arange(9)[None] < length) for length in lengths]


@pytest.fixture(scope="module")
def covariances(model, batches):
    return collect_covariances(*model, iter(batches), LAYERS)


def test_the_moment_is_the_mean_of_the_products_of_keys_that_count(model, batches, covariances):
    net, params = model
    names = {layer: mlp_place(CONFIG, layer).key for layer in LAYERS}
    recorded = jax.jit(lambda p, x: record(net.apply, p, x, tuple(names.values()))[1])
    seen = [recorded(params, tokens) for tokens, _ in batches]
    for layer, name in names.items():
        keys = [np.asarray(one[name], np.float64)[mask] for one, (_, mask) in zip(seen, batches, strict=True)]
        keys = np.concatenate(keys)
        assert covariances[layer].count == len(keys) == sum(mask.sum() for _, mask in batches)
        assert covariances[layer].matrix.dtype == np.float64
        np.testing.assert_allclose(covariances[layer].matrix, keys.T @ keys / len(keys), rtol=1e-5, atol=1e-6)


def test_what_stands_in_the_padding_does_not_matter(model, batches, covariances):
    other = [(np.where(mask, tokens, 18 - tokens), mask) for tokens, mask in batches]
    again = collect_covariances(*model, other, LAYERS)
    for layer in LAYERS:
        np.testing.assert_allclose(again[layer].matrix, covariances[layer].matrix, rtol=1e-12)


def test_batches_of_several_shapes_are_one_text(model, batches, covariances):
    pieces = [(tokens[:, :5], mask[:, :5]) for tokens, mask in batches]
    whole = [(tokens[:2], mask[:2]) for tokens, mask in batches]
    for some in (pieces + whole, whole + pieces):
        found = collect_covariances(*model, some, LAYERS)
        assert found[0].count == sum(mask.sum() for _, mask in some)
    halves = [(tokens[rows], mask[rows]) for tokens, mask in batches for rows in (slice(1), slice(1, 4))]
    again = collect_covariances(*model, halves, LAYERS)
    for layer in LAYERS:
        np.testing.assert_allclose(again[layer].matrix, covariances[layer].matrix, rtol=1e-5, atol=1e-5)


def test_a_text_without_tokens_is_refused(model, batches):
    with pytest.raises(ValueError, match="no token that counts"):
        collect_covariances(*model, [(batches[0][0], np.zeros((4, 9), bool))], LAYERS)
    with pytest.raises(ValueError, match="no token that counts"):
        collect_covariances(*model, [], LAYERS)


def test_every_value_of_every_leaf_shows_in_the_fingerprint(model):
    params = {name: np.asarray(leaf) for name, leaf in model[1].items()}
    whole = fingerprint(params)
    marks = {whole}
    for name, leaf in params.items():
        for place in (0, leaf.size - 1):
            changed = leaf.copy()
            changed.reshape(-1)[place] = np.nextafter(changed.reshape(-1)[place], np.float32(9))
            marks.add(fingerprint(params | {name: changed}))
    assert len(marks) == 1 + 2 * len(params)
    renamed = dict(params)
    renamed["h.0.ln_3.bias"] = renamed.pop("h.0.ln_2.bias")
    marks |= {fingerprint(renamed), fingerprint({name: leaf.astype(np.float64) for name, leaf in params.items()})}
    assert len(marks) == 3 + 2 * len(params)


def test_the_fingerprint_is_one_of_values_only(model):
    _, params = model
    halves = {name: leaf.astype(jnp.bfloat16) for name, leaf in params.items()}
    for leaves in (params, halves):
        assert fingerprint({name: np.asarray(leaves[name]) for name in reversed(leaves)}) == fingerprint(leaves)


def test_a_covariance_of_other_parameters_is_refused(model, covariances):
    _, params = model
    check(covariances[2], params)
    edited = params | {"h.0.ln_1.bias": params["h.0.ln_1.bias"] + 1}
    with pytest.raises(ValueError, match="covariance of layer 2 was collected with other parameters"):
        check(covariances[2], edited)


def test_covariances_come_back_from_their_file(covariances, tmp_path):
    save_covariances(tmp_path / "moments.safetensors", covariances)
    again = load_covariances(tmp_path / "moments.safetensors")
    assert again.keys() == covariances.keys()
    for layer, one in covariances.items():
        assert (again[layer].layer, again[layer].count, again[layer].fingerprint) == (layer, one.count, one.fingerprint)
        np.testing.assert_array_equal(again[layer].matrix, one.matrix)


def test_files_of_other_things_are_refused(tmp_path, model):
    from safetensors.numpy import save_file

    (tmp_path / "text").write_text("text")
    save_file({name: np.asarray(leaf) for name, leaf in model[1].items()}, tmp_path / "model")
    for name in ("text", "model"):
        with pytest.raises(ValueError, match=f"{name} holds no covariances"):
            load_covariances(tmp_path / name)
