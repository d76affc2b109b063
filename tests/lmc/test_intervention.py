"""Interventions on singular directions: they add up, commute with permutations, and end where they should."""

import jax
import numpy as np
import pytest

from permjax.action import permute
from permjax.lmc.intervention import intervene, truncate
from permjax.lmc.singular import spectra
from permjax.match.weights import weight_matching
from permjax.symmetry.spec import PermutationSpec

pytestmark = pytest.mark.fast

AXES = {"in": (None, "h"), "bias": ("h",), "out": ("h", None)}
SPEC = PermutationSpec.from_axes({"in": (7, 10), "bias": (10,), "out": (10, 6)}, AXES)


@pytest.fixture
def b(draw_params):
    return {name: w.astype(np.float64) for name, w in draw_params(SPEC, 1).items()}


@pytest.fixture
def shuffle(draw_permutations):
    return draw_permutations(SPEC, 2)


def near(found, wanted, atol=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), found, wanted)


def test_the_two_parts_of_a_model_add_up_and_share_no_direction(b):
    top, rest = truncate(SPEC, b, 2)
    near({n: top[n] + rest[n] for n in ("in", "out")}, {n: b[n] for n in ("in", "out")})
    assert top["bias"] is rest["bias"] is b["bias"]
    whole = spectra(SPEC, b)
    for name, values in spectra(SPEC, top).items():
        np.testing.assert_allclose(values, np.where(np.arange(len(values)) < 2, whole[name], 0), atol=1e-12)
        np.testing.assert_allclose(spectra(SPEC, rest)[name][:-2], whole[name][2:], atol=1e-12)


def test_cutting_commutes_with_permuting(b, shuffle):
    near(truncate(SPEC, permute(SPEC, shuffle, b), 3).top, permute(SPEC, shuffle, truncate(SPEC, b, 3).top))


def test_a_permutation_can_be_found_from_the_top_directions_alone(b, shuffle):
    tops = [truncate(SPEC, model, 3).top for model in (b, permute(SPEC, shuffle, b))]
    found = weight_matching(SPEC, tops, key=jax.random.key(0)).plan.permutations(1)
    np.testing.assert_array_equal(np.asarray(shuffle["h"])[np.asarray(found["h"])], np.arange(10))


def test_mixing_nothing_and_mixing_everything_are_the_model_and_its_permuted_copy(b, shuffle):
    aligned = permute(SPEC, shuffle, b)
    own = {**b, "bias": aligned["bias"]}
    nothing, everything = intervene(SPEC, b, aligned, 0), intervene(SPEC, b, aligned, 99)
    near([nothing.top, nothing.rest], [own, aligned])
    near([everything.top, everything.rest], [aligned, own])


def test_a_mixture_is_the_sum_of_an_aligned_and_an_unaligned_part(b, shuffle):
    aligned = permute(SPEC, shuffle, b)
    top, rest = intervene(SPEC, b, aligned, 2)
    (a_top, a_rest), (b_top, b_rest) = (truncate(SPEC, model, 2) for model in (aligned, b))
    near([top[n] for n in ("in", "out")], [a_top[n] + b_rest[n] for n in ("in", "out")])
    near([rest[n] for n in ("in", "out")], [b_top[n] + a_rest[n] for n in ("in", "out")])
    near([top["bias"], rest["bias"]], [aligned["bias"]] * 2)


def test_only_the_chosen_leaves_are_cut_or_mixed(b, shuffle):
    aligned = permute(SPEC, shuffle, b)
    assert truncate(SPEC, b, 1, "in").top["out"] is b["out"]
    assert intervene(SPEC, b, aligned, 1, "in").top["out"] is aligned["out"]


def test_a_negative_number_of_directions_and_models_that_differ_are_refused(b):
    with pytest.raises(ValueError, match="cannot be -1"):
        truncate(SPEC, b, -1)
    with pytest.raises(ValueError, match="Leaf 'in' has shape"):
        intervene(SPEC, b, {**b, "in": b["in"][:2]}, 1)
