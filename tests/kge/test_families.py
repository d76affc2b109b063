"""Families of embeddings: group laws, actions, and similarities against the definitions of the papers."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from permjax.kge.flows import Nfe1, Nfe2, Nfe3, NfeK, gram
from permjax.kge.models import FAMILIES, against_all, moved, score, score_all
from permjax.kge.vectors import Affine, Complex, Distmult, Rotate, Transe

pytestmark = pytest.mark.fast

D = 6
CASES = {name: cls(dimension=D) for name, cls in FAMILIES.items()} | {
    "nfe_2_exact": Nfe2(D, mode="exact"),
    "nfe_3_exact": Nfe3(D, mode="exact"),
    "nfe_5_published": NfeK(D, pieces=5, mode="published"),
    "nfe_3_uniform": NfeK(D, pieces=3, base="uniform"),
}
LIFTED = [name for name in CASES if not name.startswith(("nfe_2", "nfe_k", "nfe_5", "nfe_3_uniform"))]


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@cache
def rows(family, seed):
    return family.init(jax.random.key(seed), 7, 5, 1.0)


def drawn(family, seed=0):
    params = {table: {**parts} for table, parts in rows(family, seed).items()}
    elements = family.relation(params["relation"])
    return params, elements, family.entity(params["entity"])


def close(x, y, tolerance=1e-9):
    for part in {**x} | {**y}:
        np.testing.assert_allclose(x[part], y[part], rtol=tolerance, atol=tolerance)


def at(tree, i):
    return {part: values[i : i + 1] for part, values in tree.items()}


# groups


@pytest.mark.parametrize("name", CASES)
def test_relations_form_a_group(name):
    family = CASES[name]
    _, g, _ = drawn(family)
    a, b, c = at(g, 0), at(g, 1), at(g, 2)
    close(family.compose(a, family.compose(b, c)), family.compose(family.compose(a, b), c))
    one = family.identity(a)
    close(family.compose(one, a), a)
    close(family.compose(a, one), a)
    close(family.compose(a, family.inverse(a)), one)
    close(family.compose(family.inverse(a), a), one)


@pytest.mark.parametrize("name", CASES)
def test_relations_act_on_entities(name):
    family = CASES[name]
    _, g, x = drawn(family)
    a, b, h = at(g, 0), at(g, 1), at(x, 3)
    close(family.act(family.compose(a, b), h), family.act(a, family.act(b, h)))
    close(family.act(family.identity(a), h), h)
    close(family.act(family.inverse(a), family.act(a, h)), h)


@pytest.mark.parametrize("name", CASES)
def test_only_affine_maps_and_quaternions_do_not_commute(name):
    family = CASES[name]
    _, g, x = drawn(family)
    a, b, h = at(g, 0), at(g, 1), at(x, 0)
    one, other = family.act(family.compose(a, b), h), family.act(family.compose(b, a), h)
    difference = max(float(jnp.abs(one[part] - other[part]).max()) for part in one)
    commutes = name in ("nfe_1_mu", "nfe_1_sigma", "transe", "distmult", "complex", "rotate")
    assert (difference < 1e-12) == commutes


@pytest.mark.parametrize("name", LIFTED)
def test_entities_are_elements_that_move_one_reference(name):
    family = CASES[name]
    _, g, x = drawn(family)
    close(family.act(family.lift(x), family.reference(x)), x)
    composed = family.compose(at(g, 1), family.lift(at(x, 2)))
    close(family.act(composed, family.reference(at(x, 2))), family.act(at(g, 1), at(x, 2)))


def test_flows_of_two_pieces_are_not_elements_of_the_group_of_relations():
    family = CASES["nfe_2"]
    _, _, x = drawn(family)
    with pytest.raises(ValueError, match="Nfe2 are not elements"):
        family.reference(x)


@pytest.mark.parametrize("name", ["distmult", "complex", "affine", "nfe_1"])
def test_an_element_with_a_coordinate_zero_has_no_inverse(name):
    family = CASES[name]
    _, g, _ = drawn(family)
    zero = {part: values.at[..., 0].set(0.0) for part, values in g.items()}
    with pytest.raises(ValueError, match="no bijection"):
        family.inverse(zero)


# similarities


@partial(jax.jit, static_argnums=0)
def three_ways(family, params, heads, relations, triples):
    """Scores of heads with all entities, the same from moved heads, and scores by definition."""
    everyone = against_all(family, params, moved(family, params, heads, relations))
    return score_all(family, params, heads, relations), everyone, score(family, params, triples)


@pytest.mark.parametrize("name", CASES)
def test_the_similarity_is_one_product_and_two_biases(name):
    family = CASES[name]
    params, _, _ = drawn(family)
    triples = jnp.array([[h, r, t] for h, r in ((0, 4), (3, 0), (6, 2)) for t in range(7)])
    found, everyone, by_definition = three_ways(family, params, jnp.array([0, 3, 6]), jnp.array([4, 0, 2]), triples)
    np.testing.assert_allclose(found, by_definition.reshape(3, 7), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found, everyone)


def test_nfe_1_has_the_published_formula():
    family = CASES["nfe_1"]
    params, _, _ = drawn(family)
    m, s = params["entity"]["mean"], params["entity"]["slopes"][:, 0]
    scale, shift = params["relation"]["scale"][1], params["relation"]["shift"][1]
    wanted = -((scale * m[2] + shift - m[4]) ** 2 + (abs(scale * s[2]) - abs(s[4])) ** 2).sum()
    np.testing.assert_allclose(score(family, params, jnp.array([[2, 1, 4]]))[0], wanted, rtol=1e-12)


@pytest.mark.parametrize(("base", "c"), [("normal", np.sqrt(2 / np.pi)), ("uniform", np.sqrt(3) / 2)])
def test_nfe_2_has_the_published_formula(base, c):
    family = Nfe2(D, base=base)
    params, _, _ = drawn(family)
    m, s = np.asarray(params["entity"]["mean"]), abs(np.asarray(params["entity"]["slopes"]))
    scale, shift = (np.asarray(params["relation"][part][3]) for part in ("scale", "shift"))
    dm, (d1, d2) = scale * m[2] + shift - m[4], abs(scale) * s[2] - s[4]
    wanted = -(dm**2 + (d1**2 + d2**2) / 2 + c * dm * (d2 - d1)).sum()
    np.testing.assert_allclose(score(family, params, jnp.array([[2, 3, 4]]))[0], wanted, rtol=1e-10)


@pytest.mark.parametrize("name", ["nfe_1", "nfe_2_exact", "nfe_k", "nfe_3_uniform"])
def test_the_similarity_of_flows_is_the_squared_wasserstein_distance(name):
    """Quadrature over quantiles of what the flows really are; a negative scale turns a law around."""
    family = CASES[name]
    params, _, x = drawn(family, seed=1)
    k = int(np.argmin(params["relation"]["scale"][0]))
    element = {part: values[:1, k : k + 1] for part, values in params["relation"].items()}
    head, tail = ({part: values[i : i + 1, ..., k : k + 1] for part, values in x.items()} for i in (1, 5))
    scale, shift = float(element["scale"][0, 0]), float(element["shift"][0, 0])
    assert scale < 0
    shares = (np.arange(4000) + 0.5)[:, None] / 4000
    law = stats.norm() if family.base == "normal" else stats.uniform(-np.sqrt(3), 2 * np.sqrt(3))
    low, high = (law.ppf(some) for some in (1 - shares, shares))
    pairs = ((head, low), (tail, high))
    values = [family.flow({part: v[0] for part, v in one.items()}, jnp.asarray(z)) for one, z in pairs]
    wanted = np.mean((scale * np.asarray(values[0]) + shift - np.asarray(values[1])) ** 2)
    np.testing.assert_allclose(-family.similarity(family.act(element, head), tail)[0], wanted, rtol=5e-3)


def test_the_published_form_ignores_that_a_negative_scale_turns_a_law_around():
    params, _, _ = drawn(Nfe2(D))
    params["relation"]["scale"] = jnp.full((5, D), -0.7)
    triples = jnp.array([[0, 0, 1]])
    published, exact = (score(Nfe2(D, mode=mode), params, triples)[0] for mode in ("published", "exact"))
    assert abs(published - exact) > 1e-3
    params["relation"]["scale"] = jnp.full((5, D), 0.7)
    np.testing.assert_allclose(*(score(Nfe2(D, mode=mode), params, triples) for mode in ("published", "exact")))


def test_the_similarity_of_nfe_3_is_the_negative_divergence_of_normal_laws():
    family = CASES["nfe_3_exact"]
    params, _, x = drawn(family)
    head = {part: np.asarray(v)[0] for part, v in moved(family, params, jnp.array([2]), jnp.array([1])).items()}
    tail = {part: np.asarray(v[4]) for part, v in x.items()}
    samples = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)[:, None] * head["deviation"] + head["mean"]
    logs = [stats.norm.logpdf(samples, one["mean"], one["deviation"]).sum(axis=1) for one in (head, tail)]
    np.testing.assert_allclose(-score(family, params, jnp.array([[2, 1, 4]]))[0], np.mean(logs[0] - logs[1]), rtol=1e-3)


def test_flows_of_one_piece_and_of_two_are_nfe_1_and_nfe_2():
    for pieces, named in ((1, Nfe1(D)), (2, Nfe2(D, mode="exact"))):
        general = NfeK(D, pieces=pieces)
        params, _, _ = drawn(named)
        triples = jnp.array([[0, 1, 2], [3, 4, 5]])
        np.testing.assert_allclose(score(general, params, triples), score(named, params, triples), rtol=1e-12)


def test_more_pieces_with_equal_slopes_are_fewer_pieces():
    params, _, _ = drawn(Nfe1(D))
    more = {**params, "entity": {**params["entity"], "slopes": jnp.repeat(params["entity"]["slopes"], 4, axis=1)}}
    triples = jnp.array([[0, 1, 2], [3, 4, 5]])
    np.testing.assert_allclose(score(NfeK(D), more, triples), score(Nfe1(D), params, triples), rtol=1e-9)


def test_the_moments_of_the_basis_are_those_of_the_notes():
    a = 1 / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(gram(2), [[1, -a, a], [-a, 0.5, 0], [a, 0, 0.5]], atol=1e-10)
    np.testing.assert_allclose(gram(1, "uniform"), np.eye(2), atol=1e-10)


@pytest.mark.parametrize("name", ["nfe_1", "nfe_2", "nfe_k", "nfe_3", "nfe_3_uniform"])
def test_the_deviation_is_that_of_the_law(name):
    family = CASES[name]
    _, _, x = drawn(family)
    if name == "nfe_3":
        return np.testing.assert_array_equal(family.deviation(x), x["deviation"])
    law = stats.norm() if family.base == "normal" else stats.uniform(-np.sqrt(3), 2 * np.sqrt(3))
    z = law.ppf((np.arange(40_000) + 0.5) / 40_000)
    one = {part: values[3] for part, values in x.items()}
    values = np.asarray(family.flow(one, jnp.asarray(np.repeat(z[:, None], D, axis=1))))
    return np.testing.assert_allclose(family.deviation(x)[3], values.std(axis=0), rtol=2e-3)


def test_points_have_no_deviation():
    family = CASES["complex"]
    assert family.deviation(drawn(family)[2]) is None


# special cases


def test_unit_scales_make_nfe_1_squared_transe():
    params, _, _ = drawn(Nfe1(D))
    params["entity"]["slopes"] = jnp.ones_like(params["entity"]["slopes"])
    params["relation"]["scale"] = jnp.ones_like(params["relation"]["scale"])
    plain = {"entity": {"mean": params["entity"]["mean"]}, "relation": {"shift": params["relation"]["shift"]}}
    triples = jnp.array([[0, 1, 2], [3, 4, 5]])
    np.testing.assert_allclose(score(Nfe1(D), params, triples), score(Transe(D), plain, triples), rtol=1e-12)


def test_zero_means_make_nfe_1_the_sigma_model():
    params, _, _ = drawn(Nfe1(D))
    params["entity"]["mean"] = jnp.zeros_like(params["entity"]["mean"])
    params["relation"]["shift"] = jnp.zeros_like(params["relation"]["shift"])
    scales = {"entity": params["entity"]["slopes"][:, 0], "relation": params["relation"]["scale"]}
    sigma = {table: {"scale": values} for table, values in scales.items()}
    triples = jnp.array([[0, 1, 2], [3, 4, 5]])
    found = score(CASES["nfe_1_sigma"], sigma, triples)
    np.testing.assert_allclose(score(Nfe1(D), params, triples), found, rtol=1e-12)


def test_equal_deviations_that_relations_keep_make_nfe_1_the_affine_model():
    params, _, _ = drawn(Nfe1(D))
    params["entity"]["slopes"] = jnp.zeros_like(params["entity"]["slopes"])
    plain = {"entity": {"mean": params["entity"]["mean"]}, "relation": params["relation"]}
    triples = jnp.array([[0, 1, 2], [3, 4, 5]])
    np.testing.assert_allclose(score(Nfe1(D), params, triples), score(Affine(D), plain, triples), rtol=1e-12)


def test_the_images_of_one_give_the_scores_of_distmult_and_complex():
    for family in (Distmult(D), Complex(D)):
        params, g, x = drawn(family)
        one = family.reference(at(x, 0))
        composed = family.compose(at(g, 1), family.lift(at(x, 2)))
        found = family.similarity(family.act(composed, one), family.act(family.lift(at(x, 4)), one))
        np.testing.assert_allclose(found, score(family, params, jnp.array([[2, 1, 4]])), rtol=1e-12)
    e, r = params["entity"], params["relation"]
    h, w, t = (one["real"][i] + 1j * one["imag"][i] for one, i in ((e, 2), (r, 1), (e, 4)))
    np.testing.assert_allclose(found[0], (h * w * t.conj()).sum().real, rtol=1e-12)


def test_rotate_turns_numbers_by_phases():
    params, _, _ = drawn(Rotate(D))
    h, t = (params["entity"]["real"][i] + 1j * params["entity"]["imag"][i] for i in (2, 4))
    wanted = -(abs(h * jnp.exp(1j * params["relation"]["phase"][1]) - t) ** 2).sum()
    np.testing.assert_allclose(score(Rotate(D), params, jnp.array([[2, 1, 4]]))[0], wanted, rtol=1e-12)


# symmetries of the scores of NFE-1: signed permutations of coordinates, signs of deviations, shifts


def test_signed_permutations_and_shifts_of_coordinates_leave_the_scores_of_nfe_1():
    family, rng = Nfe1(D), np.random.default_rng(0)
    params, _, _ = drawn(family)
    order, sign = rng.permutation(D), rng.choice([-1.0, 1.0], D)
    flips = rng.choice([-1.0, 1.0], (7, 1, D))
    shift = rng.normal(size=D)
    e, r = jax.tree.map(np.asarray, (params["entity"], params["relation"]))
    other = {
        "entity": {"mean": sign * e["mean"][:, order] + shift, "slopes": flips * e["slopes"][:, :, order]},
        "relation": {
            "scale": r["scale"][:, order],
            "shift": sign * r["shift"][:, order] + shift * (1 - r["scale"][:, order]),
        },
    }
    other = jax.tree.map(jnp.asarray, other)
    heads, relations = jnp.arange(7), jnp.arange(7) % 5
    one, two = (score_all(family, some, heads, relations) for some in (params, other))
    np.testing.assert_allclose(one, two, rtol=1e-10, atol=1e-10)


# a limit: on a directed cycle


@pytest.mark.parametrize("name", CASES)
def test_affine_relations_cannot_rank_all_edges_of_a_directed_cycle_first(name):
    """Where f(h, t) - f(t, h) sums to 0 around every cycle, no parameters turn all edges of one the same way."""
    family = CASES[name]
    params, _, _ = drawn(family, seed=3)
    scores = np.asarray(score_all(family, params, jnp.arange(7), jnp.full(7, 2)))
    turn = scores - scores.T
    can = name in ("nfe_2", "nfe_3", "nfe_3_exact", "nfe_5_published", "complex", "rotate", "quate")
    assert (abs(turn[0, 1] + turn[1, 4] + turn[4, 0]) > 1e-9) == can


# what goes in


def test_a_family_without_coordinates_or_pieces_is_refused():
    with pytest.raises(ValueError, match="at least one coordinate"):
        Nfe1(0)
    with pytest.raises(ValueError, match="at least one piece"):
        NfeK(pieces=0)


def test_rows_are_drawn_within_the_bound():
    params = CASES["nfe_k"].init(jax.random.key(0), 50, 4, 0.3)
    assert params["entity"]["slopes"].shape == (50, 4, D)
    leaves = jax.tree.leaves(params)
    assert all(float(abs(leaf).max()) <= 0.3 for leaf in leaves)
    assert float(jnp.std(params["entity"]["mean"])) == pytest.approx(0.3 / np.sqrt(3), rel=0.1)
