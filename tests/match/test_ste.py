"""Straight-through matching: gradients of hard permutations, planted orders, honest selection, several models."""

import dataclasses
from itertools import combinations, islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax import tree
from permjax.action import permute
from permjax.match.sinkhorn import balance
from permjax.match.ste import SteMatching, ste_matching
from permjax.match.ste_latents import LATENTS, Task, advance, begin
from permjax.permutation import identity, random_permutations, validate
from permjax.plan import Plan
from permjax.steps import MergeState
from permjax.symmetry.spec import Of, PermutationSpec, Product

WIDTHS = (6, 24, 24, 4)


def logits(p, x):
    for i in range(len(WIDTHS) - 2):
        x = jax.nn.relu(x @ p[f"{i}/kernel"] + p[f"{i}/bias"][None])
    i = len(WIDTHS) - 2
    return x @ p[f"{i}/kernel"] + p[f"{i}/bias"][None]


def loss(p, batch):
    x, y = batch
    return -jnp.take_along_axis(jax.nn.log_softmax(logits(p, x)), y[:, None], axis=1).mean()


def draw_batches(count=10, size=64, seed=0):
    """Points on a sphere whose class is the quadrant of two of their coordinates."""
    found = []
    for rng in (np.random.default_rng((seed, i)) for i in range(count)):
        x = rng.standard_normal((size, WIDTHS[0]), np.float32)
        found.append((x, (2 * (x[:, 0] > 0) + (x[:, 1] * x[:, 2] > 0)).astype(np.int32)))
    return found


@jax.jit
def trained(params, batches):
    def step(params, batch):
        slope = jax.grad(loss)(params, batch)
        return jax.tree.map(lambda w, g: w - jnp.float32(0.3) * g, params, slope), None

    return jax.lax.fori_loop(0, 60, lambda _, p: jax.lax.scan(step, p, batches)[0], params)


@pytest.fixture(scope="module")
def spec(write_chain):
    return write_chain(WIDTHS)


@pytest.fixture(scope="module")
def models(spec, draw_params):
    batches = tree.stack(draw_batches())
    scale = {leaf.name: np.float32(leaf.shape[0] ** -0.5 if len(leaf.shape) == 2 else 0) for leaf in spec.leaves}
    starts = [{n: scale[n] * x for n, x in draw_params(spec, seed).items()} for seed in range(3)]
    return tuple(jax.tree.map(np.asarray, trained(start, batches)) for start in starts)


@pytest.fixture(scope="module")
def shuffled(spec, models):
    """The first model in another order."""
    return permute(spec, jax.tree.map(np.asarray, random_permutations(spec, jax.random.key(5))), models[0])


def mean_loss(models, batches):
    return float(np.mean([loss(tree.average(models), batch) for batch in batches]))


def assert_same_order(result, other):
    for model in range(result.plan.models):
        for group, rows in result.plan.permutations(model).items():
            np.testing.assert_array_equal(rows, other.plan.permutations(model)[group])


def match(spec, models, **hyper):
    hyper = {"loss": loss, "data": draw_batches(), "key": jax.random.key(0)} | hyper
    return ste_matching(spec, models, **hyper)


def test_matrices_move_along_the_gradient_at_the_hard_permutations(write_chain, draw_params):
    spec = write_chain((6, 5, 4))
    a, b = draw_params(spec, 0), draw_params(spec, 1)
    p = jax.tree.map(np.asarray, random_permutations(spec, jax.random.key(1)))
    x = draw_batches(1)[0][0]

    def square(params, x):
        hidden = jnp.tanh(x @ params["0/kernel"] + params["0/bias"][None])
        return ((hidden @ params["1/kernel"] + params["1/bias"][None]) ** 2).mean()

    def with_matrix(matrix):
        moved = b | {"0/kernel": b["0/kernel"] @ matrix.T, "0/bias": matrix @ b["0/bias"]}
        moved |= {"1/kernel": matrix @ b["1/kernel"]}
        return square({name: (a[name] + leaf) / 2 for name, leaf in moved.items()}, x)

    task = Task(spec, (a, b), square, 0.01, "scipy")
    before = begin(LATENTS["permutation"], task, jax.random.key(0))
    start = np.array(before.latents[0]["h1"])
    after, value = advance(LATENTS["permutation"], task, before, [p], jnp.full(2, 0.5, jnp.float32), x)
    hard = np.eye(5, dtype=np.float32)[p["h1"]]
    slope = jax.grad(with_matrix)(hard)
    assert float(value) == pytest.approx(float(with_matrix(hard)), rel=1e-5)
    np.testing.assert_allclose(after.moments[0].mu[0]["h1"], 0.1 * slope, rtol=1e-3, atol=1e-6)
    expected = balance(jnp.maximum(start - np.float32(0.01) * np.sign(slope), 1e-12))
    np.testing.assert_allclose(after.latents[0]["h1"], expected, atol=1e-4)


