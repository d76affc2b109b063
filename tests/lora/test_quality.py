"""The quality report agrees with dense float64 arithmetic, and warns where a merge goes wrong."""

import jax
import numpy as np
import pytest

from permjax.lora.inspection import inspect
from permjax.lora.lego import LegoBalanced, LoraLego
from permjax.lora.merge import merge_loras
from permjax.lora.pool import Factors, Merged
from permjax.lora.quality import lora_quality
from permjax.lora.verdict import overall, verdict, warnings

SIZES = {"q": (10, 12), "v": (10, 12), "up": (9, 7)}
RANKS = (3, 2, 4)
WEIGHTS = (0.5, -0.25, 1.0)


def drawn(rng, rows, columns):
    return rng.standard_normal((rows, columns)).astype(np.float32)


def adapters(seed=0, ranks=RANKS, sizes=SIZES):
    """Random adapters; the second has no module `v`."""
    rng = np.random.default_rng(seed)
    every = [{name: Factors(drawn(rng, r, n), drawn(rng, m, r)) for name, (m, n) in sizes.items()} for r in ranks]
    every[1].pop("v", None)
    return every


def some_result(seed=1, rank=3, sizes=SIZES):
    rng = np.random.default_rng(seed)
    return {name: Merged(drawn(rng, rank, n), drawn(rng, m, rank)) for name, (m, n) in sizes.items()}


def delta(factors):
    return factors.b.astype(float) @ factors.a.astype(float)


def entropy_rank(x):
    energy = np.linalg.svd(x, compute_uv=False) ** 2
    share = energy[energy > 1e-12 * energy.max()] / energy.sum()
    return np.exp(-np.sum(share * np.log(share)))


def dense(name, inputs, merged, weights):
    """All numbers of one module, from dense matrices."""
    size = SIZES[name]
    d = np.stack([delta(one[name]) if name in one else np.zeros(size) for one in inputs])
    g, total = delta(merged[name]), np.tensordot(weights, d, 1)
    u, s, vt = np.linalg.svd(g)
    k = np.linalg.matrix_rank(g)
    p, q = u[:, :k] @ u[:, :k].T, vt[:k].T @ vt[:k]
    widest = max(one[name].a.shape[0] for one in inputs if name in one)
    b, a = np.zeros((size[0], widest)), np.zeros((widest, size[1]))
    for one, w in zip(inputs, weights, strict=True):
        if name in one:
            r = one[name].a.shape[0]
            b[:, :r] += np.sign(w) * np.sqrt(abs(w)) * one[name].b
            a[:r] += np.sqrt(abs(w)) * one[name].a
    norm = np.linalg.norm
    with np.errstate(invalid="ignore", divide="ignore"):
        norms = norm(d, axis=(1, 2))
        tail = np.linalg.svd(total, compute_uv=False)[merged[name].a.shape[0] :]
        pieces = np.concatenate([norm(x.a, axis=1) * norm(x.b, axis=0) for x in (one.get(name) for one in inputs) if x])
        return {
            "norms": norms,
            "norm_sum": norm(total),
            "norm_merged": norm(g),
            "errors": norm(g - d, axis=(1, 2)) / np.where(norms > 0, norms, np.nan),
            "error": norm(g - total) / norm(total),
            "best": norm(tail) / norm(total),
            "cosine": np.sum(g * total) / norm(g) / norm(total),
            "kept": (norm(p @ d @ q, axis=(1, 2)) / norms) ** 2,
            "cosines": np.einsum("tpq,upq->tu", d, d) / np.outer(norms, norms),
            "cross": norm(b @ a - total) / norm(total),
            "effective_sum": entropy_rank(total),
            "effective_merged": entropy_rank(g),
            "scale": norm(g) / norms[norms > 0].mean(),
            "spread": pieces.max() / pieces.min(),
        }


@pytest.mark.fast
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_every_number_agrees_with_dense_arithmetic(weights):
    inputs, merged = adapters(), some_result()
    found = lora_quality(inputs, merged, weights)
    assert list(found) == list(merged)
    for name, module in found.items():
        for key, expected in dense(name, inputs, merged, weights or (1 / 3,) * 3).items():
            np.testing.assert_allclose(getattr(module, key), expected, rtol=2e-4, atol=2e-6, err_msg=f"{name} {key}")
        assert module.rank == 3
        assert module.sizes is None


