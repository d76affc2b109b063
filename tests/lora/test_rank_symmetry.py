"""Ranks as units: permuting them changes no update, and adapters in a shuffled order are brought back together."""

import jax
import numpy as np
import pytest

from permjax.action import permute
from permjax.lora.lego import LegoBalanced, LoraLego
from permjax.lora.merge import merge_loras
from permjax.lora.pool import Factors, Merged
from permjax.lora.symmetry import align_ranks, cluster_plan, rank_spec
from permjax.permutation import random_permutations


def adapter(seed, rank=5, size=(7, 9)):
    draw = np.random.default_rng(seed)
    shapes = {"first": size, "second": (6, 6)}
    return {
        name: Factors(np.float32(draw.normal(size=(rank, i))), np.float32(draw.normal(size=(o, rank))))
        for name, (o, i) in shapes.items()
    }


def shuffled(model, seed):
    spec = rank_spec(model)
    return permute(spec, random_permutations(spec, jax.random.key(seed)), model)


@pytest.mark.fast
def test_permuting_ranks_changes_the_factors_but_not_the_updates():
    model = adapter(0)
    other = shuffled(model, 3)
    for name in model:
        assert np.abs(other[name].a - model[name].a).max() > 0.1
        np.testing.assert_allclose(other[name].b @ other[name].a, model[name].b @ model[name].a, atol=1e-5)


@pytest.mark.fast
def test_shuffled_copies_come_back_to_the_order_of_the_first():
    model = adapter(1)
    signs = np.float32([1, -1, 1, 1, -1])
    flipped = {name: Factors(a * signs[:, None], b * signs) for name, (a, b) in model.items()}
    result = align_ranks([model, shuffled(flipped, 1), shuffled(model, 2)])
    for name in model:
        np.testing.assert_array_equal(result.models[0][name].a, model[name].a)
        np.testing.assert_array_equal(result.models[1][name].a, flipped[name].a)
        np.testing.assert_array_equal(result.models[2][name].b, model[name].b)
        assert result.info.after[name] == pytest.approx(1, abs=1e-5)
        assert result.info.before[name] < 0.9


def test_lower_ranks_are_filled_up_and_placed_beside_what_they_resemble():
    model = adapter(2)
    part = {name: Factors(a[[3, 1]], b[:, [3, 1]]) for name, (a, b) in model.items()}
    _, aligned = align_ranks([model, part]).models
    for name in model:
        np.testing.assert_array_equal(np.asarray(aligned[name].a)[[1, 3]], model[name].a[[1, 3]])
        assert not np.asarray(aligned[name].a)[[0, 2, 4]].any()


def test_the_clusters_of_a_merge_are_a_plan():
    models = [adapter(3), shuffled(adapter(3), 1)]
    plan = cluster_plan(models, merge_loras(models, LegoBalanced(), rank=5))
    assert plan.widths == {"first": 5, "second": 5}
    assert plan.is_bijective(0)
    assert plan.is_bijective(1)
    wide = cluster_plan(models, merge_loras(models, LoraLego(restarts=1), rank=3))
    assert wide.labels["first"][1].shape == (5,)
    with pytest.raises(ValueError, match="not one to one"):
        wide.permutations(0)


@pytest.mark.fast
def test_a_merge_without_clusters_has_no_plan():
    model = adapter(4)
    with pytest.raises(ValueError, match=r"'first'.*without clusters"):
        cluster_plan([model], {name: Merged(*one) for name, one in model.items()})


@pytest.mark.fast
def test_a_module_that_is_missing_is_named():
    with pytest.raises(ValueError, match="adapter 1 has no module 'second'"):
        align_ranks([adapter(0), {"first": adapter(0)["first"]}])