def test_latent_weights_bring_a_permuted_copy_back_exactly(spec, models, shuffled):
    result = match(spec, [models[0], shuffled], latent="weights", steps=10, patience=3)
    for name, leaf in models[0].items():
        np.testing.assert_array_equal(result.models[1][name], leaf)
    assert result.info.converged.all()
    assert result.info.steps[0] < 10
    np.testing.assert_array_equal(
        permute(spec, result.plan.permutations(1), shuffled)["1/kernel"], models[0]["1/kernel"]
    )


def test_latent_matrices_find_an_order_with_a_low_loss(spec, models, shuffled):
    batches = draw_batches(4, seed=1)
    result = match(spec, [models[0], shuffled], steps=80)
    naive, found, own = (mean_loss(m, batches) for m in ((models[0], shuffled), result.models, models[:1]))
    assert naive > own + 0.4
    assert found < naive - 0.25 * (naive - own)
    assert not result.info.converged.any()
    assert result.info.steps.tolist() == [80]


@pytest.mark.parametrize("latent", LATENTS)
def test_the_choice_is_made_on_data_held_back_and_never_falls_behind_the_start(spec, models, latent):
    data = draw_batches()
    held, rest = data[::5], [batch for i, batch in enumerate(data) if i % 5]
    result = match(spec, models[:2], latent=latent, steps=12, every=4)
    losses, best = result.info.validation[0], result.info.best[0]
    assert losses[0] == pytest.approx(mean_loss(models[:2], held), rel=1e-5)
    assert losses[best] == np.nanmin(losses) == pytest.approx(mean_loss(result.models, held), rel=1e-5)
    assert np.flatnonzero(np.isfinite(losses)).tolist() <= [0, 1, 5, 9, 13]
    assert losses.shape == (14,)
    assert result.info.loss.shape == (1, 12)
    assert_same_order(match(spec, models[:2], latent=latent, steps=12, every=4, data=rest, validation=held), result)


def test_models_that_lie_well_stay(spec, models):
    result = match(spec, [models[0], models[0]], steps=6)
    assert result.info.best.tolist() == [0]
    for group, rows in identity(spec).items():
        np.testing.assert_array_equal(result.plan.permutations(1)[group], rows)


@pytest.mark.parametrize("latent", LATENTS)
def test_three_models_are_aligned_together(spec, models, latent):
    batches = draw_batches(4, seed=1)
    result = match(spec, models, latent=latent, steps=40)
    assert result.models[0] is models[0]
    assert result.plan.models == 3
    assert mean_loss(result.models, batches) < mean_loss(models, batches) - 0.1
    corners = [result.models, *combinations(result.models, 2)]
    chosen = np.mean([mean_loss(corner, draw_batches()[::5]) for corner in corners])
    assert result.info.validation[0, result.info.best[0]] == pytest.approx(chosen, rel=1e-4)


def test_apart_every_model_is_aligned_to_the_anchor_alone(spec, models):
    apart = match(spec, models, steps=8, together=False)
    pair = match(spec, models[:2], steps=8)
    assert apart.info.loss.shape == (2, 8)
    assert pair.info.loss.shape == (1, 8)
    np.testing.assert_array_equal(apart.info.loss[0], pair.info.loss[0])
    for group, rows in pair.plan.permutations(1).items():
        np.testing.assert_array_equal(apart.plan.permutations(1)[group], rows)


@pytest.mark.parametrize("latent", LATENTS)
def test_the_same_key_gives_the_same_result(spec, models, latent):
    one, two = (match(spec, models, latent=latent, steps=4) for _ in range(2))
    assert_same_order(one, two)
    np.testing.assert_array_equal(one.info.loss, two.info.loss)
    other = match(spec, models, latent=latent, steps=4, key=jax.random.key(1))
    assert not np.array_equal(one.info.loss, other.info.loss)


