"""Losses against their definitions in float64; what a batch holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from permjax.kge import losses
from permjax.kge.batches import Examples, examples, known_tails, most_tails, order
from permjax.kge.flows import Nfe1
from permjax.kge.models import score_all
from permjax.kge.step import KgeTraining, objective, programs
from permjax.kge.triples import Graph
from permjax.kge.vectors import Complex

pytestmark = pytest.mark.fast

B, E = 5, 7
DRAW = np.random.default_rng(0)
SCORES = 4 * DRAW.standard_normal((B, E))
TAILS = DRAW.integers(0, E, B)
WEIGHTS = DRAW.standard_normal(B)
TRIPLES = np.unique(np.stack([DRAW.integers(0, n, 30) for n in (E, 2, E)], axis=1).astype(np.int32), axis=0)
GRAPH = Graph("drawn", tuple("abcdefg"), ("r", "q"), TRIPLES, TRIPLES[:3], TRIPLES[3:6])


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def value_and_slopes(loss, scores, *targets):
    """The losses, and the gradient of their sum with `WEIGHTS`."""
    found = loss(jnp.asarray(scores), *targets)
    return found, jax.grad(lambda s: (jnp.asarray(WEIGHTS) * loss(s, *targets)).sum())(jnp.asarray(scores))


def binary(scores, truth):
    """Binary cross-entropy summed over entities, and its gradient."""
    chances = 1 / (1 + np.exp(-scores))
    return np.logaddexp(0, np.where(truth, -scores, scores)).sum(1), WEIGHTS[:, None] * (chances - truth)


def assert_same(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


def test_bce_all_is_the_binary_cross_entropy_of_one_true_tail():
    truth = np.arange(E) == TAILS[:, None]
    assert_same(value_and_slopes(losses.bce_all, SCORES, jnp.asarray(TAILS)), binary(SCORES, truth))


def test_a_tail_outside_the_table_is_none_of_its_entities():
    nowhere = jnp.full(B, -1)
    assert_same(value_and_slopes(losses.bce_all, SCORES, nowhere), binary(SCORES, np.zeros((B, E), bool)))


def test_ce_all_is_minus_the_log_softmax_of_the_tail_whatever_gamma():
    logs = log_softmax(SCORES, axis=1)
    slopes = WEIGHTS[:, None] * (np.exp(logs) - (np.arange(E) == TAILS[:, None]))
    expected = -logs[np.arange(B), TAILS], slopes
    assert_same(value_and_slopes(losses.ce_all, SCORES, jnp.asarray(TAILS)), expected)
    assert_same(value_and_slopes(losses.ce_all, SCORES + 9, jnp.asarray(TAILS)), expected)


def test_k_vs_all_has_one_for_every_known_tail():
    truth = DRAW.random((B, E)) < 0.4
    rows, tails = np.nonzero(truth)
    pairs = [jnp.asarray(np.append(x, [0, 0])) for x in (rows, tails, np.ones(len(rows)))]
    found = value_and_slopes(losses.k_vs_all, SCORES, pairs[0], pairs[1], pairs[2].astype(bool))
    assert_same(found, binary(SCORES, truth))


@pytest.mark.parametrize("loss", [losses.bce_all, losses.ce_all])
def test_huge_scores_have_finite_losses_and_slopes(loss):
    found = value_and_slopes(loss, 1e4 * SCORES, jnp.asarray(TAILS))
    assert all(np.isfinite(x).all() for x in found)


def test_negatives_that_are_every_entity_once_make_bce_all():
    orders = np.stack([DRAW.permutation(E) for _ in range(B)])
    drawn = jnp.asarray(np.take_along_axis(SCORES, orders, 1))
    positive = jnp.asarray(SCORES[np.arange(B), TAILS])
    found = losses.negatives(positive, drawn, jnp.asarray(orders == TAILS[:, None]), E)
    np.testing.assert_allclose(found, losses.bce_all(jnp.asarray(SCORES), jnp.asarray(TAILS)), rtol=1e-12)


def test_few_negatives_have_the_expectation_of_bce_all():
    few = KgeTraining(loss="negatives", gamma=1.0, batch_size=8, negatives=3, chunk=4)
    everyone = KgeTraining(gamma=1.0, batch_size=8)
    family, found = Nfe1(4), Examples(*map(jnp.asarray, examples(GRAPH, grouped=False)))
    params, ids = family.init(jax.random.key(0), E, 4, 1.0), jnp.array([0, 5, 3, 7, 1, 9, 2, -1])
    keys = jax.random.split(jax.random.key(1), 1000)
    values = jax.jit(jax.vmap(lambda key: objective(family, few, 0, params, found, ids, key)[0]))(keys)
    expected = objective(family, everyone, 0, params, found, ids, None)[0]
    assert abs(float(values.mean() - expected)) < 4 * float(values.std()) / np.sqrt(1000)
    assert float(values.std()) > 0.01


def test_n3_is_the_sum_of_cubes_of_moduli():
    numbers = DRAW.standard_normal((3, B, 4)) + 1j * DRAW.standard_normal((3, B, 4))
    found = losses.n3(*({"real": jnp.asarray(x.real), "imag": jnp.asarray(x.imag)} for x in numbers))
    np.testing.assert_allclose(found, (np.abs(numbers) ** 3).sum(axis=(0, 2)), rtol=1e-12)


def test_the_penalty_of_a_batch_is_the_mean_over_its_triples():
    family, found = Complex(4), Examples(*map(jnp.asarray, examples(GRAPH, grouped=False)))
    params, ids = family.init(jax.random.key(0), E, 4, 1.0), jnp.array([2, 6, -1])
    with_penalty, plain = (
        objective(family, KgeTraining(n3=weight), 0, params, found, ids, None) for weight in (0.5, 0.0)
    )
    triples = GRAPH.both_ways("train")[[2, 6]].T
    rows = [params["entity"], params["relation"], params["entity"]]
    chosen = [{part: x[ids] for part, x in table.items()} for table, ids in zip(rows, triples, strict=True)]
    penalty = sum(np.abs(row["real"] + 1j * row["imag"]) ** 3 for row in chosen).sum() / 2
    assert float(with_penalty[0] - plain[0]) == pytest.approx(0.5 * penalty, rel=1e-9)
    assert float(with_penalty[1]) == pytest.approx(float(plain[1]), rel=1e-12)


def test_the_coupled_bound_makes_first_scores_say_one_in_all():
    gamma, entities, family = 4.0, 300, Nfe1(256)
    bound = losses.coupled_bound(gamma, entities, 256)
    params = family.init(jax.random.key(0), entities, 40, bound)
    scores = gamma + score_all(family, params, jnp.arange(40), jnp.arange(40))
    assert float(scores.mean()) == pytest.approx(-np.log(entities), rel=0.05)


# batches


def test_an_epoch_meets_every_example_once_and_fills_up_with_none():
    batches = order(3, 1, 23, 5)
    assert batches.shape == (5, 5)
    assert sorted(batches.ravel()) == [-1, -1, *range(23)]
    assert (batches[-1, -2:] == -1).all()
    assert (order(3, 1, 23, 5) == batches).all()
    assert (order(3, 2, 23, 5) != batches).any()
    assert (order(4, 1, 23, 5) != batches).any()


def test_grouped_examples_are_the_known_tails_of_every_question():
    found, known = examples(GRAPH, grouped=True), {}
    for head, relation, tail in GRAPH.both_ways("train").tolist():
        known.setdefault((head, relation), set()).add(tail)
    assert sorted(known) == list(zip(found.heads.tolist(), found.relations.tolist(), strict=True))
    for i, (begin, end) in enumerate(zip(found.starts, found.starts[1:], strict=False)):
        assert sorted(known[int(found.heads[i]), int(found.relations[i])]) == sorted(found.tails[begin:end].tolist())


def test_known_tails_of_a_batch_are_those_of_its_questions():
    found = examples(GRAPH, grouped=True)
    ids, most = np.array([4, 0, 7, 2]), most_tails(found, 4)
    rows, tails, there = known_tails(
        Examples(*map(jnp.asarray, found)), jnp.asarray(ids), jnp.array([True, True, True, False]), most
    )
    assert len(rows) == most
    expected = {
        (row, int(tail)) for row in range(3) for tail in found.tails[slice(*found.starts[ids[row] : ids[row] + 2])]
    }
    pairs = list(zip(np.asarray(rows)[there].tolist(), np.asarray(tails)[there].tolist(), strict=True))
    assert len(pairs) == len(expected)
    assert set(pairs) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"loss": "negatives", "batch_size": 100}, "chunks of 32"),
        ({"loss": "k_vs_all", "n3": 0.1}, "set n3 to 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        KgeTraining(**settings)


def test_the_penalty_is_refused_where_nothing_is_multiplied():
    with pytest.raises(ValueError, match="not for Nfe1"):
        programs(Nfe1(4), KgeTraining(n3=0.1), E, 4, 0)
