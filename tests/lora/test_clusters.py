"""Clustering from inner products: against scikit-learn and brute force, and where points are few or equal."""

from functools import partial
from itertools import permutations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from permjax.lora.balance import balanced_labels
from permjax.lora.clusters import kernel_kmeans
from permjax.lora.pool import Pool


def clustered(points, k, *, weights=None, key=0, **limits):
    weights = np.ones(len(points)) if weights is None else weights
    gram = jnp.asarray(np.float32(points @ points.T))
    run = jax.jit(partial(kernel_kmeans, **limits), static_argnums=2)
    return np.asarray(run(gram, jnp.asarray(np.float32(weights)), k, jax.random.key(key)))


def loss(points, labels, weights=None):
    weights = np.ones(len(points)) if weights is None else weights
    total = 0.0
    for label in set(labels):
        own, w = points[labels == label], weights[labels == label]
        total += (w[:, None] * (own - np.average(own, axis=0, weights=w)) ** 2).sum()
    return total


def test_the_loss_is_that_of_scikit_learn_on_clear_and_on_unclear_clusters():
    draw = np.random.default_rng(0)
    for spread in (0.1, 1.0):
        centres = draw.normal(size=(4, 6))
        points = np.repeat(centres, 8, 0) + spread * draw.normal(size=(32, 6))
        weights = draw.uniform(0.5, 2, 32)
        other = KMeans(4, n_init=10, random_state=0).fit(points, sample_weight=weights).labels_
        found = clustered(points, 4, weights=weights)
        assert loss(points, found, weights) <= 1.02 * loss(points, other, weights)


def test_few_points_are_clustered_as_brute_force_does():
    points = np.random.default_rng(1).normal(size=(7, 2))
    best = min(loss(points, np.array(labels)) for labels in product(range(3), repeat=7))
    assert loss(points, clustered(points, 3)) == pytest.approx(best, rel=1e-5)


def test_the_order_of_the_points_plays_no_part():
    points = np.random.default_rng(2).normal(size=(20, 3))
    order = np.random.default_rng(3).permutation(20)
    first, second = clustered(points, 5), clustered(points[order], 5)
    np.testing.assert_array_equal(first[order], second)


def test_no_cluster_is_empty_while_points_differ():
    points = np.random.default_rng(4).normal(size=(12, 5))
    for k in (6, 11, 12):
        assert len(set(clustered(points, k, restarts=2))) == k


def test_equal_points_share_a_cluster_and_others_stay_empty():
    points = np.repeat(np.random.default_rng(5).normal(size=(3, 4)), 3, 0)
    found = clustered(points, 7)
    assert len(set(found)) == 3
    assert all(len(set(found[i : i + 3])) == 1 for i in (0, 3, 6))


balanced = jax.jit(balanced_labels, static_argnums=2)


def kernel(a, b):
    return (a @ a.T) * (b.T @ b)


def best_balanced(a, b, ranks, k):
    """The best value over all ways to give every adapter's pieces places of their own, and the objective."""
    products = kernel(a, b)

    def value(places):
        labels = np.concatenate(places)
        groups = [np.flatnonzero(labels == c) for c in range(k)]
        return sum(products[np.ix_(g, g)].sum() / len(g) for g in groups if len(g))

    options = [list(permutations(range(k), rank)) for rank in ranks]
    return max(value(places) for places in product(*options)), value


@pytest.mark.parametrize(("ranks", "k"), [((3, 3, 3), 3), ((2, 3), 4), ((3, 1, 2), 3)])
def test_balanced_labels_are_places_of_their_own_and_near_the_best(ranks, k):
    ratios = []
    for seed in range(5):
        draw = np.random.default_rng(seed)
        a, b = draw.normal(size=(sum(ranks), 3)), draw.normal(size=(4, sum(ranks)))
        pool = Pool(jnp.asarray(np.float32(a)), jnp.asarray(np.float32(b)), ranks)
        labels = np.asarray(balanced(pool, jnp.ones(len(ranks)), k))
        places = np.split(labels, np.cumsum(ranks)[:-1])
        assert all(len(set(own)) == len(own) for own in places)
        best, value = best_balanced(a, b, ranks, k)
        ratios.append(value(places) / best)
    assert max(ratios) <= 1 + 1e-5
    assert np.mean(ratios) > 0.97


def test_an_adapter_with_more_pieces_than_clusters_fills_them_evenly():
    draw = np.random.default_rng(6)
    pool = Pool(
        jnp.asarray(np.float32(draw.normal(size=(7, 5)))), jnp.asarray(np.float32(draw.normal(size=(5, 7)))), (7,)
    )
    labels = np.asarray(balanced(pool, jnp.ones(1), 3))
    assert sorted(np.bincount(labels, minlength=3)) in ([1, 3, 3], [2, 2, 3])
