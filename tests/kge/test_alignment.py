"""Aligning the coordinates of two tables."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax import tree
from permjax.kge.alignment import Motion, align_coordinates, average_tables, coordinate_spec, move
from permjax.kge.flows import Nfe2, Nfe3
from permjax.kge.models import FAMILIES, score_all

pytestmark = pytest.mark.fast

D, E = 6, 40
CASES = {name: FAMILIES[name](D) for name in ("nfe_1", "nfe_2", "nfe_k", "nfe_3", "affine", "transe", "distmult")} | {
    "nfe_2_exact": Nfe2(D, mode="exact"),
    "nfe_3_exact": Nfe3(D, mode="exact"),
    "nfe_1_sigma": FAMILIES["nfe_1_sigma"](D),
}


def random_motion(family, name, seed=0):
    rng = np.random.default_rng(seed)
    sign = np.ones(D) if name == "nfe_1_sigma" else rng.choice([-1.0, 1.0], D)
    shift = np.zeros(D) if name in ("nfe_1_sigma", "distmult") else rng.normal(size=D)
    assert isinstance(family, FAMILIES[name.removesuffix("_exact")])
    return Motion(rng.permutation(D), sign, shift)


@partial(jax.jit, static_argnums=0)
def scores(family, params):
    return score_all(family, params, jnp.arange(8), jnp.arange(8) % 3)


@pytest.mark.parametrize("name", CASES)
def test_scores_do_not_feel_order_signs_and_places_of_coordinates(name):
    family = CASES[name]
    params = family.init(jax.random.key(0), E, 3, 1.0)
    other = move(family, params, random_motion(family, name))
    np.testing.assert_allclose(scores(family, other), scores(family, params), rtol=1e-4, atol=1e-4)
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (other, params)), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_planted_copy_is_brought_back(name):
    family = CASES[name]
    params = family.init(jax.random.key(1), E, 3, 1.0)
    motion = random_motion(family, name, seed=1)
    found = align_coordinates(family, params, move(family, params, motion))
    np.testing.assert_array_equal(np.asarray(motion.permutation)[found.motion.permutation], np.arange(D))
    wanted, here = (average_tables(family, [one]) for one in (params, found.params))
    for name_, leaf in tree.flatten(wanted).items():
        np.testing.assert_allclose(tree.flatten(here)[name_], leaf, atol=2e-6)
    np.testing.assert_allclose(abs(found.correlation), 1.0, rtol=1e-6)


def test_without_signs_a_turned_copy_is_not_brought_back():
    family = CASES["nfe_1"]
    params = family.init(jax.random.key(1), E, 3, 1.0)
    turned = move(family, params, Motion(np.arange(D), -np.ones(D), np.zeros(D)))
    plain, signed = (
        align_coordinates(family, params, turned, signed=s).params["entity"]["mean"] for s in (False, True)
    )
    assert float(abs(plain - params["entity"]["mean"]).max()) > 0.5
    np.testing.assert_allclose(signed, params["entity"]["mean"], atol=1e-6)


def test_a_constant_coordinate_is_assigned_last():
    family = CASES["transe"]
    params = family.init(jax.random.key(2), E, 3, 1.0)
    params["entity"]["mean"] = params["entity"]["mean"].at[:, 2].set(0.25)
    found = align_coordinates(family, params, params)
    np.testing.assert_array_equal(found.motion.permutation, np.arange(D))
    assert found.correlation[2] == 0


def test_the_spec_of_a_table_moves_the_last_axis_of_every_part():
    family = CASES["nfe_k"]
    spec = coordinate_spec(family.init(jax.random.key(0), E, 3, 1.0))
    assert [(leaf.name, len(leaf.axes)) for leaf in spec.leaves if leaf.name == "entity/slopes"] == [
        ("entity/slopes", 3)
    ]
    assert [(group.name, group.size) for group in spec.groups] == [("coordinate", D)]


def test_what_is_no_symmetry_is_refused():
    for name in ("complex", "rotate", "quate"):
        family = FAMILIES[name](D)
        params = family.init(jax.random.key(0), 4, 3, 1.0)
        with pytest.raises(ValueError, match="more symmetries than order and sign"):
            align_coordinates(family, params, params)
    for name, motion, message in (
        ("distmult", Motion(np.arange(D), np.ones(D), np.ones(D)), "shift of 0"),
        ("nfe_1_sigma", Motion(np.arange(D), -np.ones(D), np.zeros(D)), "signs of 1"),
    ):
        params = CASES[name].init(jax.random.key(0), 4, 3, 1.0)
        with pytest.raises(ValueError, match=message):
            move(CASES[name], params, motion)


def test_tables_of_unlike_sizes_are_refused():
    family = CASES["nfe_1"]
    one, two = (family.init(jax.random.key(0), entities, 3, 1.0) for entities in (4, 5))
    with pytest.raises(ValueError, match="entity/mean"):
        align_coordinates(family, one, two)