@pytest.mark.fast
def test_overall_is_the_quality_of_the_block_diagonal_of_all_modules():
    inputs, merged = adapters(), some_result()
    found, sizes = overall(lora_quality(inputs, merged, WEIGHTS)), SIZES.values()
    blocks = {n: [delta(x[n]) if n in x else np.zeros(SIZES[n]) for x in (*inputs, factors(merged))] for n in SIZES}
    d = np.stack([np.concatenate([blocks[n][t].ravel() for n in SIZES]) for t in range(4)])
    g, total, norm = d[3], np.tensordot(WEIGHTS, d[:3], 1), np.linalg.norm
    assert found.modules == len(sizes)
    np.testing.assert_allclose(found.errors, norm(g - d[:3], axis=1) / norm(d[:3], axis=1), rtol=1e-4)
    np.testing.assert_allclose(found.error, norm(g - total) / norm(total), rtol=1e-4)
    np.testing.assert_allclose(found.cosine, g @ total / norm(g) / norm(total), rtol=1e-4)
    np.testing.assert_allclose(found.scale, norm(g) / norm(d[:3], axis=1).mean(), rtol=1e-4)
    cosines = d[:3] @ d[:3].T / np.outer(norm(d[:3], axis=1), norm(d[:3], axis=1))
    np.testing.assert_allclose(found.cosines, cosines, rtol=1e-3, atol=1e-5)
    assert found.kept_min == pytest.approx(found.kept.min())


def factors(merged):
    return {name: Factors(one.a, one.b) for name, one in merged.items()}


@pytest.mark.fast
def test_the_sum_itself_has_no_error_and_keeps_everything():
    inputs = adapters()
    exact = {
        name: Merged(
            np.concatenate([w * x[name].a for w, x in zip(WEIGHTS, inputs, strict=True) if name in x]),
            np.concatenate([x[name].b for x in inputs if name in x], 1),
        )
        for name in ("q", "v")  # whose sizes are not below the sum of the ranks
    }
    found = lora_quality(inputs, exact, WEIGHTS)
    for module in found.values():
        assert module.error < 1e-5
        assert module.best < 1e-5
        assert module.cosine == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(module.kept[module.norms > 0], 1, rtol=1e-4)
    assert verdict(overall(found), []).startswith("Go")


@pytest.mark.fast
def test_filling_up_with_zeros_changes_nothing_but_the_rank():
    inputs, merged = adapters(), some_result()
    wide = {n: Merged(np.pad(x.a, ((0, 2), (0, 0))), np.pad(x.b, ((0, 0), (0, 2)))) for n, x in merged.items()}
    for one, two in zip(lora_quality(inputs, merged).values(), lora_quality(inputs, wide).values(), strict=True):
        np.testing.assert_allclose(one.kept, two.kept, rtol=1e-4)
        np.testing.assert_allclose(one.error, two.error, rtol=1e-4)
        assert (one.rank, two.rank) == (3, 5)
        assert two.best < one.best


@pytest.mark.fast
def test_an_adapter_of_zeros_gives_nan_for_itself_only():
    inputs, merged = adapters(), some_result()
    inputs[0]["q"] = Factors(inputs[0]["q"].a, np.zeros_like(inputs[0]["q"].b))
    found = lora_quality(inputs, merged)["q"]
    assert np.isnan(found.errors[0])
    assert np.isnan(found.kept[0])
    assert np.isfinite([*found.errors[1:], *found.kept[1:], found.error, found.cross, found.spread]).all()
    nothing = lora_quality([inputs[0], inputs[0]], {"q": Merged(np.zeros((2, 12), "f"), np.zeros((10, 2), "f"))})
    assert nothing["q"].effective_sum == nothing["q"].effective_merged == 0
    assert np.isnan(nothing["q"].error)
    assert np.isnan(nothing["q"].spread)
    assert verdict(overall(nothing), []).startswith("No-go")


@pytest.mark.fast
def test_clusters_are_counted_and_purity_is_the_share_of_the_leading_adapter():
    rng = np.random.default_rng(0)
    inputs = [{"m": Factors(drawn(rng, 3, 6), drawn(rng, 5, 3))} for _ in range(2)]
    merged = {"m": Merged(drawn(rng, 4, 6), drawn(rng, 5, 4), np.array([0, 0, 1, 0, 1, -1]))}
    found = lora_quality(inputs, merged)["m"]
    assert found.sizes.tolist() == [3, 2, 0, 0]
    assert found.purity == pytest.approx((2 + 1) / 5)


