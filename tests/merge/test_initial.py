"""The weights that follow from a plan alone: the blocks of PLeaS, clusters, and what is not contracted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.merge.average import average
from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.partial import partial_plan
from permjax.merge.wide import Wide
from permjax.plan import Plan
from permjax.symmetry.spec import PermutationSpec

pytestmark = pytest.mark.fast

SHAPES = {"w1": (3, 4), "b1": (4,), "w2": (4, 5), "b2": (5,), "w3": (5, 2), "mean": (5,)}
AXES = {"w1": (None, "a"), "b1": ("a",), "w2": ("a", "b"), "b2": ("b",), "w3": ("b", None), "mean": ("b",)}
SPEC = PermutationSpec.from_axes(SHAPES, AXES, roles={"mean": "statistic"})
SUMMED = {"w1": frozenset({0}), "w2": frozenset({0}), "w3": frozenset({0})}


def model(seed: int, backend=np):
    rng = np.random.default_rng(seed)
    return {name: backend.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}


def apply(p, x):
    h = jax.nn.relu(x @ p["w1"] + p["b1"][None])
    h = (h @ p["w2"] + p["b2"][None]) - p["mean"][None]
    return jax.nn.relu(h) @ p["w3"]


def average_of(plan, *models):
    return wide_average(Wide(SPEC, plan), models, SUMMED)


def test_the_blocks_are_those_of_the_paper():
    a, b = model(0), model(1)
    merged = average_of(partial_plan(SPEC, {"a": 2, "b": 3}), a, b)
    w2 = merged["w2"]
    shared, one, two = slice(0, 2), slice(2, 4), slice(4, 6)  # units of a
    out, first, second = slice(0, 3), slice(3, 5), slice(5, 7)  # units of b
    close = np.testing.assert_allclose
    close(w2[shared, out], (a["w2"][:2, :3] + b["w2"][:2, :3]) / 2, rtol=1e-6)
    close(w2[one, out], a["w2"][2:, :3] / 2)
    close(w2[two, out], b["w2"][2:, :3] / 2)
    close(w2[shared, first], a["w2"][:2, 3:])
    close(w2[shared, second], b["w2"][:2, 3:])
    close(w2[one, first], a["w2"][2:, 3:])
    close(w2[two, second], b["w2"][2:, 3:])
    assert not w2[one, second].any()
    assert not w2[two, first].any()


def test_axes_that_only_make_units_are_means_or_copies():
    a, b = model(0), model(1)
    merged = average_of(partial_plan(SPEC, {"a": 2, "b": 3}), a, b)
    np.testing.assert_allclose(merged["b1"][:2], (a["b1"][:2] + b["b1"][:2]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(merged["b1"][2:], [*a["b1"][2:], *b["b1"][2:]])
    np.testing.assert_allclose(merged["mean"][:3], (a["mean"][:3] + b["mean"][:3]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(merged["w1"][:, 2:4], a["w1"][:, 2:])
    np.testing.assert_array_equal(merged["w3"][3:5], a["w3"][3:] / 2)


@pytest.mark.parametrize("backend", [np, jnp])
@pytest.mark.parametrize("models", [2, 3])
def test_merging_everything_is_the_average(models, backend):
    parents = [model(seed, backend) for seed in range(models)]
    merged = average_of(partial_plan(SPEC, {}, models=models), *parents)
    (mean,) = average(SPEC, parents).models
    for name, leaf in merged.items():
        assert type(leaf) is type(mean[name])
        np.testing.assert_allclose(leaf, mean[name], rtol=1e-6, atol=1e-7)


def by_hand(plan: Plan, name: str, parents) -> np.ndarray:
    """`W[p, q] = mean over (m, i) with label q of the sum over j with label p of W_m[j, i]`."""
    group_in, group_out = AXES[name]
    wide = np.zeros((plan.widths[group_in], plan.widths[group_out]))
    for q in range(wide.shape[1]):
        rows = []
        for m, parent in enumerate(parents):
            for i in np.flatnonzero(plan.labels[group_out][m] == q):
                row = np.zeros(len(wide))
                np.add.at(row, plan.labels[group_in][m], parent[name][:, i])
                rows.append(row)
        wide[:, q] = np.mean(rows, axis=0) if rows else 0
    return wide


def test_clusters_are_summed_where_they_are_read_and_averaged_where_they_are_made():
    labels = {
        "a": (np.array([0, 0, 1, 2]), np.array([2, 3, 3, 1]), np.array([0, 1, 2, 3])),
        "b": (np.array([0, 1, 1, 1, 2]), np.array([4, 4, 0, 1, 2]), np.array([2, 2, 2, 2, 2])),
    }
    plan, parents = Plan(labels, {"a": 4, "b": 6}), [model(seed) for seed in range(3)]
    merged = average_of(plan, *parents)
    np.testing.assert_allclose(merged["w2"], by_hand(plan, "w2", parents), rtol=1e-6, atol=1e-7)
    assert not merged["w2"][:, [3, 5]].any()  # nobody's units
    np.testing.assert_allclose(
        merged["b2"][2], np.mean([parents[0]["b2"][4], parents[1]["b2"][4], *parents[2]["b2"]]), rtol=1e-6
    )


def test_dtypes_stay_and_whole_numbers_are_the_first_models():
    def typed(seed):
        return {**model(seed), "w2": model(seed)["w2"].astype(jnp.bfloat16), "b2": np.arange(5) + seed}

    merged = average_of(partial_plan(SPEC, {"a": 2}), typed(0), typed(1))
    assert merged["w2"].dtype == jnp.bfloat16
    assert merged["w2"].shape == (6, 5)
    np.testing.assert_array_equal(merged["b2"], np.arange(5))
    assert merged["w1"].dtype == np.float32


def test_large_averages_are_exact_in_float64():
    big = {name: np.full(shape, 2**24 + 2, np.float32) for name, shape in SHAPES.items()}
    odd = {name: np.full(shape, 2**24 + 6, np.float32) for name, shape in SHAPES.items()}
    merged = average_of(partial_plan(SPEC, {}), big, odd)
    assert (merged["w1"] == 2**24 + 4).all()


def test_contracted_axes_are_found_without_computing():
    abstract = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    assert contracted_axes(apply, abstract, jax.ShapeDtypeStruct((7, 3), jnp.float32)) == SUMMED


def test_contracted_axes_of_several_uses_are_put_together():
    def tied(p, x):
        return jax.nn.relu(x @ p["w"]) @ p["w"].T

    params = {"w": jnp.ones((3, 4))}
    assert contracted_axes(tied, params, jnp.ones((2, 3))) == {"w": frozenset({0, 1})}
