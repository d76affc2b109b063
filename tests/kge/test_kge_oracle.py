"""Scores, losses, gradients and steps of training against NumPy in float64, written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.kge.batches import examples
from permjax.kge.flows import Nfe1, Nfe2, Nfe3
from permjax.kge.models import score_all
from permjax.kge.step import objective
from permjax.kge.train import KgeTraining, train_kge
from permjax.kge.triples import Graph
from permjax.kge.vectors import Distmult

E, R, D = 9, 2, 3
DRAW = np.random.default_rng(0)
TRIPLES = np.stack([DRAW.integers(0, n, 22) for n in (E, R, E)], axis=1).astype(np.int32)
GRAPH = Graph("drawn", tuple(map(str, range(E))), ("r", "q"), TRIPLES, TRIPLES[:4], TRIPLES[4:8])
BOTH = np.array([x for h, r, t in TRIPLES for x in ((h, r, t), (t, r + R, h))])
FAMILIES = {"nfe_1": Nfe1(D), "nfe_2": Nfe2(D), "nfe_2_exact": Nfe2(D, mode="exact"), "nfe_3": Nfe3(D)}
FAMILIES |= {"distmult": Distmult(D)}
C = np.sqrt(2 / np.pi)


def leaves(params):
    return [(table, part) for table in params for part in params[table]]


def softplus(x):
    return np.logaddexp(0, x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# Each oracle returns scores [b, E] without gamma and, given their gradient g [b, E], that of every table.


def nfe_1(entity, relation, h, r, g=None):
    m, s, a, b = entity["mean"], entity["slopes"][:, 0], relation["scale"][r], relation["shift"][r]
    u = (a * m[h] + b)[:, None] - m[None]
    v = (np.abs(a) * np.abs(s[h]))[:, None] - np.abs(s)[None]
    if g is None:
        return -(u**2 + v**2).sum(-1)
    du, dv = -2 * u * g[..., None], -2 * v * g[..., None]
    dm, ds = -du.sum(0), -dv.sum(0) * np.sign(s)
    du, dv = du.sum(1), dv.sum(1)
    np.add.at(dm, h, a * du)
    np.add.at(ds, h, np.abs(a) * np.sign(s[h]) * dv)
    return into({"mean": dm, "slopes": ds[:, None]}, relation, r, m[h] * du + np.sign(a) * np.abs(s[h]) * dv, du)


def nfe_2(entity, relation, h, r, g=None, exact=False):
    m, s, a, b = entity["mean"], entity["slopes"], relation["scale"][r], relation["shift"][r]
    turned = (a < 0) & exact  # the slopes of the head change places
    first, second = np.where(turned, s[h, 1], s[h, 0]), np.where(turned, s[h, 0], s[h, 1])
    u = (a * m[h] + b)[:, None] - m[None]
    v = np.abs(a * first)[:, None] - np.abs(s[:, 0])[None]
    w = np.abs(a * second)[:, None] - np.abs(s[:, 1])[None]
    if g is None:
        return -(u**2 + (v**2 + w**2) / 2 + C * u * (w - v)).sum(-1)
    g = g[..., None]
    du, dv, dw = -(2 * u + C * (w - v)) * g, -(v - C * u) * g, -(w + C * u) * g
    dm, ds = -du.sum(0), np.stack([-dv.sum(0), -dw.sum(0)], 1) * np.sign(s)
    du, dv, dw = du.sum(1), dv.sum(1), dw.sum(1)
    np.add.at(dm, h, a * du)
    of_first, of_second = np.abs(a) * np.sign(first) * dv, np.abs(a) * np.sign(second) * dw
    np.add.at(ds[:, 0], h, np.where(turned, of_second, of_first))
    np.add.at(ds[:, 1], h, np.where(turned, of_first, of_second))
    da = m[h] * du + np.sign(a) * (np.abs(first) * dv + np.abs(second) * dw)
    return into({"mean": dm, "slopes": ds}, relation, r, da, du)


def nfe_3(entity, relation, h, r, g=None):
    m, raw, a, b = entity["mean"], entity["deviation"], relation["scale"][r], relation["shift"][r]
    s = softplus(raw)
    u = (a * m[h] + b)[:, None] - m[None]
    x = (softplus(a) * s[h])[:, None]
    if g is None:
        return -(np.log(s[None] / x) + (x**2 + u**2) / (2 * s**2)[None] - 0.5).sum(-1)
    g = g[..., None]
    du, dx = -u / s[None] ** 2 * g, -(x / s[None] ** 2 - 1 / x) * g
    dm, ds = -du.sum(0), (-(1 / s[None] - (x**2 + u**2) / s[None] ** 3) * g).sum(0)
    du, dx = du.sum(1), dx.sum(1)
    np.add.at(dm, h, a * du)
    np.add.at(ds, h, softplus(a) * dx)
    return into({"mean": dm, "deviation": ds * sigmoid(raw)}, relation, r, m[h] * du + sigmoid(a) * s[h] * dx, du)


def distmult(entity, relation, h, r, g=None):
    x, a = entity["scale"], relation["scale"][r]
    if g is None:
        return (a * x[h]) @ x.T
    dx, dq = g.T @ (a * x[h]), g @ x
    np.add.at(dx, h, a * dq)
    return into({"scale": dx}, relation, r, x[h] * dq)


def into(entity, relation, r, *parts):
    """Sum the gradients of scales and shifts of a batch into the rows of their relations."""
    tables = {name: np.zeros_like(relation[name]) for name in ("scale", "shift")[: len(parts)]}
    for table, part in zip(tables.values(), parts, strict=True):
        np.add.at(table, r, part)
    return {"entity": entity, "relation": tables}


ORACLES = {"nfe_1": nfe_1, "nfe_2": nfe_2, "nfe_3": nfe_3, "distmult": distmult}
ORACLES |= {"nfe_2_exact": lambda *args: nfe_2(*args, exact=True)}


def loss(name, params, batch, gamma):
    """The mean over the batch of the sum over all entities of softplus((1 - 2 y) s)."""
    h, r, t = batch.T
    scores = gamma + ORACLES[name](params["entity"], params["relation"], h, r)
    return softplus(np.where(np.arange(E) == t[:, None], -scores, scores)).sum() / len(batch)


def gradient(name, params, batch, gamma):
    h, r, t = batch.T
    scores = gamma + ORACLES[name](params["entity"], params["relation"], h, r)
    slopes = (sigmoid(scores) - (np.arange(E) == t[:, None])) / len(batch)
    return ORACLES[name](params["entity"], params["relation"], h, r, slopes)


def adam(params, moments, slopes, count, rate):
    """A step of Adam with the usual constants, in place."""
    for table, part in leaves(params):
        g, (m, v) = slopes[table][part], moments.setdefault((table, part), [0.0, 0.0])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        moments[table, part] = [m, v]
        params[table][part] -= rate * (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)


def drawn(family, seed=0, bound=0.5):
    params = family.init(jax.random.fold_in(jax.random.key(seed), 0), E, 2 * R, bound)
    return params, {table: {part: np.array(x) for part, x in parts.items()} for table, parts in params.items()}


def assert_near(found, expected, **tolerance):
    for table in expected:
        assert set(found[table]) == set(expected[table])
        for part, x in expected[table].items():
            np.testing.assert_allclose(found[table][part], x, **tolerance, err_msg=f"{table} {part}")


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradients_written_by_hand_are_difference_quotients(name):
    _, params = drawn(FAMILIES[name])
    slopes = gradient(name, params, BOTH, 1.5)
    for table, part in leaves(params):
        for at in [(0,), (1,), (3,)]:
            index = (*at, *[0] * (params[table][part].ndim - 2), 1)
            middle, values = params[table][part][index], []
            for shift in (1e-6, -1e-6):
                params[table][part][index] = middle + shift
                values.append(loss(name, params, BOTH, 1.5))
            params[table][part][index] = middle
            assert slopes[table][part][index] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_score_loss_and_gradient_are_those_of_numpy(name):
    family, training = FAMILIES[name], KgeTraining(gamma=1.5, batch_size=len(BOTH))
    params, plain = drawn(family)
    heads, relations = BOTH[:, 0], BOTH[:, 1]
    expected = ORACLES[name](plain["entity"], plain["relation"], heads, relations)
    np.testing.assert_allclose(
        score_all(family, params, *map(jnp.asarray, (heads, relations))), expected, rtol=1e-9, atol=1e-9
    )
    found = examples(GRAPH, grouped=False)
    measure = jax.jit(jax.value_and_grad(lambda *args: objective(family, training, 0, *args, None), has_aux=True))
    (value, total), slopes = measure(params, type(found)(*map(jnp.asarray, found)), jnp.arange(len(BOTH)))
    assert float(value) == pytest.approx(loss(name, plain, BOTH, 1.5), rel=1e-9)
    assert float(total) == pytest.approx(len(BOTH) * float(value), rel=1e-9)
    assert_near(slopes, gradient(name, plain, BOTH, 1.5), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "tolerance"), [*((name, 1e-9) for name in FAMILIES if name != "nfe_2_exact"), ("nfe_1", 1e-4)]
)
def test_ten_steps_of_adam_are_those_of_numpy(name, tolerance):
    training = KgeTraining(
        gamma=1.5, init_bound=0.5, learning_rate=0.01, decay=0.5, epochs=2, batch_size=10, valid_every=0
    )
    with jax.enable_x64(tolerance < 1e-6):
        result = train_kge(FAMILIES[name], GRAPH, training, [3])
        params = jax.tree.map(np.float64, drawn(FAMILIES[name], seed=3)[1])
    moments, losses, count = {}, [], 0
    for epoch in range(2):
        shuffled, losses = BOTH[np.random.default_rng((3, epoch)).permutation(len(BOTH))], []
        for first in range(0, len(BOTH), 10):  # the last batch has four
            count += 1
            batch = shuffled[first : first + 10]
            losses.append(len(batch) * loss(name, params, batch, 1.5))
            adam(params, moments, gradient(name, params, batch, 1.5), count, 0.01 * 0.5**epoch)
    assert count == 10
    assert_near(jax.tree.map(lambda x: x[0], result.params), params, rtol=0, atol=tolerance)
    assert result.history["loss"][1, 0] == pytest.approx(sum(losses) / len(BOTH), rel=1e-4)
