"""What PLeaS must do whatever the models: twins, the order of models, scales of units, few samples."""

import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from sklearn.datasets import load_digits

from permjax.action import permute
from permjax.match.activations import activation_matching
from permjax.merge.block_apply import block_apply
from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.planning import pleas_plan
from permjax.merge.pleas import pleas
from permjax.merge.scale import canonical_scale
from permjax.merge.wide import Wide
from permjax.permutation import random_permutations
from permjax.symmetry.trace import trace_spec

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

X = zoo.image(150, 5)
LIKE = {
    "w1": zoo.shape(5, 8), "b1": zoo.shape(8), "w2": zoo.shape(8, 6), "b2": zoo.shape(6), "w3": zoo.shape(6, 3),
    "b3": zoo.shape(3),
}  # fmt: skip
MODES = ["parallel", "sequential", "separate"]


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]) @ p["w3"] + p["b3"]


@pytest.fixture(scope="module")
def spec():
    with jax.numpy_rank_promotion("allow"):
        return trace_spec(mlp, LIKE, X)


def logits(spec, plan, apply, params, x, **options):
    return jax.jit(block_apply(spec, plan, apply, **options))(params, x)


# twins


GROUPED, STACKED = zoo.grouped_convs(), zoo.stacked_case()
TWINS = {
    "mlp": (mlp, LIKE, X),
    "grouped convolutions": (GROUPED.apply, GROUPED.params, zoo.image(40, 6, 6, 3)),
    "layers in scan": (STACKED.apply, STACKED.params, zoo.tokens(40, 5)),
}
PAIRS = [
    pytest.param("mlp", "parallel", marks=pytest.mark.fast),
    ("mlp", "sequential"),
    ("mlp", "separate"),
    ("grouped convolutions", "sequential"),
    ("grouped convolutions", "separate"),
    ("layers in scan", "parallel"),
]


@pytest.fixture(scope="module")
def twins(drawn):
    """`twins(name)`: (apply, spec, aligned twins, inputs, outputs)."""

    @cache
    def made(name):
        apply, like, x = TWINS[name]
        spec, model = trace_spec(apply, like, x, verify=False), drawn(like, 3)
        twin = permute(spec, jax.device_get(random_permutations(spec, jax.random.key(1))), model)
        aligned = activation_matching(spec, [model, twin], apply=apply, data=[x]).models
        return apply, spec, aligned, x, jax.jit(apply)(model, x)

    return made


@pytest.mark.parametrize(("name", "mode"), PAIRS)
def test_a_network_merged_with_its_permuted_twin_is_itself(twins, plan_of, differ, name, mode):
    apply, spec, aligned, x, wanted = twins(name)
    for ratio in (0, 0.4, 1) if name == "mlp" else (0.4,):
        plan = plan_of(spec, ratio)
        result = pleas(spec, aligned, plan, apply=apply, data=[x], mode=mode, ridge=1e-2)
        assert differ(logits(spec, plan, apply, result.models[0], x), wanted) <= 1e-4
        assert max(result.info.after) <= 1e-9


@pytest.mark.fast
def test_twins_that_own_their_samples_are_themselves(twins, plan_of, differ):
    apply, spec, aligned, x, wanted = twins("mlp")
    plan, owners = plan_of(spec, 0.4), [np.arange(len(x)) % 2]
    result = pleas(spec, aligned, plan, apply=apply, data=[x], mode="sequential", targets="owner", owners=owners)
    assert differ(logits(spec, plan, apply, result.models[0], x), wanted) <= 1e-4


# kept apart


@pytest.mark.parametrize("mode", MODES)
def test_models_kept_apart_are_fitted_to_themselves(spec, drawn, plan_of, differ, mode):
    parents = [{**drawn(LIKE, seed), "b3": np.ones(3, np.float32)} for seed in range(3)]  # one bias fits them all
    plan = plan_of(spec, 1, 3)
    result = pleas(spec, parents, plan, apply=mlp, data=[X], mode=mode, ridge=1e-6)
    wanted = sum(mlp(p, X) for p in parents) / 3
    assert differ(logits(spec, plan, mlp, result.models[0], X), wanted) <= 3e-6


