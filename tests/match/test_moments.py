"""Streamed co-moments: the same as NumPy's on all samples at once, in any number of batches."""

from functools import reduce

import jax.numpy as jnp
import numpy as np
import pytest

from permjax.match.moments import NOTHING, Tap, kernel, merge, observe, taps

pytestmark = pytest.mark.fast
TAP = Tap("h1", "t", (), ("h1",))


def draw(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, 9)) + shift).astype(np.float32)


def stream(spec, x, y, cuts):
    batches = zip(np.split(x, cuts), np.split(y, cuts), strict=True)
    return reduce(
        merge, (observe(spec, TAP._replace(group="h2", free=("h2",)), *map(jnp.asarray, b)) for b in batches), NOTHING
    )


@pytest.fixture(scope="module")
def spec(networks):
    return networks["perceptron"]  # h2 has nine units


@pytest.mark.parametrize("cuts", [[], [20], [1, 2, 30]])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_the_statistics_are_numpys(spec, cuts, shift):
    x, y = draw(40, 1, shift), draw(40, 2, -shift)
    y[:, :4] += x[:, 3:7]
    moments, tap = stream(spec, x, y, cuts), TAP._replace(group="h2", free=("h2",))
    both = np.concatenate([x, y], 1).astype(np.float64)
    for statistic, expected, tolerance in (
        ("correlation", np.corrcoef(both.T)[:9, 9:], 1e-4),
        ("covariance", np.cov(both.T, bias=True)[:9, 9:], 1e-4),
        ("moment", both[:, :9].T @ both[:, 9:] / 40, 1e-4 + 1e-6 * shift**2),
    ):
        found = kernel(spec, tap, moments, statistic)
        assert found.labels == (("h2", 0), ("h2", 1))
        np.testing.assert_allclose(found.values, expected, atol=tolerance)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
def test_constant_units_correlate_with_nothing(spec, constant):
    x, y = draw(64, 1), draw(64, 2)
    x[:, 2] = y[:, 5] = constant
    values = kernel(spec, TAP._replace(group="h2", free=("h2",)), stream(spec, x, y, [10, 30]), "correlation").values
    assert np.isfinite(values).all()
    assert (values[2] == 0).all()
    assert (values[:, 5] == 0).all()
    assert np.abs(np.delete(np.delete(values, 2, 0), 5, 1)).min() > 0


def test_groups_inside_are_paired_for_every_pair_of_outer_units(networks):
    spec = networks["attention with heads"]
    x, y = (np.random.default_rng(s).standard_normal((30, 3, 5)).astype(np.float32) for s in (1, 2))
    tap = Tap("qk", "t", (), ("head", "qk"))
    values = kernel(spec, tap, merge(NOTHING, observe(spec, tap, jnp.asarray(x), jnp.asarray(y))), "correlation")
    assert values.labels == (("head", 0), ("qk", 0), ("head", 1), ("qk", 1))
    assert values.values[1, 2, 2, 4] == pytest.approx(np.corrcoef(x[:, 1, 2], y[:, 2, 4])[0, 1], abs=1e-5)


def test_held_groups_are_paired_with_themselves_only(zoo):
    spec = zoo["stacked layers"]
    x, y = (np.random.default_rng(s).standard_normal((30, 3, 4)).astype(np.float32) for s in (1, 2))
    (tap,) = taps(spec, "ff", {g.name: ["t"] if g.name == "ff" else [] for g in spec.groups})
    assert tap == Tap("ff", "t", ("layer",), ("ff",))
    values = kernel(spec, tap, merge(NOTHING, observe(spec, tap, jnp.asarray(x), jnp.asarray(y))), "correlation")
    assert values.labels == (("layer", 0), ("ff", 0), ("ff", 1))
    assert values.values[2, 1, 3] == pytest.approx(np.corrcoef(x[:, 2, 1], y[:, 2, 3])[0, 1], abs=1e-5)


def test_a_tap_is_left_to_the_innermost_group_that_it_carries(networks):
    spec = networks["grouped queries"]
    found = taps(spec, "kv", {"kv": ["q", "k", "router"], "q": ["q"], "qk": ["q", "k"], "vo": [], "res": ["o"]})
    assert set(found) == {
        Tap("kv", "router", (), ("kv",)),
        Tap("q", "q", (), ("kv", "q")),
        Tap("qk", "q", (), ("kv", "qk")),
        Tap("qk", "k", (), ("kv", "qk")),
    }
