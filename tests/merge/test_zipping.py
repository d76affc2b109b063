"""Zipping: twins fall into each other, copies inside a model are joined, widths and budgets are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.action import permute
from permjax.merge.zipping import zip_plan
from permjax.permutation import random_permutations
from permjax.symmetry.spec import Fixed, PermutationSpec

pytestmark = pytest.mark.fast

SHAPES = {"0/w": (6, 16), "0/b": (16,), "1/w": (16, 12), "1/b": (12,), "2/w": (12, 4)}
SPEC = PermutationSpec.from_axes(
    SHAPES, {"0/w": (None, "h0"), "0/b": ("h0",), "1/w": ("h0", "h1"), "1/b": ("h1",), "2/w": ("h1", None)}
)
X = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)
DATA = [X[:100], (X[100:250],), [X[250:]]]


def model(seed: int):
    rng = np.random.default_rng(seed)
    return {name: (0.5 * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


def apply(p, x):
    x = jax.nn.relu(x @ p["0/w"] + jnp.expand_dims(p["0/b"], 0))
    x = jax.nn.relu(x @ p["1/w"] + jnp.expand_dims(p["1/b"], 0))
    return x @ p["2/w"]


def zipped(*models, **hyper):
    return zip_plan(SPEC, models, apply=apply, data=DATA, **hyper)


def merged(spec, plan, models, inputs):
    """The weights of a plan by its formula: sum over the units of an in axis, mean over those of all other axes."""
    result = {}
    for leaf in spec.leaves:
        groups = [None if isinstance(axis, Fixed) else axis.group for axis in leaf.axes]
        total, count = np.zeros(()), np.zeros(())
        for m, params in enumerate(models):
            value, ones = np.asarray(params[leaf.name], np.float64), np.ones(leaf.shape)
            for axis, (group, size) in enumerate(zip(groups, leaf.shape, strict=True)):
                labels = np.arange(size) if group is None else plan.labels[group][m]
                to = np.arange(size if group is None else plan.widths[group])[:, None] == labels[None]
                value = np.moveaxis(np.tensordot(to, value, (1, axis)), 0, axis)
                counts = np.full(to.shape, 1 / size) if (leaf.name, axis) in inputs else to
                ones = np.moveaxis(np.tensordot(counts, ones, (1, axis)), 0, axis)
            total, count = total + value, count + ones
        result[leaf.name] = (total / count).astype(np.float32)
    return result


INPUTS = {("1/w", 0), ("2/w", 0)}


def clusters(plan, group):
    """The clusters as sets of (model, unit), in order."""
    found = [set() for _ in range(plan.widths[group])]
    for m, labels in enumerate(plan.labels[group]):
        for unit, label in enumerate(labels):
            found[label].add((m, unit))
    return found


@pytest.mark.parametrize("within", [False, 0.125, True])
@pytest.mark.parametrize("count", [2, 3])
def test_permuted_twins_are_zipped_into_one_of_them(within, count):
    a = model(1)
    orders = [random_permutations(SPEC, jax.random.key(seed)) for seed in range(1, count)]
    models = [a, *(permute(SPEC, {g: np.asarray(p) for g, p in order.items()}, a) for order in orders)]
    plan = zipped(*models, within=within, damping=1.0)
    for group in ("h0", "h1"):
        np.testing.assert_array_equal(plan.labels[group][0], np.arange(SPEC.group(group).size))
        for order, labels in zip(orders, plan.labels[group][1:], strict=True):
            np.testing.assert_array_equal(labels, order[group])
    one = merged(SPEC, plan, models, INPUTS)
    np.testing.assert_allclose(apply(one, X), apply(a, X), rtol=1e-5, atol=1e-5)


def test_identical_models_give_the_model_back():
    a = model(2)
    plan = zipped(a, a)
    assert all(plan.is_bijective(m) for m in (0, 1))
    one = merged(SPEC, plan, [a, a], INPUTS)
    for name in a:
        np.testing.assert_allclose(one[name], a[name], rtol=1e-6)


def test_the_full_width_keeps_every_unit_and_both_functions():
    a, b = model(1), model(2)
    plan = zipped(a, b, widths={"h0": 32, "h1": 24})
    for group, d in (("h0", 16), ("h1", 12)):
        np.testing.assert_array_equal(np.concatenate(plan.labels[group]), np.arange(2 * d))
    one = merged(SPEC, plan, [a, b], INPUTS)
    np.testing.assert_allclose(apply(one, X), (apply(a, X) + apply(b, X)) / 2, rtol=1e-4, atol=1e-5)


def test_copies_of_a_unit_inside_a_model_are_joined_within_it():
    a, b = model(3), model(4)
    for m, (first, second) in ((a, (2, 9)), (b, (5, 7))):
        for leaf in ("0/w", "0/b"):
            m[leaf][..., second] = 3 * m[leaf][..., first]
    plan = zipped(a, b, widths={"h0": 30}, within=True)
    joined = [cluster for cluster in clusters(plan, "h0") if len(cluster) > 1]
    assert joined == [{(0, 2), (0, 9)}, {(1, 5), (1, 7)}]
    apart = zipped(a, b, widths={"h0": 30}, within=False)
    assert all(len({m for m, _ in c}) == len(c) for c in clusters(apart, "h0"))


def test_widths_are_kept_and_every_cluster_is_used_in_the_order_of_its_first_unit():
    a, b = model(5), model(6)
    for width in (2, 9, 16, 23, 32):
        plan = zipped(a, b, widths={"h0": width}, within=True)
        assert plan.widths == {"h0": width, "h1": 12}
        labels = np.concatenate(plan.labels["h0"])
        first = [int(np.flatnonzero(labels == cluster)[0]) for cluster in range(width)]
        assert first == sorted(first)


@pytest.mark.parametrize("within", [0.0, 0.25, 1.0])
def test_a_narrower_plan_only_joins_clusters_of_a_wider_one(within):
    a, b = model(5), model(6)
    finer = None
    for width in range(32, 11 if within else 15, -1):
        labels = np.concatenate(zipped(a, b, widths={"h0": width}, within=within).labels["h0"])
        if finer is not None:
            assert len(set(zip(finer, labels, strict=True))) == finer.max() + 1
        finer = labels


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_no_model_joins_more_of_its_own_units_than_its_share(share):
    a, b = model(7), model(8)
    plan = zipped(a, b, widths={"h0": 16 - int(share * 16)}, within=share)
    for labels in plan.labels["h0"]:
        assert len(np.unique(labels)) >= 16 - int(share * 16)


def plain_greedy(correlation, width, damping):
    """The joins one after the other, looking at all pairs of clusters each time."""
    members, worth = [[i] for i in range(len(correlation))], {}
    for i in range(len(members)):
        for j in range(i):
            worth[j, i] = correlation[j, i]
    alive = list(range(len(members)))
    while len(alive) > width:
        one, two = max(((j, i) for j in alive for i in alive if j < i), key=lambda p: worth[p])
        alive.remove(two)
        members[one] += members[two]
        for k in alive:
            if k != one:
                low = min(worth[tuple(sorted((k, one)))], worth[tuple(sorted((k, two)))])
                worth[tuple(sorted((k, one)))] = low * damping if low > 0 else low
    return {frozenset(members[i]) for i in alive}


@pytest.mark.parametrize("damping", [1.0, 0.3, 0.0])
def test_the_joins_are_those_of_a_plain_search_through_numpy_correlations(damping):
    a, b = model(9), model(10)
    x = X.astype(np.float64)
    features = np.concatenate([x @ m["0/w"].astype(np.float64) for m in (a, b)], axis=1)
    expected = plain_greedy(np.corrcoef(features.T), 14, damping)
    plan = zipped(a, b, widths={"h0": 14}, damping=damping, within=True)
    assert {frozenset(16 * m + unit for m, unit in c) for c in clusters(plan, "h0")} == expected


def test_damping_spreads_the_joins():
    a, b = model(11), model(12)
    largest = [
        max(map(len, clusters(zipped(a, b, widths={"h0": 8}, damping=d, within=True), "h0"))) for d in (1.0, 0.1)
    ]
    assert largest[1] <= largest[0]


def test_units_that_never_vary_are_joined_last():
    a, b = model(13), model(14)
    for m in (a, b):
        m["0/w"][:, 3] = 0
    alike = model(13)
    alike["0/w"][:, 3] = 0
    plan = zipped(a, alike, widths={"h0": 17})
    alone = [c for c in clusters(plan, "h0") if len(c) == 1]
    assert alone == [{(0, 3)}, {(1, 3)}]
    zipped(a, b)  # nothing divides by zero


def test_batches_can_be_cut_anywhere():
    a, b = model(5), model(6)
    one = zip_plan(SPEC, [a, b], apply=apply, data=[X], widths={"h0": 12}, within=1.0)
    two = zip_plan(SPEC, [a, b], apply=apply, data=[X[:1], X[1:]], widths={"h0": 12}, within=1.0)
    for m in (0, 1):
        np.testing.assert_array_equal(one.labels["h0"][m], two.labels["h0"][m])


HEADS = PermutationSpec.from_axes(
    {"q": (6, 3, 4), "k": (6, 3, 4), "v": (6, 3, 5), "o": (3, 5, 2)},
    {"q": (None, "head", "qk"), "k": (None, "head", "qk"), "v": (None, "head", "vo"), "o": ("head", "vo", None)},
    per={"qk": ("head",), "vo": ("head",)},
)


def attend(p, x):
    query, key, value = (jnp.einsum("bti,ihd->bthd", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", query, key), axis=-1)
    return jnp.einsum("bthd,hdo->bto", jnp.einsum("bhts,bshd->bthd", weights, value), p["o"])


def test_heads_are_zipped_as_wholes_and_their_inner_units_stay():
    rng = np.random.default_rng(0)
    a = {leaf.name: rng.standard_normal(leaf.shape).astype(np.float32) for leaf in HEADS.leaves}
    inner = {g: np.broadcast_to(np.arange(HEADS.group(g).size), (3, HEADS.group(g).size)) for g in ("qk", "vo")}
    b = permute(HEADS, {"head": np.array([2, 0, 1]), **inner}, a)
    plan = zip_plan(HEADS, [a, b], apply=attend, data=[X[:60].reshape(10, 6, 6)])
    np.testing.assert_array_equal(plan.labels["head"], [[0, 1, 2], [2, 0, 1]])
    for group, rows in inner.items():
        np.testing.assert_array_equal(plan.labels[group], [rows, rows])
    with pytest.raises(ValueError, match="'qk' cannot be zipped to 5 clusters: it is per other groups"):
        zip_plan(HEADS, [a, b], apply=attend, data=[X[:60].reshape(10, 6, 6)], widths={"qk": 5})


def test_bad_input_is_refused():
    a, nan = model(1), {**model(2), "0/b": np.full(16, np.nan, np.float32)}
    for models, hyper, message in (
        ([a], {}, "two models or more"),
        ([a, nan], {}, "'0/b' of model 1 holds 16 NaN"),
        ([a, a], {"data": []}, "data gave no batches"),
        ([a, a], {"data": [np.full((9, 6), np.inf, np.float32)]}, "activations of group 'h0' are not finite"),
        ([a, a], {"damping": 1.5}, "`damping` is 1.5"),
        ([a, a], {"within": -0.1}, "`within` is -0.1"),
        ([a, a], {"widths": {"h9": 3}}, "'h9', which the spec does not have; it has h0, h1"),
        ([a, a], {"widths": {"h0": 33}}, "zipped to 14..32 clusters, not to 33"),
        ([a, a], {"widths": {"h0": 15}, "within": False}, "zipped to 16..32 clusters, not to 15"),
        ([a, model(2), model(3)], {"within": False}, "'h0': no joins that within=False allows are left before 16"),
    ):
        with pytest.raises(ValueError, match=message):
            zip_plan(SPEC, models, apply=apply, **{"data": DATA, **hyper})
    with pytest.raises(ValueError, match="'h1' cannot be zipped to 13 clusters"):
        zip_plan(SPEC, [a, a], apply=lambda p, x: x @ p["0/w"], data=DATA, widths={"h1": 13})
