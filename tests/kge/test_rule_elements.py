"""Section by section the rules that are identities of elements, in float64, and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.kge.models import FAMILIES
from permjax.kge.rule_elements import as_row, involution

pytestmark = pytest.mark.fast

N, D = 6, 8
OPTIONS = {"nfe_2 exact": {"mode": "exact"}, "nfe_k": {"pieces": 3}, "nfe_3 exact": {"mode": "exact"}}
TURNING = ["affine", "nfe_1", "nfe_2", "nfe_2 exact", "nfe_k", "nfe_3", "distmult", "complex", "rotate", "quate"]


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def make(name):
    return FAMILIES[name.split()[0]](dimension=D, **OPTIONS.get(name, {}))


def draw(family, seed=0):
    """Elements, heads and tails."""
    params = jax.tree.map(lambda x: x.astype(jnp.float64), family.init(jax.random.key(seed), 2 * N, 3 * N, bound=1.0))
    points = family.entity(params["entity"])
    elements = family.relation(params["relation"])
    parts = [{k: v[i * N : (i + 1) * N] for k, v in elements.items()} for i in range(3)]
    return parts, {k: v[:N] for k, v in points.items()}, {k: v[N:] for k, v in points.items()}


def close(a, b, tolerance=1e-9):
    assert a.keys() == b.keys()
    for part in a:
        np.testing.assert_allclose(a[part], b[part], atol=tolerance)


@pytest.mark.parametrize("name", TURNING)
def test_an_involution_undoes_itself_and_moves_something(name):
    family = make(name)
    (g, _, _), h, _ = draw(family)
    turn = involution(family, g)
    close(family.compose(turn, turn), family.identity(turn))
    close(family.act(turn, family.act(turn, h)), dict(h))
    assert np.abs(np.asarray(family.similarity(h, h) - family.similarity(family.act(turn, h), h))).min() > 1e-3


@pytest.mark.parametrize("name", [name for name in TURNING if name not in ("nfe_2", "nfe_3")])
def test_an_involution_scores_heads_and_tails_alike(name):
    """symmetry: f(h, r, t) = f(t, r, h) for all h and t."""
    family = make(name)
    (g, _, _), h, t = draw(family)
    turn = involution(family, g)
    there, back = family.similarity(family.act(turn, h), t), family.similarity(family.act(turn, t), h)
    np.testing.assert_allclose(there, back, atol=1e-9)


@pytest.mark.parametrize("name", ["nfe_2", "nfe_3"])
def test_published_two_piece_flows_and_divergences_are_symmetric_only_at_distance_zero(name):
    family = make(name)
    (g, _, _), h, t = draw(family)
    turn = involution(family, g)
    there, back = family.similarity(family.act(turn, h), t), family.similarity(family.act(turn, t), h)
    assert np.abs(there - back).min() > 1e-6
    t = family.act(turn, h)
    np.testing.assert_allclose(family.similarity(family.act(turn, h), t), 0, atol=1e-9)
    np.testing.assert_allclose(family.similarity(family.act(turn, t), h), 0, atol=1e-9)


@pytest.mark.parametrize("name", ["transe", "nfe_1_sigma", "nfe_3 exact"])
def test_groups_without_involutions_say_so(name):
    family = make(name)
    (g, _, _), _, _ = draw(family)
    with pytest.raises(ValueError, match=f"{type(family).__name__} that is its own inverse is the identity"):
        involution(family, g)


def test_a_translation_is_antisymmetric_by_four_times_its_square():
    """antisymmetry: s = 1, t = r(h): f(h, r, t) = 0 and f(t, r, h) = -sum (2 m)^2, without gamma."""
    family = make("nfe_1")
    (g, _, _), h, _ = draw(family)
    r = {**family.identity(g), "shift": g["shift"]}
    t = family.act(r, h)
    np.testing.assert_allclose(family.similarity(family.act(r, h), t), 0, atol=1e-9)
    back = family.similarity(family.act(r, t), h)
    np.testing.assert_allclose(back, -((2 * g["shift"]) ** 2).sum(axis=1), atol=1e-9)


@pytest.mark.parametrize("name", ["affine", "nfe_1"])
def test_the_inverse_scores_by_distances_over_squared_scales(name):
    """inverse: Dist(t, r^-1, h) = sum_k d_k(h, r, t) / s_k^2."""
    family = make(name)
    (g, _, _), h, t = draw(family)
    moved = family.coordinates(family.act(g, h)) - family.coordinates(t)
    scales = jnp.tile(g["scale"], (1, moved.shape[1] // D))
    back = family.similarity(family.act(family.inverse(g), t), h)
    np.testing.assert_allclose(back, -(moved**2 / scales**2).sum(axis=1), atol=1e-9)


@pytest.mark.parametrize("name", ["transe", "nfe_1", "nfe_2", "nfe_2 exact", "nfe_3", "rotate", "quate"])
def test_the_inverse_leads_back_from_where_a_relation_leads(name):
    family = make(name)
    (g, _, _), h, _ = draw(family)
    close(family.act(family.inverse(g), family.act(g, h)), dict(h))


@pytest.mark.parametrize("name", ["transe", "nfe_1", "nfe_2", "nfe_2 exact", "nfe_3", "complex", "quate"])
def test_a_composition_scores_like_its_steps(name):
    family = make(name)
    (p, q, _), h, t = draw(family)
    once, twice = family.act(family.compose(q, p), h), family.act(q, family.act(p, h))
    np.testing.assert_allclose(family.similarity(once, t), family.similarity(twice, t), atol=1e-9)


@pytest.mark.parametrize(("name", "abelian"), [("nfe_1", False), ("quate", False), ("rotate", True), ("transe", True)])
def test_the_order_of_a_composition_matters_where_the_group_is_not_commutative(name, abelian):
    family = make(name)
    (p, q, _), h, t = draw(family)
    one, other = (family.similarity(family.act(family.compose(*pair), h), t) for pair in ((q, p), (p, q)))
    assert np.allclose(one, other) == abelian


def test_chains_obey_the_triangle_inequality():
    """W2(q p h, t') <= max |s_q| W2(p h, t) + W2(q t, t')."""
    family = make("nfe_1")
    (p, q, _), h, t = draw(family)
    end = draw(family, seed=1)[2]

    def distance(x, y):
        return jnp.sqrt(-family.similarity(x, y))

    whole = distance(family.act(q, family.act(p, h)), end)
    bound = jnp.abs(q["scale"]).max(axis=1) * distance(family.act(p, h), t) + distance(family.act(q, t), end)
    assert (whole <= bound + 1e-9).all()


def test_no_bijection_implies_another_one():
    """hierarchy, intersection, exclusion: where p and r differ, p(h, t) at distance zero leaves r(h, t) farther."""
    family = make("nfe_1")
    (p, r, _), h, _ = draw(family)
    t = family.act(p, h)
    assert (family.similarity(family.act(p, h), t) > -1e-12).all()
    assert (family.similarity(family.act(r, h), t) < -1e-3).all()


@pytest.mark.parametrize("name", ["affine", "nfe_1", "nfe_1_sigma", "nfe_3 exact", "rotate", "quate", "complex"])
def test_compositions_and_inverses_have_a_row_of_the_table(name):
    family = make(name)
    (p, q, _), _, _ = draw(family)
    for element in (family.compose(q, p), family.inverse(p), family.identity(p)):
        close(family.relation(as_row(family, element)), element, 1e-6)


def test_an_element_without_a_row_is_refused():
    for name in ("nfe_3", "quate", "rotate"):
        family = make(name)
        (p, q, _), _, _ = draw(family)
        element = family.compose(q, p) if name == "nfe_3" else {part: 2 * values for part, values in p.items()}
        with pytest.raises(ValueError, match="no row of the relation table"):
            as_row(family, element)