# the order of models


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_models_does_not_matter(spec, drawn, differ, mode):
    aligned = activation_matching(spec, [drawn(LIKE, 0), drawn(LIKE, 1)], apply=mlp, data=[X]).models
    found = []
    for models in (aligned, aligned[::-1]):
        plan = pleas_plan(spec, models, apply=mlp, data=[X], budget=1.4)
        params = pleas(spec, models, plan, apply=mlp, data=[X], mode=mode, ridge=1e-2).models[0]
        found.append((plan, params, logits(spec, plan, mlp, params, X)))
    (one, first, a), (two, second, b) = found
    assert one.widths == two.widths
    assert differ(a, b) <= 1e-4
    for name in ("w1", "b1"):  # equal up to unit order
        mine, theirs = (np.sort(np.asarray(params[name]), -1) for params in (first, second))
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


# scales


def test_with_canonical_scale_the_scale_of_a_parents_units_does_not_matter(spec, drawn, differ):
    a, b = drawn(LIKE, 0), drawn(LIKE, 1)
    first, second = (10 ** np.random.default_rng(s).uniform(-3, 3, n).astype(np.float32) for s, n in ((0, 8), (1, 6)))
    rescaled = {
        **b, "w1": b["w1"] * first, "b1": b["b1"] * first, "w2": b["w2"] / first[:, None] * second,
        "b2": b["b2"] * second, "w3": b["w3"] / second[:, None],
    }  # fmt: skip
    assert differ(mlp(rescaled, X), mlp(b, X)) <= 1e-5

    def merged(*models, canonical=True):
        if canonical:
            models = [canonical_scale(spec, model, apply=mlp, inputs=X).models[0] for model in models]
        aligned = activation_matching(spec, models, apply=mlp, data=[X]).models
        plan = pleas_plan(spec, aligned, apply=mlp, data=[X], budget=1.3)
        result = pleas(spec, aligned, plan, apply=mlp, data=[X])
        return logits(spec, plan, mlp, result.models[0], X)

    assert differ(merged(a, rescaled), merged(a, b)) <= 1e-3
    assert differ(merged(a, rescaled, canonical=False), merged(a, b, canonical=False)) > 1e-2


# few samples


def trained(seed, x, labels):
    """A small MLP on the digits, 150 full batches."""
    sizes = ((64, 24), (24, 24), (24, 10))
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {}
    for i, (key, (n, m)) in enumerate(zip(keys, sizes, strict=True), 1):
        params |= {f"w{i}": jax.random.normal(key, (n, m)) * (2 / n) ** 0.5, f"b{i}": jnp.zeros(m)}
    optimizer = optax.adam(5e-3)

    def loss(p):
        return optax.softmax_cross_entropy_with_integer_labels(mlp(p, x), labels).mean()

    def step(carry, _):
        p, state = carry
        updates, state = optimizer.update(jax.grad(loss)(p), state)
        return (optax.apply_updates(p, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), None, length=150)[0][0]


@pytest.fixture(scope="module")
def digits():
    """(spec, aligned networks, 50 calibration images, test images and labels)."""
    with jax.numpy_rank_promotion("allow"):
        images, labels = load_digits(return_X_y=True)
        x, labels = np.float32(images / 16), jnp.asarray(labels)
        train = jax.jit(trained, static_argnums=0)
        models = [jax.tree.map(np.asarray, train(seed, x[:1200], labels[:1200])) for seed in (0, 1)]
        spec, few = trace_spec(mlp, models[0], x[:1], verify=False), [x[:50]]
        aligned = activation_matching(spec, models, apply=mlp, data=few).models
        return spec, aligned, few, x[1200:], labels[1200:]


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("budget", [1, 1.5])
def test_few_samples_do_no_harm_but_warn(digits, budget, mode):
    spec, aligned, few, x, labels = digits
    plan = pleas_plan(spec, aligned, apply=mlp, data=few, budget=budget)

    def accuracy(params):
        return 100 * float((logits(spec, plan, mlp, params, x).argmax(-1) == labels).mean())

    permuted = wide_average(Wide(spec, plan), aligned, contracted_axes(mlp, aligned[0], x[:1]))
    with pytest.warns(UserWarning, match=r"layers have fewer equations than unknowns \(layer 'w1': 50 for 65\)"):
        fitted = pleas(spec, aligned, plan, apply=mlp, data=few, mode=mode)
    assert accuracy(fitted.models[0]) >= accuracy(permuted) - 1
    assert fitted.info.samples == 50
    assert (fitted.info.ridge == 0.1).all()


@pytest.mark.fast
def test_enough_samples_do_not_warn(spec, drawn, plan_of):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pleas(spec, [drawn(LIKE, 0), drawn(LIKE, 1)], plan_of(spec, 0.5), apply=mlp, data=[X])
