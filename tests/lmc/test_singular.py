"""Singular vectors: laws of the metric R, theorem 4.1, spectra under permutation, floors."""

import numpy as np
import pytest
from scipy.linalg import polar
from scipy.stats import ortho_group

from permjax.action import permute
from permjax.lmc.singular import (
    GAMMAS,
    aligned_fraction,
    analyse,
    double_singular_sum,
    r_metric,
    spectra,
    spectral_floor,
)
from permjax.symmetry.spec import PermutationSpec

pytestmark = pytest.mark.fast

AXES = {"in": (None, "h"), "bias": ("h",), "conv": (None, None, "h", "c"), "out": ("c", None)}
SIZES = {"h": 12, "c": 15}
SHAPES = {
    name: tuple(SIZES.get(g, 3 if name == "conv" else 9) for g in axes)  # pyright: ignore[reportArgumentType]
    for name, axes in AXES.items()
}
SPEC = PermutationSpec.from_axes(SHAPES, AXES)


def model(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def single(**matrices: np.ndarray) -> PermutationSpec:
    """A spec of fixed matrices."""
    return PermutationSpec.from_axes({name: w.shape for name, w in matrices.items()}, {})


A, B = model(0), model(1)


@pytest.fixture
def shuffled(draw_permutations):
    return permute(SPEC, draw_permutations(SPEC, 3), B)


# theorem 4.1


@pytest.mark.parametrize("seed", range(5))
def test_the_double_singular_sum_is_the_matching_objective_before_and_after_a_permutation(draw_permutations, seed):
    moved = permute(SPEC, draw_permutations(SPEC, seed), model(seed))
    for b in (model(seed), moved):
        objective = sum((A[name] * b[name]).sum() for name in ("in", "conv", "out"))
        np.testing.assert_allclose(double_singular_sum(SPEC, A, b), objective, rtol=1e-10)


# the metric R


def test_r_of_a_model_with_itself_is_one_at_every_threshold():
    found = r_metric(SPEC, A, A)
    np.testing.assert_allclose(found.total, 1)
    np.testing.assert_allclose([*found.leaves.values()], 1)


def test_r_at_threshold_zero_is_the_mean_inner_product_of_the_polar_factors():
    w = {name: {"a": A[name].reshape(-1, n), "b": B[name].reshape(-1, n)} for name, n in (("in", 12), ("out", 9))}
    w["conv"] = {"a": A["conv"].reshape(-1, 15), "b": B["conv"].reshape(-1, 15)}
    products = {name: (polar(pair["a"])[0] * polar(pair["b"])[0]).sum() for name, pair in w.items()}
    counts = {name: min(pair["a"].shape) for name, pair in w.items()}
    found = r_metric(SPEC, A, B)
    np.testing.assert_allclose(found.total[0], sum(products.values()) / sum(counts.values()), rtol=1e-10)
    np.testing.assert_allclose([found.leaves[n][0] for n in w], [products[n] / counts[n] for n in w], rtol=1e-10)


def test_r_follows_its_definition_at_every_threshold():
    x, y = A["in"], B["in"]
    (ua, sa, va), (ub, sb, vb) = np.linalg.svd(x, full_matrices=False), np.linalg.svd(y, full_matrices=False)
    for gamma in GAMMAS:
        terms = [
            (ua[:, i] @ ub[:, j]) * (va[i] @ vb[j])
            for i in range(9)
            for j in range(9)
            if sa[i] >= gamma * sa[0] and sb[j] >= gamma * sb[0]
        ]
        kept = min((sa >= gamma * sa[0]).sum(), (sb >= gamma * sb[0]).sum())
        np.testing.assert_allclose(r_metric(SPEC, A, B, [gamma], "in").total, sum(terms) / kept, rtol=1e-9)


def test_r_never_exceeds_one_at_threshold_zero_and_is_symmetric():
    for seed in range(10):
        one, other = r_metric(SPEC, A, model(seed)), r_metric(SPEC, model(seed), A)
        assert abs(one.total[0]) <= 1 + 1e-12
        np.testing.assert_allclose(one.total, other.total, atol=1e-12)


def test_r_stays_where_both_models_are_permuted_alike_and_spectra_stay_at_all(draw_permutations):
    p = draw_permutations(SPEC, 5)
    moved = permute(SPEC, p, A), permute(SPEC, p, B)
    np.testing.assert_allclose(r_metric(SPEC, *moved).total, r_metric(SPEC, A, B).total, atol=1e-10)
    for name, values in spectra(SPEC, moved[0]).items():
        np.testing.assert_allclose(values, spectra(SPEC, A)[name], rtol=1e-10)


def test_r_of_a_planted_pair_is_restored_by_the_inverse_and_lost_without_it(draw_permutations):
    wide = PermutationSpec.from_axes({"in": (60, 80), "out": (80, 60)}, {"in": (None, "h"), "out": ("h", None)})
    a = {leaf.name: np.random.default_rng(0).standard_normal(leaf.shape) for leaf in wide.leaves}
    b = permute(wide, draw_permutations(wide, 1), a)
    assert np.abs(r_metric(wide, a, b).total[0]) < 0.1
    back = {"h": np.argsort(draw_permutations(wide, 1)["h"])}
    np.testing.assert_allclose(r_metric(wide, a, permute(wide, back, b)).total, 1)


def test_how_a_kernel_is_stored_does_not_matter():
    turned = {"w": A["in"].T.copy()}, {"w": B["in"].T.copy()}
    found = r_metric(single(w=turned[0]["w"]), *turned)
    np.testing.assert_allclose(found.total, r_metric(SPEC, A, B, leaves="in").total, rtol=1e-10)


def test_vectors_of_zero_singular_values_and_zero_matrices_do_not_count():
    low = A["in"][:, :4] @ A["out"][:4]
    spec = single(low=low, zero=np.zeros((5, 6)))
    found = r_metric(spec, {"low": low, "zero": np.zeros((5, 6))}, {"low": 3 * low, "zero": np.zeros((5, 6))})
    assert found.kept["low"][0] == 4
    assert found.kept["zero"][0] == 0
    np.testing.assert_allclose(found.total, 1)
    assert np.isnan(found.leaves["zero"]).all()
    nothing = r_metric(single(w=low), {"w": 0 * low}, {"w": low})
    assert np.isnan(nothing.total).all()


def test_the_smaller_number_of_kept_vectors_normalises():
    flat, steep = np.eye(4), np.diag([1.0, 0.4, 0.4, 0.1])
    found = r_metric(single(w=flat), {"w": flat}, {"w": steep}, [0.0, 0.3, 0.5])
    np.testing.assert_array_equal(found.kept["w"], [4, 3, 1])
    np.testing.assert_allclose(found.total, 1)


# normalised objective and floor


def test_orthogonal_maps_cannot_raise_the_aligned_fraction_above_one_and_turning_back_reaches_it():
    q, p = (ortho_group.rvs(n, random_state=n) for n in (9, 12))
    turned = {**A, "in": q @ A["in"] @ p}
    assert abs(aligned_fraction(SPEC, A, turned, "in").total) < 0.5
    np.testing.assert_allclose(aligned_fraction(SPEC, A, A).total, 1)
    np.testing.assert_allclose(aligned_fraction(SPEC, A, {n: -w for n, w in A.items()}).total, -1)
    assert all(-1 <= value <= 1 for value in aligned_fraction(SPEC, A, B).leaves.values())


def test_no_orthogonal_map_brings_a_matrix_nearer_than_its_floor():
    found = spectral_floor(SPEC, A, B, "in")
    np.testing.assert_allclose(found.squared_distance["in"], ((A["in"] - B["in"]) ** 2).sum())
    (ua, _, va), (ub, _, vb) = (np.linalg.svd(x["in"]) for x in (A, B))
    best = ua @ ub.T @ B["in"] @ vb.T @ va
    np.testing.assert_allclose(((A["in"] - best) ** 2).sum(), found.floor["in"], rtol=1e-10)
    for seed in range(5):
        q, p = (ortho_group.rvs(n, random_state=seed) for n in (9, 12))
        assert ((A["in"] - q @ B["in"] @ p) ** 2).sum() > found.floor["in"]


def test_a_permutation_leaves_the_floor(shuffled):
    before, after = (spectral_floor(SPEC, A, b) for b in (B, shuffled))
    np.testing.assert_allclose([*before.floor.values()], [*after.floor.values()], rtol=1e-10)
    assert before.squared_distance != after.squared_distance


# all at once


def test_an_analysis_says_what_its_parts_say(shuffled):
    mean = {name: (A[name] + shuffled[name]) / 2 for name in A}
    found = analyse(SPEC, A, {"naive": B, "merged": mean}, gammas=[0.0, 0.3])
    np.testing.assert_array_equal(found["merged"].r.total, r_metric(SPEC, A, mean, [0.0, 0.3]).total)
    assert found["naive"].aligned == aligned_fraction(SPEC, A, B)
    assert found["naive"].distance == spectral_floor(SPEC, A, B)
    np.testing.assert_allclose(sum(found["naive"].objective.values()), double_singular_sum(SPEC, A, B))
    np.testing.assert_array_equal(found["naive"].spectrum["in"], np.linalg.svd(B["in"].T)[1])
    assert found["merged"].r.total[0] > found["naive"].r.total[0] + 0.2


def test_single_precision_is_enough_for_r():
    a, b = ({name: w.astype(np.float32) for name, w in m.items()} for m in (A, B))
    np.testing.assert_allclose(r_metric(SPEC, a, b).total, r_metric(SPEC, A, B).total, atol=1e-4)


def test_models_that_differ_and_thresholds_out_of_range_are_refused():
    with pytest.raises(ValueError, match="Leaf 'in' has shape"):
        r_metric(SPEC, A, {**B, "in": B["in"][:3]})
    with pytest.raises(ValueError, match=r"from 0 to 1; gammas are \[1.5\]"):
        r_metric(SPEC, A, B, [1.5])
