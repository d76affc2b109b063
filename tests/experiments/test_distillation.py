"""Distillation: the loss falls, masks hide what they should, frozen leaves stay, and a seed decides everything."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from permjax.experiments.distillation import distill, weighted_error
from permjax.nets.registry import build, config_from_dict
from permjax.tree import flatten

KEY = jax.random.key(0)
X = [np.random.default_rng(i).standard_normal((n, 5)).astype(np.float32) for i, n in enumerate((20, 20, 20, 7))]


def network(seed: int):
    rng = np.random.default_rng(seed)
    shapes = {"w": (5, 16), "b": (16,), "heads": {"one": (16, 3), "two": (16, 2)}, "mean": (16,)}
    draw = lambda shape: (0.5 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    weights = jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return {**weights, "count": np.int32(3)}


def apply(p, x):
    x = jax.nn.relu(x @ p["w"] + (p["b"] - p["mean"])[None])
    return x @ p["heads"]["one"], x @ p["heads"]["two"]


TARGETS = [apply(network(1), x) for x in X]


def fit(**hyper):
    given = {"targets": TARGETS, "batches": X, "steps": 60, "learning_rate": 1e-2, "key": KEY, "frozen": "mean"}
    return distill(apply, network(2), **{**given, **hyper})


def test_the_loss_falls_on_targets_of_several_heads():
    student, losses = fit(steps=400)
    assert losses.shape == (400,)
    assert losses[-4:].mean() < 0.05 * losses[:4].mean()
    far = [
        [np.square(np.subtract(*pair)).mean() for pair in zip(apply(p, X[0]), TARGETS[0], strict=True)]
        for p in (student, network(2))
    ]
    assert all(now < 0.1 * before for now, before in zip(*far, strict=True))


def test_the_steps_are_adams_with_a_rate_that_falls_along_a_cosine():
    start = network(2)
    student, losses = fit(batches=X[:1], targets=TARGETS[:1], steps=3, frozen=["mean", "b", "heads/*"])

    def loss(w):
        one, two = apply({**start, "w": w}, X[0])
        return (jnp.square(one - TARGETS[0][0]).sum() + jnp.square(two - TARGETS[0][1]).sum()) / (20 * 5)

    rule, w = optax.scale_by_adam(), start["w"]
    state = rule.init(w)
    for step, found in enumerate(losses):
        assert found == pytest.approx(float(loss(w)), rel=1e-5)
        update, state = rule.update(jax.grad(loss)(w), state)
        w = w - 1e-2 * (1 + np.cos(np.pi * step / 3)) / 2 * update
    np.testing.assert_allclose(student["w"], w, atol=1e-6)


def test_what_is_frozen_or_an_integer_stays():
    start, (student, _) = network(2), fit(frozen=["mean", "heads/*"])
    for name, leaf in flatten(start).items():
        same = np.array_equal(leaf, flatten(student)[name])
        assert same == (name not in ("w", "b")), name


def test_the_same_key_gives_the_same_bits_and_another_one_another_order():
    (a, one), (b, two), (_, other) = fit(), fit(), fit(key=jax.random.key(1))
    np.testing.assert_array_equal(one, two)
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
    assert not np.array_equal(one, other)


def test_every_batch_is_used_once_before_any_comes_again_in_another_order():
    loud = [jax.tree.map(lambda t, i=i: t * 0 + 10.0**i, target) for i, target in enumerate(TARGETS)]
    _, losses = fit(targets=loud, steps=24, learning_rate=1e-9)
    rounds = np.round(np.log10(losses) / 2).reshape(6, 4)
    for part in rounds:
        assert sorted(part)[1:] == [1, 2, 3]
    assert len(np.unique(rounds, axis=0)) > 1


def test_a_mask_hides_targets_of_other_domains_whatever_they_hold():
    own = [(np.arange(len(x)) % 2 == 0).astype(np.float32) for x in X]
    masks = [(mask, 1 - mask) for mask in own]
    hidden = [
        tuple(np.where(w[:, None] > 0, t, np.nan) for t, w in zip(target, mask, strict=True))
        for target, mask in zip(TARGETS, masks, strict=True)
    ]
    (a, one), (b, two) = fit(targets=hidden, weights=masks), fit(weights=masks)
    np.testing.assert_array_equal(one, two)
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
    assert not np.array_equal(one, fit()[1])


def test_a_head_whose_samples_are_all_masked_learns_nothing():
    masks = [(np.ones(len(x), np.float32), np.zeros(len(x), np.float32)) for x in X]
    student, _ = fit(weights=masks)
    np.testing.assert_array_equal(student["heads"]["two"], network(2)["heads"]["two"])
    assert not np.array_equal(student["heads"]["one"], network(2)["heads"]["one"])


def test_the_error_is_a_weighted_mean_over_entries():
    rng = np.random.default_rng(0)
    out, target = rng.standard_normal((2, 6, 3)).astype(np.float32)
    w = np.array([0, 1, 2, 0, 0.5, 1], np.float32)
    expected = np.average(np.square(out - target).mean(1), weights=w)
    assert weighted_error(out, target, w) == pytest.approx(expected, rel=1e-6)
    assert weighted_error(out, target) == pytest.approx(np.square(out - target).mean(), rel=1e-6)
    assert weighted_error(out, target, np.zeros(6, np.float32)) == 0.0


def test_a_network_in_training_mode_moves_its_running_statistics():
    config = {"model_type": "vgg", "layers": [4], "hidden": [5], "input_shape": [6, 6], "norm": "batch"}
    net = build(config_from_dict(config))
    x = [jnp.asarray(np.random.default_rng(i).random((12, 6, 6), np.float32)) for i in range(2)]
    targets, start = [net.apply(net.init(jax.random.key(1)), a) for a in x], net.init(jax.random.key(2))
    hyper = {"key": KEY, "steps": 20, "learning_rate": 1e-2, "frozen": "batch_stats/*"}
    still, one = distill(net.apply, start, targets, x, **hyper)
    moved, two = distill(net.apply_train, start, targets, x, stateful=True, **hyper)
    for name, leaf in flatten(start["batch_stats"]).items():
        np.testing.assert_array_equal(flatten(still["batch_stats"])[name], leaf)
        assert np.abs(np.asarray(flatten(moved["batch_stats"])[name]) - leaf).max() > 1e-2
    assert one[-1] < one[0]
    assert two[-1] < two[0]


def test_bad_input_is_refused():
    for hyper, message in (
        ({"targets": TARGETS[:2]}, "There are 4 batches but targets for 2"),
        ({"weights": TARGETS[:3]}, "There are 4 batches but weights for 3"),
        ({"batches": [], "targets": []}, "There are 0 batches"),
        ({"steps": 0}, "4 batches and 0 steps"),
        ({"frozen": ["means"]}, "No leaf matches 'means', which should be frozen .nearest: 'mean'"),
        ({"frozen": "*"}, "nothing to fit"),
        ({"targets": [t[0] for t in TARGETS]}, "The outputs are .* but the targets"),
        ({"targets": [(t[0], t[0]) for t in TARGETS]}, r"shape \(\d+, 2\) has a target of shape \(\d+, 3\)"),
        ({"weights": [(np.ones(3), np.ones(3))] * 4}, r"weights of shape \(3,\)"),
        ({"targets": [jax.tree.map(lambda t: t * np.nan, t) for t in TARGETS]}, "The loss is nan at step 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(**hyper)
