"""Every method against its formula on full matrices, in float64 and without permjax."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from permjax.lora import dense
from permjax.lora.merge import merge_loras
from permjax.lora.methods import METHODS, lora_method
from permjax.lora.pool import Factors

WEIGHTS = np.array([0.5, 0.2, 0.6])
RANK = 4
CASES = {"narrow": (24, 20, (4, 3, 5)), "more pieces than sizes": (9, 10, (4, 4, 4))}


@cache
def adapters(case):
    size, out, ranks = CASES[case]
    rng = np.random.default_rng(len(case))
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return [{"m": Factors(draw(r, size) * np.float32(0.5 + t), draw(out, r))} for t, r in enumerate(ranks)]


def wide(case):
    """The factors a, b and the update of every adapter."""
    found = [tuple(np.asarray(x, np.float64) for x in one["m"]) for one in adapters(case)]
    return [a for a, _ in found], [b for _, b in found], [b @ a for a, b in found]


def cut(x, rank=RANK):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def filled(parts):
    most = max(len(x) for x in parts)
    return [np.concatenate([x, np.zeros((most - len(x), x.shape[1]))]) for x in parts]


def top(x, density):
    kept = np.zeros(x.size)
    order = np.argsort(-np.abs(x), axis=None)[: int(density * x.size)]
    kept[order] = x.reshape(-1)[order]
    return kept.reshape(x.shape)


def disjoint(parts, weights, majority="total"):
    """TIES, one entry after the other."""
    found = np.zeros(parts[0].shape)
    for place in np.ndindex(*found.shape):
        entries = np.array([x[place] for x in parts])
        vote = entries.sum() if majority == "total" else np.sign(entries).sum()
        agree = entries > 0 if vote >= 0 else entries < 0
        found[place] = (weights * entries)[agree].sum() / max(1, agree.sum())
    return found


def plain_sum(case):
    return sum(w * x for w, x in zip(WEIGHTS, wide(case)[2], strict=True))


def factorwise(case, rule, weights=WEIGHTS):
    a, b, _ = wide(case)
    root = np.sqrt(weights)
    return cut(rule(filled([x.T for x in b]), root).T @ rule(filled(a), root))


def linear(parts, weights):
    return sum(w * x for w, x in zip(weights, parts, strict=True))


def magnitude(case, density):
    a, b, _ = wide(case)
    kept_a, kept_b = filled([top(x, density) for x in a]), filled([top(x.T, density) for x in b])
    root = np.sqrt(WEIGHTS)
    return cut(linear(kept_b, root).T @ linear(kept_a, root))


def ties(case, density, majority):
    a, b, _ = wide(case)
    kept_a, kept_b = filled([top(x, density) for x in a]), filled([top(x.T, density) for x in b])
    root = np.sqrt(3 * WEIGHTS)
    return cut(disjoint(kept_b, root, majority).T @ disjoint(kept_a, root, majority))


def ties_of(parts, density, scaling=1.0):
    return disjoint([top(x, density) for x in parts], scaling * 3 * WEIGHTS)


def knots(case, density):
    updates = wide(case)[2]
    u, s, vt = np.linalg.svd(np.hstack(updates), full_matrices=False)
    count = min(len(u), sum(CASES[case][2]))
    blocks = np.split((s[:, None] * vt)[:count], 3, axis=1)
    return cut(u[:, :count] @ ties_of(blocks, density))


def core_space(case, density, basis):
    a, b, updates = wide(case)
    lefts, rights = (b, a) if basis == "factors" else (updates, updates)
    count = sum(CASES[case][2])
    u = np.linalg.svd(np.hstack(lefts), full_matrices=False)[0][:, :count]
    v = np.linalg.svd(np.vstack(rights), full_matrices=False)[2][:count].T
    return cut(u @ ties_of([u.T @ x @ v for x in updates], density) @ v.T)


def inverse_root(x):
    values, vectors = np.linalg.eigh(x)
    return vectors @ np.diag(np.where(values > 1e-9, np.maximum(values, 1e-9) ** -0.5, 0)) @ vectors.T


def tsv(case):
    parts = [np.linalg.svd(x, full_matrices=False) for x in wide(case)[2]]
    ranks = CASES[case][2]
    u = np.hstack([p[0][:, :r] for p, r in zip(parts, ranks, strict=True)])
    v = np.vstack([p[2][:r] for p, r in zip(parts, ranks, strict=True)]).T
    s = np.concatenate([3 * w * p[1][:r] for p, r, w in zip(parts, ranks, WEIGHTS, strict=True)])
    return cut(u @ inverse_root(u.T @ u) @ np.diag(s) @ inverse_root(v.T @ v) @ v.T)


def iso_c(case):
    u, s, vt = np.linalg.svd(3 * plain_sum(case), full_matrices=False)
    live = s > 1e-9 * s[0]
    return np.mean(s[live]) * u[:, :RANK] @ vt[:RANK]


def ctm(case, density):
    updates = wide(case)[2]
    norms = np.array([np.linalg.norm(x) for x in updates])
    scale = np.sqrt(WEIGHTS) * (0.25 * norms + 0.75 * norms.mean()) / norms
    x = [f * one for f, one in zip(scale, updates, strict=True)]

    def leading(parts):
        return np.linalg.eigh(sum(one @ one.T for one in parts))[1][:, -RANK:]

    u, v = leading(x), leading([one.T for one in x])
    for _ in range(10):
        v = leading([one.T @ u for one in x])
        u = leading([one @ v for one in x])
    return u @ ties_of([u.T @ one @ v for one in updates], density, 0.75) @ v.T


def dense_ties(case, density, majority):
    kept = [top(x, density) for x in wide(case)[2]]
    return cut(disjoint(kept, 3 * WEIGHTS, majority))


FORMULAS = {
    "concat": (lambda case: plain_sum(case), {}),
    "truncate": (lambda case: cut(plain_sum(case)), {}),
    "task_arithmetic": (lambda case: cut(0.4 * 3 * plain_sum(case)), {}),
    "linear": (lambda case: factorwise(case, linear), {}),
    "ties": (lambda case: ties(case, 0.5, "total"), {"density": 0.5}),
    "ties by frequency": (lambda case: ties(case, 0.7, "frequency"), {"density": 0.7, "majority": "frequency"}),
    "magnitude": (lambda case: magnitude(case, 0.5), {}),
    "knots": (lambda case: knots(case, 0.3), {"density": 0.3}),
    "knots of sums": (lambda case: cut(0.4 * 3 * plain_sum(case)), {"rule": "task_arithmetic", "scaling": 0.4}),
    "core_space": (lambda case: core_space(case, 0.3, "factors"), {"density": 0.3}),
    "core_space of updates": (lambda case: core_space(case, 0.3, "updates"), {"density": 0.3, "basis": "updates"}),
    "core_space of tsv": (tsv, {"rule": "tsv"}),
    "core_space of sums": (lambda case: cut(3 * plain_sum(case)), {"rule": "task_arithmetic"}),
    "tsv": (tsv, {}),
    "iso_c": (iso_c, {}),
    "ctm": (lambda case: ctm(case, 0.5), {"density": 0.5}),
    "ties_svd": (lambda case: dense_ties(case, 0.2, "total"), {}),
    "ties_svd by frequency": (
        lambda case: dense_ties(case, 0.6, "frequency"),
        {"density": 0.6, "majority": "frequency"},
    ),
    "magnitude_svd": (lambda case: cut(linear([top(x, 0.5) for x in wide(case)[2]], WEIGHTS)), {}),
}


def merged(case, chosen, rank=RANK):
    one = merge_loras(adapters(case), chosen, rank=rank, weights=WEIGHTS)["m"]
    return np.asarray(one.b, np.float64) @ np.asarray(one.a, np.float64)


CROWDED = ("knots", "core_space", "core_space of updates", "tsv", "iso_c", "ctm", "ties_svd")


@pytest.mark.parametrize(
    ("name", "case"),
    [*((name, "narrow") for name in FORMULAS), *((name, "more pieces than sizes") for name in CROWDED)],
)
def test_the_method_is_its_formula_on_full_matrices(name, case):
    formula, hyper = FORMULAS[name]
    found = merged(case, lora_method(name.split()[0], **hyper), sum(CASES[case][2]) if name == "concat" else RANK)
    expected = formula(case)
    assert np.linalg.norm(found - expected) < 2e-5 * np.linalg.norm(expected)


def test_every_method_but_the_random_and_the_minimising_has_a_formula_here():
    others = {name for name in METHODS if "lego" in name} | {"aligned_linear", "dare", "dare_svd", "regmean"}
    assert {name.split()[0] for name in FORMULAS} | others == set(METHODS)


@pytest.mark.parametrize("name", ["linear", "magnitude", "ties"])
def test_negative_weights_negate_a_in_methods_of_the_factors(name):
    chosen, signs = lora_method(name, **({} if name == "linear" else {"density": 0.6})), np.array([1, -1, 1])
    found = merge_loras(adapters("narrow"), chosen, rank=5, weights=signs * WEIGHTS)["m"]
    a, b, _ = wide("narrow")
    if name != "linear":
        a, b = [top(x, 0.6) for x in a], [top(x.T, 0.6).T for x in b]
    rule, root = (disjoint, np.sqrt(3 * WEIGHTS)) if name == "ties" else (linear, np.sqrt(WEIGHTS))
    expected = rule(filled([x.T for x in b]), root).T @ rule(filled(a), signs * root)
    np.testing.assert_allclose(found.b @ found.a, expected, atol=1e-4)


def every_other(x, density, rescale, key):
    """A mask that is not random."""
    del key
    kept = jnp.where(jnp.arange(x.size).reshape(x.shape) % 3 > 0, x, 0)
    return kept / density if rescale else kept


@pytest.mark.parametrize("combine", ["linear", "ties"])
def test_dare_is_its_formula_for_a_given_mask(combine, monkeypatch):
    monkeypatch.setattr("permjax.lora.elementwise.thinned", every_other)
    a, b, _ = wide("narrow")
    thin = [np.asarray(every_other(x, 0.25, True, None), np.float64) for x in (np.concatenate(a), np.hstack(b))]
    kept_a, kept_b = (filled(np.split(x, np.cumsum(CASES["narrow"][2])[:-1])) for x in (thin[0], thin[1].T))
    rule, root = (linear, np.sqrt(WEIGHTS)) if combine == "linear" else (disjoint, np.sqrt(3 * WEIGHTS))
    found = merged("narrow", lora_method("dare", density=0.25, combine=combine))
    expected = cut(rule(kept_b, root).T @ rule(kept_a, root))
    assert np.linalg.norm(found - expected) < 2e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("combine", ["linear", "ties"])
def test_dare_of_updates_is_its_formula_for_a_given_mask(combine, monkeypatch):
    monkeypatch.setattr(dense, "thinned", every_other)
    kept = np.asarray(every_other(np.stack(wide("narrow")[2]), 0.25, True, None), np.float64)
    expected = cut(linear(kept, WEIGHTS) if combine == "linear" else disjoint([*kept], 3 * WEIGHTS))
    found = merged("narrow", lora_method("dare_svd", density=0.25, combine=combine))
    assert np.linalg.norm(found - expected) < 2e-5 * np.linalg.norm(expected)


def test_dare_keeps_its_fraction_of_both_factors_and_rescales_them():
    rng = np.random.default_rng(0)
    one = Factors(rng.standard_normal((16, 200)).astype(np.float32), rng.standard_normal((150, 16)).astype(np.float32))
    found = merge_loras([{"m": one}], lora_method("dare", density=0.3))["m"]
    for thin, whole in zip((found.a, found.b), one, strict=True):
        kept = np.asarray(thin) != 0
        assert abs(np.mean(kept) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / kept.size)
        np.testing.assert_allclose(np.asarray(thin)[kept], whole[kept] / 0.3, rtol=1e-6)


def test_aligned_linear_is_linear_before_ranks_signs_and_scales_were_mixed():
    rng = np.random.default_rng(3)
    base, adapters_, expected = rng.standard_normal((2, RANK, 16)), [], [0, 0]
    for weight in WEIGHTS:
        a, b = base + 0.1 * rng.standard_normal(base.shape)
        even = np.sqrt(np.linalg.norm(b, axis=1) / np.linalg.norm(a, axis=1))[:, None]
        expected = [x + np.sqrt(weight) * y for x, y in zip(expected, (a * even, b / even), strict=True)]
        order, scale = rng.permutation(RANK), rng.choice([-3.0, -0.5, 0.2, 2.0], (RANK, 1))
        mixed = (a * scale)[order].astype(np.float32), (b / scale)[order].T.astype(np.float32)
        adapters_.append({"m": Factors(*mixed)})
    found = merge_loras(adapters_, lora_method("aligned_linear"), weights=WEIGHTS)["m"]
    np.testing.assert_allclose(found.b @ found.a, expected[1].T @ expected[0], atol=1e-4)
    assert sorted(found.labels.tolist()) == sorted([*range(RANK)] * 3)