def decaying(noise=0.5, seed=0):
    """Four noisy copies with permuted ranks of one update whose singular values decay as e^(-j/2)."""
    rng = np.random.default_rng(seed)
    r, d = 8, 256
    root = np.exp(-np.arange(r) / 4)[:, None]

    def unit():
        x = rng.standard_normal((r, d))
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    a, b, copies = unit(), unit(), []
    for _ in range(4):
        order = rng.permutation(r)
        noisy = [(root * (x + noise * unit()))[order].astype(np.float32) for x in (a, b)]
        copies.append({"m": Factors(noisy[0], noisy[1].T.copy())})
    return copies


def test_raw_lego_on_a_decaying_spectrum_is_warned_of_and_balanced_lego_is_not():
    inputs, key = decaying(), jax.random.key(0)
    plain = LoraLego(parameter_reweighting=False, output_scale="none")
    raw = lora_quality(inputs, merge_loras(inputs, plain, rank=8, key=key))
    balanced = lora_quality(inputs, merge_loras(inputs, LegoBalanced(), rank=8, key=key))
    names = ["a", "b", "c", "d"]
    (said,) = [text for text in warnings(raw, "lora_lego", names) if "counts every cluster alike" in text]
    assert "lego_balanced" in said
    assert warnings(balanced, "lego_balanced", names) == []
    assert overall(balanced).error < 0.2 < 0.5 < overall(raw).error


@pytest.mark.fast
def test_equal_pieces_are_no_reason_to_warn_of_lego():
    rng = np.random.default_rng(0)
    inputs = [{"m": Factors(drawn(rng, 4, 200), drawn(rng, 200, 4))} for _ in range(2)]
    found = lora_quality(inputs, merge_loras(inputs, LoraLego(), rank=4))
    assert found["m"].spread < 2
    assert not [text for text in warnings(found, "lora_lego", ["a", "b"]) if "cluster" in text]


@pytest.mark.fast
def test_cross_terms_a_small_rank_and_opposed_adapters_are_warned_of():
    rng = np.random.default_rng(0)
    one = Factors(drawn(rng, 4, 50), drawn(rng, 60, 4))
    other = Factors(drawn(rng, 4, 50), drawn(rng, 60, 4))
    opposed = Factors(-one.a + 0.5 * other.a, one.b)
    inputs = [{"m": one}, {"m": other}, {"m": opposed}]
    merged = {"m": Merged(other.a[:1] / 8, other.b[:, :1])}
    said = " ".join(warnings(lora_quality(inputs, merged), "linear", ["first", "second", "third"]))
    for words in ("linear adds the factors", "the rank is too small", "first and third work against each other"):
        assert words in said
    assert "is retained of first" in said
    assert "times as large as the adapters" in said
    assert "adds the factors" not in " ".join(warnings(lora_quality(inputs, merged), "truncate", ["a", "b", "c"]))


@pytest.mark.fast
def test_inspecting_an_adapter_finds_its_spectrum_and_its_dead_ranks():
    rng = np.random.default_rng(0)
    b = np.linalg.qr(rng.standard_normal((9, 4)))[0] * np.array([3.0, 2.0, 1.0, 0.0])
    a = np.linalg.qr(rng.standard_normal((12, 4)))[0].T
    found = inspect({"m": Factors(a.astype(np.float32), b.astype(np.float32))})["m"]
    assert found.norm == pytest.approx(np.sqrt(14), rel=1e-5)
    np.testing.assert_allclose(found.energy, [9 / 14, 13 / 14, 1, 1], rtol=1e-5)
    assert (found.rank, found.dead) == (4, 1)
    assert [found.rank_for(share) for share in (0.5, 0.9, 0.95)] == [1, 2, 3]
    assert found.spread == pytest.approx(3, rel=1e-5)
    assert found.effective == pytest.approx(entropy_rank(b @ a), rel=1e-4)


@pytest.mark.fast
def test_inspecting_a_fresh_adapter_gives_no_nan_but_for_the_spread():
    found = inspect({"m": Factors(np.ones((3, 2), np.float32), np.zeros((5, 3), np.float32))})["m"]
    assert (found.norm, found.effective, found.dead, found.rank_for(0.9)) == (0, 0, 3, 0)
    assert found.energy.tolist() == [1, 1, 1]
    assert np.isnan(found.spread)
