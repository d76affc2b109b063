"""Laws of the LEGO modes: what they may not depend on, what they give back, and where the paper's form breaks."""

import jax
import numpy as np
import pytest

from permjax.lora.lego import LegoBalanced, LegoGauged, LegoKernel, LegoWeighted, LoraLego
from permjax.lora.merge import factors_of, merge_loras
from permjax.lora.pool import Factors

PLAIN = {"parameter_reweighting": False, "output_scale": "none"}
MODES = {
    "lora_lego": LoraLego(),
    "raw": LoraLego(**PLAIN),
    "normalized": LoraLego(features="normalized"),
    "weighted": LegoWeighted(),
    "gauged": LegoGauged(),
    "kernel": LegoKernel(),
    "balanced": LegoBalanced(),
}
GAUGE_CORRECT = ("gauged", "kernel", "balanced")
QUICK = ("lora_lego", "balanced")
SOME_FAST = [pytest.param(mode, marks=pytest.mark.fast) if mode in QUICK else mode for mode in MODES]


def update(factors):
    return np.float64(factors.b) @ np.float64(factors.a)


def distance(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def adapters(seed, *, ranks=(4, 4, 4), size=(24, 32), noise=0.3, decay=0.4):
    """Noisy copies of one adapter whose ranks decay, in random order, with two modules."""
    draw = np.random.default_rng(seed)
    out, inner = size
    found = [{} for _ in ranks]
    for module in ("first", "second"):
        r = max(ranks)
        a, b = draw.normal(size=(r, inner)) / np.sqrt(inner), draw.normal(size=(out, r)) / np.sqrt(out)
        scale = np.exp(-decay * np.arange(r))
        for adapter, rank in zip(found, ranks, strict=True):
            own_a = (a + noise * draw.normal(size=a.shape) / np.sqrt(inner)) * scale[:, None]
            own_b = (b + noise * draw.normal(size=b.shape) / np.sqrt(out)) * scale
            order = draw.permutation(r)[:rank]
            adapter[module] = Factors(np.float32(own_a[order]), np.float32(own_b[:, order]))
    return found


def rearranged(adapter, seed, *, signs=False, scales=False):
    """The same updates with the ranks in another order, and signs or scales moved between the factors."""
    draw = np.random.default_rng(seed)
    found = {}
    for name, (a, b) in adapter.items():
        order = draw.permutation(len(a))
        factor = np.exp(0.7 * draw.normal(size=len(a))) if scales else np.ones(len(a))
        factor = np.float32(factor * (draw.choice([-1, 1], len(a)) if signs else 1))
        found[name] = Factors(a[order] * factor[:, None], b[:, order] / factor)
    return found


def merged(models, method, **options):
    return {name: update(one) for name, one in merge_loras(models, method, **options).items()}


def change(models, others, method, **options):
    before, after = merged(models, method, **options), merged(others, method, **options)
    return max(distance(after[name], before[name]) for name in before)


@pytest.mark.parametrize("mode", SOME_FAST)
def test_the_order_of_ranks_changes_nothing(mode):
    models = adapters(0)
    others = [rearranged(model, seed) for seed, model in enumerate(models)]
    assert change(models, others, MODES[mode], rank=4) < 1e-5


@pytest.mark.parametrize("mode", GAUGE_CORRECT)
def test_signs_and_scales_moved_between_the_factors_change_nothing_in_the_gauge_correct_modes(mode):
    models = adapters(1)
    others = [rearranged(model, seed, signs=True, scales=True) for seed, model in enumerate(models)]
    assert change(models, others, MODES[mode], rank=4) < 1e-5


@pytest.mark.fast
@pytest.mark.parametrize("moved", [{"signs": True}, {"scales": True}])
def test_signs_and_scales_moved_between_the_factors_change_the_paper_form(moved):
    models = adapters(1)
    others = [rearranged(model, seed, **moved) for seed, model in enumerate(models)]
    assert change(models, others, MODES["lora_lego"], rank=4) > 0.2


@pytest.mark.parametrize("mode", ["lora_lego", "balanced"])
def test_ranks_may_differ(mode):
    models = adapters(0, ranks=(3, 4, 5))
    others = [rearranged(model, seed) for seed, model in enumerate(models)]
    assert change(models, others, MODES[mode], rank=4) < 1e-5


@pytest.mark.parametrize("mode", ["lora_lego", "gauged", "balanced"])
def test_one_adapter_of_the_asked_rank_comes_back(mode):
    model = adapters(2, ranks=(4,))[0]
    found = merged([model], MODES[mode], rank=4)
    assert all(distance(found[name], update(model[name])) < 1e-5 for name in model)


@pytest.mark.parametrize("mode", SOME_FAST)
def test_equal_adapters_with_weights_that_sum_to_one_come_back(mode):
    model = adapters(3, ranks=(4,))[0]
    found = merged([model, rearranged(model, 5), model], MODES[mode], rank=4, weights=[0.5, 0.3, 0.2])
    assert all(distance(found[name], update(model[name])) < 1e-5 for name in model)


@pytest.mark.parametrize(("scale", "factor"), [("none", 1), ("sqrt_r_over_k", 0.5), ("sqrt_n_over_k", 1)])
def test_a_cluster_for_every_piece_gives_the_sum_up_to_the_documented_factor(scale, factor):
    models = adapters(4, ranks=(4, 4, 4, 4))
    method = LoraLego(parameter_reweighting=False, output_scale=scale)
    found = merged(models, method, rank=16)
    for name in found:
        assert distance(found[name], factor * sum(update(model[name]) for model in models)) < 1e-5


@pytest.mark.parametrize("mode", ["weighted", "kernel", "balanced"])
def test_a_cluster_for_every_piece_gives_the_weighted_sum_in_the_modes_that_count_by_size(mode):
    models = adapters(5, ranks=(2, 4, 3))
    weights = (0.7, -0.4, 1.5)
    found = merged(models, MODES[mode], rank=9, weights=weights)
    for name in found:
        assert distance(found[name], sum(w * update(m[name]) for w, m in zip(weights, models, strict=True))) < 1e-5


@pytest.mark.parametrize("mode", SOME_FAST)
def test_a_negative_weight_stands_for_the_negated_adapter(mode):
    models = adapters(6)
    negated = {name: Factors(a, -b) for name, (a, b) in models[1].items()}
    found = merged(models, MODES[mode], rank=4, weights=[0.5, -0.25, 0.25])
    expected = merged([models[0], negated, models[2]], MODES[mode], rank=4, weights=[0.5, 0.25, 0.25])
    assert all(distance(found[name], expected[name]) < 1e-5 for name in found)


def test_on_a_decaying_spectrum_only_modes_that_count_by_size_come_near_the_mean():
    errors = {"raw": [], "weighted": [], "balanced": []}
    for seed in range(5):
        models = adapters(seed, ranks=(8, 8, 8, 8), size=(256, 256), noise=0.5, decay=0.25)
        for mode, found in errors.items():
            result = merged(models, MODES[mode], rank=8)
            found += [distance(result[n], sum(update(m[n]) for m in models) / 4) for n in result]
    assert np.mean(errors["raw"]) >= 0.5
    assert np.mean(errors["weighted"]) <= 0.15
    assert np.mean(errors["balanced"]) <= 0.15


def test_parameter_reweighting_gives_each_piece_the_mean_largest_entry_of_its_cluster():
    models = adapters(7)
    with_it = merge_loras(models, LoraLego(output_scale="none"), rank=5)["first"]
    pieces = np.concatenate([np.concatenate([m["first"].a, m["first"].b.T], 1) for m in models])
    for cluster in range(5):
        members = np.abs(pieces[np.asarray(with_it.labels) == cluster])
        largest = max(np.abs(with_it.a[cluster]).max(), np.abs(with_it.b[:, cluster]).max())
        np.testing.assert_allclose(largest, members.max(1).mean(), rtol=1e-5)


@pytest.mark.parametrize("mode", ["lora_lego", "kernel"])
def test_one_adapter_is_reduced_to_fewer_ranks(mode):
    model = adapters(8, ranks=(8,), decay=0.8)[0]
    result = merge_loras([model], MODES[mode], rank=3)
    for name, one in result.items():
        assert one.a.shape == (3, 32)
        assert sorted(set(np.asarray(one.labels))) == [0, 1, 2]
        if mode == "kernel":
            assert distance(update(one), update(model[name])) < 0.5


def awkward(a, b):
    """One module in several degenerate forms."""
    return {
        "plain": Factors(a, b),
        "zero b": Factors(a, 0 * b),
        "zero": Factors(0 * a, 0 * b),
        "equal ranks": Factors(a[[0, 0, 1, 1]], b[:, [0, 0, 1, 1]]),
        "dead ranks": Factors(a * np.float32([[1], [0], [0], [0]]), b),
    }


@pytest.mark.parametrize("mode", ["lora_lego", "normalized", "gauged", "kernel", "balanced"])
@pytest.mark.parametrize("rank", [2, 20])
def test_degenerate_adapters_give_no_nan(mode, rank):
    first, second, third = (awkward(*model["first"]) for model in adapters(9))
    models = [first, second, dict.fromkeys(third, third["plain"]), {name: first[name] for name in first}]
    for one in merge_loras(models, MODES[mode], rank=rank).values():
        assert one.a.shape[0] == one.b.shape[1] == rank
        assert np.isfinite(one.a).all()
        assert np.isfinite(one.b).all()


def test_a_module_that_one_adapter_lacks_is_merged_from_the_others():
    models = adapters(10)
    del models[2]["second"]
    whole = merged(models, LegoBalanced(), rank=8)["second"]
    assert distance(whole, sum(update(m["second"]) for m in models[:2]) / 3) < 1e-5
    assert np.isfinite(merged(models, LoraLego(), rank=4)["second"]).all()


@pytest.mark.fast
def test_the_same_key_gives_the_same_bytes_and_modules_do_not_depend_on_each_other():
    models = adapters(11)
    first, again = (merge_loras(models, LoraLego(), rank=4, key=jax.random.key(3)) for _ in range(2))
    alone = merge_loras([{"second": m["second"]} for m in models], LoraLego(), rank=4, key=jax.random.key(3))
    assert all(np.asarray(first[n].a).tobytes() == np.asarray(again[n].a).tobytes() for n in first)
    np.testing.assert_allclose(alone["second"].b, first["second"].b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["lora_lego", "balanced"])
def test_a_merge_can_be_traced(mode):
    models = adapters(12)
    plain = factors_of(merge_loras(models, MODES[mode], rank=4))
    jitted = jax.jit(lambda given: factors_of(merge_loras(given, MODES[mode], rank=4)))(models)
    assert all(distance(update(jitted[name]), update(plain[name])) < 1e-5 for name in plain)


@pytest.mark.fast
@pytest.mark.parametrize(
    "wrong", [{"features": "cooked"}, {"gauge": "free"}, {"centroid": "median"}, {"output_scale": "2"}, {"restarts": 0}]
)
def test_unknown_choices_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoraLego(**wrong)
