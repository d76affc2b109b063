"""The data-aware merge against a numerical minimisation, and its limits."""

import numpy as np
import pytest
from scipy.optimize import minimize

from permjax.lora.merge import merge_loras
from permjax.lora.methods import lora_method
from permjax.lora.pool import Factors

WEIGHTS = np.array([0.5, 0.2, 0.6])
RANK = 4
CASES = {"narrow": (24, 20, (4, 3, 5)), "more pieces than sizes": (9, 10, (4, 4, 4))}


def merged(pairs, inputs, rank, weights=WEIGHTS, **hyper):
    adapters = [{"m": Factors(a.astype(np.float32), b.astype(np.float32))} for a, b in pairs]
    rows = {"m": inputs.astype(np.float32)}
    one = merge_loras(adapters, lora_method("regmean", **hyper), rank=rank, weights=weights, inputs=rows)["m"]
    return np.asarray(one.b, np.float64) @ np.asarray(one.a, np.float64)


@pytest.mark.parametrize("case", CASES)
def test_regmean_minimises_the_error_of_outputs_within_the_span(case):
    size, out, ranks = CASES[case]
    rng = np.random.default_rng(len(case))
    pairs = [(rng.standard_normal((r, size)), rng.standard_normal((out, r)) * (t + 0.5)) for t, r in enumerate(ranks)]
    a, b = zip(*pairs, strict=True)
    updates = [y @ x for x, y in pairs]
    inputs, ridge = rng.standard_normal((3, 30, size)) * np.exp(rng.normal(0, 1, (3, 1, size))), 1e-3
    left, right = np.linalg.qr(np.hstack(b))[0], np.linalg.qr(np.vstack(a).T)[0]
    seen = [x @ right for x in inputs]
    small = ridge * np.mean([np.mean(x**2) * len(x) for x in seen])
    grams = [x.T @ x + small * np.eye(x.shape[1]) for x in seen]
    targets = [left.T @ x @ right for x in updates]
    sizes = (left.shape[1], RANK), (RANK, right.shape[1])

    def error(x):
        return sum(w * np.sum(((x - m) @ g) * (x - m)) for w, m, g in zip(WEIGHTS, targets, grams, strict=True))

    def objective(flat):
        p, q = flat[: np.prod(sizes[0])].reshape(sizes[0]), flat[np.prod(sizes[0]) :].reshape(sizes[1])
        slope = sum(2 * w * (p @ q - m) @ g for w, m, g in zip(WEIGHTS, targets, grams, strict=True))
        return error(p @ q), np.concatenate([(slope @ q.T).reshape(-1), (p.T @ slope).reshape(-1)])

    starts = [rng.standard_normal(np.prod(sizes[0]) + np.prod(sizes[1])) for _ in range(3)]
    limits = {"maxiter": 1500, "maxfun": 3000, "ftol": 1e-14, "gtol": 1e-9}
    best = min(
        (minimize(objective, x, jac=True, method="L-BFGS-B", options=limits) for x in starts), key=lambda r: r.fun
    )
    found = merged(pairs, inputs, RANK, ridge=ridge)
    inside = left.T @ found @ right
    np.testing.assert_allclose(left @ inside @ right.T, found, atol=1e-4)
    assert error(inside) == pytest.approx(best.fun, rel=1e-4)
    p, q = best.x[: np.prod(sizes[0])].reshape(sizes[0]), best.x[np.prod(sizes[0]) :].reshape(sizes[1])
    assert np.linalg.norm(inside - p @ q) < 1e-2 * np.linalg.norm(inside)


@pytest.mark.fast
def test_adapters_that_read_inputs_of_their_own_all_keep_their_outputs():
    rng = np.random.default_rng(0)
    halves = np.repeat([[1, 0], [0, 1]], 12, axis=1)
    pairs = [(rng.standard_normal((3, 24)) * half, rng.standard_normal((20, 3))) for half in halves]
    inputs = rng.standard_normal((2, 40, 24)) * halves[:, None]
    found = merged(pairs, inputs, 6, (0.5, 0.5), ridge=1e-6)
    np.testing.assert_allclose(found, sum(b @ a for a, b in pairs), atol=1e-3)


@pytest.mark.fast
def test_silent_inputs_give_the_weighted_mean():
    rng = np.random.default_rng(0)
    pairs = [(rng.standard_normal((3, 24)), rng.standard_normal((20, 3))) for _ in range(3)]
    found = merged(pairs, np.zeros((3, 5, 24)), 9)
    expected = sum(w * (b @ a) for w, (a, b) in zip(WEIGHTS / WEIGHTS.sum(), pairs, strict=True))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.fast
def test_missing_inputs_are_asked_for():
    one = {"m": Factors(np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))}
    with pytest.raises(ValueError, match="uses data"):
        merge_loras([one], lora_method("regmean"))
