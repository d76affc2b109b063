"""Scores of units: by hand in NumPy, in the frame of the aligned models, heads as blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.action import permute
from permjax.match.activations import activation_matching
from permjax.match.weights import weight_matching
from permjax.merge.partial import constrained_plan, partial_plan
from permjax.merge.scores import METRICS, matched_scores, unit_scores
from permjax.symmetry.trace import trace_spec

pytestmark = pytest.mark.fast


def perceptron(p, x):
    x = jnp.tanh(x @ p["a"] + p["bias"][None])
    return jnp.tanh(x @ p["b"]) @ p["c"]


def attention(p, x):
    q, k, v = (jnp.einsum("bti,ihd->bthd", x, p[name]) for name in "qkv")
    mixed = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
    return jnp.einsum("bhts,bshd,hdo->bto", mixed, v, p["o"])


SHAPES = {"a": (5, 8), "bias": (8,), "b": (8, 6), "c": (6, 3)}
HEADS = {"q": (5, 3, 4), "k": (5, 3, 4), "v": (5, 3, 2), "o": (3, 2, 5)}
INNER, HIDDEN = "a:1", "b:1"


def drawn(shapes: dict, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def batches(count: int = 3) -> list:
    return [jnp.asarray(np.random.default_rng(i).standard_normal((40, 5)), jnp.float32) + 1 for i in range(count)]


def sequences() -> list:
    return [jnp.asarray(np.random.default_rng(i).standard_normal((8, 7, 5)), jnp.float32) for i in range(2)]


@pytest.fixture(scope="module")
def spec():
    return trace_spec(perceptron, drawn(SHAPES, 0), batches()[0])


@pytest.fixture(scope="module")
def heads():
    return trace_spec(attention, drawn(HEADS, 0), sequences()[0])


def scores(spec, models, metric, apply=perceptron, data=None):
    return unit_scores(spec, models, metric=metric, apply=apply, data=batches() if data is None else data)


def units(p) -> dict[str, np.ndarray]:
    """Pre-activations without bias, in float64."""
    p = {name: leaf.astype(np.float64) for name, leaf in p.items()}
    x = np.concatenate(batches()).astype(np.float64)
    return {INNER: x @ p["a"], HIDDEN: np.tanh(x @ p["a"] + p["bias"]) @ p["b"]}


def assert_kernels(found, expected):
    assert found.keys() == expected.keys()
    for group in expected:
        np.testing.assert_allclose(found[group], expected[group][None], rtol=1e-4, atol=1e-4, err_msg=group)


# by hand


def test_correlations_are_those_of_the_units(spec):
    models = [drawn(SHAPES, 1), drawn(SHAPES, 2)]
    a, b = map(units, models)
    expected = {g: np.corrcoef(a[g], b[g], rowvar=False)[: a[g].shape[1], a[g].shape[1] :] for g in a}
    assert_kernels(scores(spec, models, "correlation"), expected)


def test_distances_are_mean_squared_differences_with_a_minus(spec):
    models = [drawn(SHAPES, 1), drawn(SHAPES, 2)]
    a, b = map(units, models)
    expected = {g: -np.square(a[g][:, :, None] - b[g][:, None, :]).mean(0) for g in a}
    assert_kernels(scores(spec, models, "distance"), expected)


def test_weight_scores_are_inner_products_of_all_weights_of_two_units_and_need_no_data(spec):
    a, b = drawn(SHAPES, 1), drawn(SHAPES, 2)
    expected = {
        INNER: a["a"].T @ b["a"] + np.outer(a["bias"], b["bias"]) + a["b"] @ b["b"].T,
        HIDDEN: a["b"].T @ b["b"] + a["c"] @ b["c"].T,
    }
    assert_kernels(unit_scores(spec, [a, b], metric="weights"), expected)


def test_heads_are_compared_by_their_inner_units_as_they_lie(heads):
    a, b = drawn(HEADS, 1), drawn(HEADS, 2)
    expected = {
        "k:1": sum(np.einsum("ihd,igd->hg", a[n], b[n]) for n in "qkv") + np.einsum("hdo,gdo->hg", a["o"], b["o"])
    }
    assert_kernels(unit_scores(heads, [a, b], metric="weights"), expected)
    x = np.concatenate(sequences()).reshape(-1, 5)
    taps = [[np.einsum("ni,ihd->nhd", x, p[name]) for name in "qkv"] for p in (a, b)]
    expected = {"k:1": -sum(np.square(s[:, :, None] - t[:, None]).mean(0).sum(-1) for s, t in zip(*taps, strict=True))}
    assert_kernels(scores(heads, [a, b], "distance", attention, sequences()), expected)


# laws


@pytest.mark.parametrize("metric", METRICS)
def test_scores_move_with_the_units_and_stand_in_the_frame_of_the_models_given(spec, draw_permutations, metric):
    a, b, p = drawn(SHAPES, 1), drawn(SHAPES, 2), draw_permutations(spec, 3)
    before, after = scores(spec, [a, b], metric), scores(spec, [a, permute(spec, p, b)], metric)
    if metric == "weights":  # the inner product also meets the other group, which is permuted as well
        aligned = permute(spec, {INNER: p[INNER], HIDDEN: np.arange(6, dtype=np.int32)}, b)
        after = {INNER: scores(spec, [a, aligned], metric)[INNER]}
    for group, values in after.items():
        np.testing.assert_allclose(values, before[group][:, :, p[group]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_after_a_matching_the_twin_of_every_unit_is_on_the_diagonal(spec, draw_permutations, metric):
    a = drawn(SHAPES, 1)
    twin = permute(spec, draw_permutations(spec, 3), a)
    if metric == "weights":
        aligned = weight_matching(spec, [a, twin], key=jax.random.key(0)).models
    else:
        aligned = activation_matching(spec, [a, twin], apply=perceptron, data=batches()).models
    best = {"distance": lambda k: np.zeros(len(k)), "correlation": lambda k: np.ones(len(k))}
    for kernel in scores(spec, aligned, metric).values():
        own = kernel[0].diagonal()
        if metric in best:
            np.testing.assert_allclose(own, best[metric](own), atol=1e-4)
            assert (own >= kernel[0].max(1) - 1e-5).all()
        else:
            assert own.sum() == pytest.approx(sum(np.square(a[n]).sum() for n in leaves_of(kernel)), rel=1e-5)


def leaves_of(kernel) -> tuple[str, ...]:
    return ("a", "bias", "b") if kernel.shape[-1] == 8 else ("b", "c")


def test_the_metric_decides_which_units_are_merged(spec):
    a = drawn(SHAPES, 1)
    b = {name: leaf.copy() for name, leaf in a.items()}
    b["a"][:, 2] *= 3  # as alike as ever by correlation, but not by distance
    b["a"][:, 5] = b["a"][::-1, 5]
    ratios = {INNER: 1 / 8}
    for metric, odd in (("correlation", 5), ("distance", 2)):
        plan = partial_plan(spec, ratios=ratios, scores=matched_scores(scores(spec, [a, b], metric)))
        assert plan.labels[INNER][0].tolist().index(7) == odd


def test_every_other_model_has_a_row_and_matched_scores_are_their_mean(spec):
    models = [drawn(SHAPES, seed) for seed in range(3)]
    kernels = scores(spec, models, "correlation")
    assert {g: k.shape for g, k in kernels.items()} == {INNER: (2, 8, 8), HIDDEN: (2, 6, 6)}
    own = [scores(spec, [models[0], other], "correlation")[INNER][0].diagonal() for other in models[1:]]
    np.testing.assert_allclose(matched_scores(kernels)[INNER], np.mean(own, 0), atol=1e-6)


def test_pairs_chosen_together_score_no_less_than_matched_ones(spec):
    models = activation_matching(spec, [drawn(SHAPES, 1), drawn(SHAPES, 2)], apply=perceptron, data=batches()).models
    kernels = scores(spec, models, "correlation")
    merged = {INNER: 5, HIDDEN: 4}
    paired = constrained_plan(spec, merged, kernels={g: k[0] for g, k in kernels.items()})
    matched = partial_plan(spec, merged, scores=matched_scores(kernels))
    for group, k in merged.items():
        totals = []
        for plan in (paired, matched):
            a, b = (np.argsort(labels)[:k] for labels in plan.labels[group])
            totals.append(kernels[group][0][a, b].sum())
        assert totals[0] >= totals[1]


def test_groups_without_activations_score_zero():
    def looked_up(p, x):
        return jnp.tanh(p["a"][x]) @ p["b"]

    params = drawn({"a": (7, 8), "b": (8, 3)}, 0)
    words = jnp.arange(5)
    found = unit_scores(trace_spec(looked_up, params, words), [params, params], apply=looked_up, data=[words])
    assert list(found) == ["a:1"]
    assert not found["a:1"].any()


# bad input


def test_bad_input_is_refused(spec):
    a = drawn(SHAPES, 0)
    for models, hyper, message in (
        ([a], {}, "two models or more"),
        ([a, a], {"metric": "cosine"}, "no metric 'cosine'; choose from"),
        ([a, a], {"apply": None}, "'correlation' needs `apply` and `data`"),
        ([a, a], {"data": None, "metric": "distance"}, "'distance' needs `apply` and `data`"),
        ([a, a], {"data": []}, "data gave no batches"),
        ([a, {**a, "c": a["c"] * np.nan}], {"metric": "weights"}, "'c' of model 1"),
    ):
        with pytest.raises(ValueError, match=message):
            unit_scores(spec, models, **({"apply": perceptron, "data": batches()} | hyper))