def test_heads_and_their_inner_orders_are_searched_together(draw_params):
    inner = {"q": ("head", "qk"), "k": ("head", "qk"), "v": ("head", "vo")}
    axes = {name: (None, Product(tuple(map(Of, groups)))) for name, groups in inner.items()}
    axes["out"] = (axes["v"][1], None)
    shapes = {"q": (6, 12), "k": (6, 12), "v": (6, 9), "out": (9, 6)}
    per = {"qk": ("head",), "vo": ("head",)}
    spec = PermutationSpec.from_axes(shapes, axes, sizes={"head": 3, "qk": 4, "vo": 3}, per=per)
    a = draw_params(spec)
    b = permute(spec, jax.tree.map(np.asarray, random_permutations(spec, jax.random.key(2))), a)

    def attend(p, x):
        query, key, value = ((x @ p[name]).reshape((*x.shape[:2], 3, -1)) for name in "qkv")
        scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", query, key) / 4, axis=-1)
        return jnp.einsum("bhts,bshd->bthd", scores, value).reshape((*x.shape[:2], -1)) @ p["out"]

    def imitate(p, batch):
        x, answer = batch
        return ((attend(p, x) - answer) ** 2).mean()

    inputs = [np.random.default_rng(i).standard_normal((8, 5, 6), np.float32) for i in range(4)]
    batches = [(x, attend(a, x)) for x in inputs]
    result = ste_matching(spec, [a, b], loss=imitate, data=batches, key=jax.random.key(0), steps=30)
    validate(spec, result.plan.permutations(1))
    assert result.info.validation[0, result.info.best[0]] < 0.8 * result.info.validation[0, 0]
    np.testing.assert_allclose(attend(result.models[1], inputs[0]), batches[0][1], atol=1e-4)


@pytest.mark.parametrize("latent", LATENTS)
def test_half_precision_models_keep_their_dtype(spec, models, latent):
    halves = [{name: jnp.asarray(leaf, jnp.bfloat16) for name, leaf in model.items()} for model in models[:2]]

    def wide(params, batch):
        return loss({name: leaf.astype(jnp.float32) for name, leaf in params.items()}, batch)

    result = match(spec, halves, loss=wide, latent=latent, steps=3)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in result.models[1].values())
    assert np.isfinite(result.info.loss).all()


def test_the_step_does_what_the_function_does(spec, models):
    state = MergeState.create(spec, models, key=jax.random.key(3), loss=loss, labelled=draw_batches())
    after = SteMatching("weights", steps=2)(state)
    _, key = state.split()
    expected = match(spec, models, key=key, latent="weights", steps=2)
    assert isinstance(after.plan, Plan)
    for group, rows in expected.plan.permutations(2).items():
        np.testing.assert_array_equal(after.plan.permutations(2)[group], rows)
    for name in ("loss", "labelled"):
        with pytest.raises(ValueError, match=f"SteMatching needs `{name}`"):
            SteMatching()(dataclasses.replace(state, **{name: None}))


def test_bad_input_is_refused(spec, models):
    pair, poisoned = models[:2], [(x, y) for x, y in draw_batches(3)]
    poisoned[2] = (np.full_like(poisoned[2][0], np.nan), poisoned[2][1])
    for given, hyper, message in (
        (models[:1], {}, "two models or more"),
        ([models[0], models[1] | {"0/bias": np.full(24, np.nan, np.float32)}], {}, "'0/bias' of model 1 holds 24 NaN"),
        (pair, {"latent": "weight"}, "no latent 'weight'.*nearest: 'weights'"),
        (pair, {"data": []}, "data gave 0 batches"),
        (pair, {"data": draw_batches(1)}, "data gave 1 batches.*without `validation` two"),
        (pair, {"data": iter(draw_batches())}, "data can be read only once"),
        (pair, {"validation": iter(draw_batches())}, "validation can be read only once"),
        (pair, {"data": poisoned, "steps": 4}, "the loss at step 2 is nan"),
        (pair, {"validation": [poisoned[2]]}, "the loss on the data held back is nan"),
        (pair, {"loss": lambda p, batch: logits(p, batch[0])}, r"must return a scalar, not .*\(64, 4\)"),
        (pair, {"steps": 0}, "must be at least 1, not 0"),
        (pair, {"learning_rate": -0.1}, "learning rate positive, not -0.1"),
        (pair, {"solver": "simplex"}, "no solver 'simplex'"),
    ):
        with pytest.raises(ValueError, match=message):
            match(spec, given, **hyper)


def test_a_loader_is_read_again_when_its_batches_end(spec, models):
    class Loader:
        reads = 0

        def __iter__(self):
            Loader.reads += 1
            return iter(islice(draw_batches(), 3))

    result = match(spec, models[:2], data=Loader(), steps=5, every=10)
    listed = match(spec, models[:2], data=draw_batches()[:3], steps=5, every=10)
    assert_same_order(result, listed)
    assert Loader.reads > 2
