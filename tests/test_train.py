"""Training: metrics against NumPy, seeds, steps against hand-written loops, resuming, and learning at all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from permjax import train as training
from permjax.data.generated import markov_tokens
from permjax.data.registry import load
from permjax.nets.registry import build, config_from_dict
from permjax.train import TrainConfig, cross_entropy, evaluate, lm_loss, make_optimizer, train
from permjax.tree import unstack

pytestmark = pytest.mark.fast

NET = build(config_from_dict({"model_type": "mlp", "input_shape": [6], "hidden": [8], "classes": 3}))
BLOBS = load("blobs", features=6, classes=3, examples=100)
CONFIG = TrainConfig(epochs=3, batch_size=20, learning_rate=0.01)


def assert_same(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance) if tolerance else np.testing.assert_array_equal(x, y)


def test_cross_entropy_is_the_mean_of_minus_log_softmax():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 5, 4)), rng.integers(0, 4, (2, 5))
    chances = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = -np.log(np.take_along_axis(chances, labels[..., None], -1)).mean()
    assert float(cross_entropy(jnp.float32(logits), jnp.int32(labels))) == pytest.approx(expected, rel=1e-5)


def test_the_language_loss_compares_each_position_with_the_next_token():
    tokens = jnp.array([[1, 2, 0]])
    right = 50.0 * jax.nn.one_hot(jnp.array([[2, 0, 1]]), 3)
    assert float(lm_loss(right, tokens)) == pytest.approx(0, abs=1e-6)
    assert float(lm_loss(jnp.zeros((1, 3, 3)), tokens)) == pytest.approx(np.log(3), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 20, 1000])
def test_evaluation_in_batches_is_evaluation_at_once(batch_size):
    params = NET.init(jax.random.key(0))
    x, y = jnp.asarray(BLOBS.x_test), jnp.asarray(BLOBS.y_test)
    loss, right = evaluate(NET.apply, params, x, y, batch_size)
    logits = NET.apply(params, x)
    assert float(loss) == pytest.approx(float(cross_entropy(logits, y)), rel=1e-5)
    assert float(right) == pytest.approx(float((logits.argmax(-1) == y).mean()), rel=1e-5)


def test_training_takes_the_steps_of_a_plain_loop():
    result = train(NET, BLOBS, CONFIG, [3])
    optimizer = make_optimizer(CONFIG, 4)
    params = NET.init(jax.random.fold_in(jax.random.key(3), 0))
    state = optimizer.init(params)
    loss = jax.jit(jax.value_and_grad(lambda p, x, y: cross_entropy(NET.apply(p, x), y)))
    history = []
    for epoch in range(3):
        order = np.random.default_rng((3, epoch)).permutation(80).reshape(4, 20)
        values = []
        for rows in order:
            value, gradient = loss(params, BLOBS.x_train[rows], BLOBS.y_train[rows])
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            values.append(float(value))
        history.append(np.mean(values))
    assert_same(unstack(result.params)[0], params, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.history["loss"][:, 0], history, rtol=1e-5)


def test_seeds_together_are_seeds_alone_and_differ_from_one_another():
    together = train(NET, BLOBS, CONFIG, [0, 5])
    first, second = unstack(together.params)
    for seed, params in ((0, first), (5, second)):
        assert_same(unstack(train(NET, BLOBS, CONFIG, [seed]).params)[0], params, rtol=1e-4, atol=1e-6)
    kernels = [model["params"]["Dense_0"]["kernel"] for model in (first, second)]
    assert not np.any(kernels[0] == kernels[1])
    assert together.history["test_accuracy"].shape == (3, 2)


def test_one_step_per_call_is_one_epoch_per_call(monkeypatch):
    at_once = train(NET, BLOBS, CONFIG, [0, 1])
    monkeypatch.setattr(training, "_pieces", lambda *_: training._Pieces(1, 1))
    in_pieces = train(NET, BLOBS, CONFIG, [0, 1])
    assert_same(at_once.params, in_pieces.params, rtol=1e-4, atol=1e-6)
    assert_same(at_once.history, in_pieces.history, rtol=1e-4)


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 1])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, stop):
    def kill(epoch, metrics):
        if epoch == stop:
            raise Killed

    whole = train(NET, BLOBS, CONFIG, [0, 1])
    with pytest.raises(Killed):
        train(NET, BLOBS, CONFIG, [0, 1], checkpoint_dir=tmp_path, progress=kill)
    seen = []
    resumed = train(NET, BLOBS, CONFIG, [0, 1], checkpoint_dir=tmp_path, progress=lambda epoch, _: seen.append(epoch))
    assert seen == list(range(stop + 1, 3))
    assert_same(whole, resumed)
    assert_same(whole, train(NET, BLOBS, CONFIG, [0, 1], checkpoint_dir=tmp_path))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seeds": [0, 2]}, "seeds"),
        ({"config": TrainConfig(epochs=1, batch_size=40)}, "training"),
        ({"data": (BLOBS.x_train + 1, BLOBS.y_train)}, "data"),
        ({"net": build(config_from_dict({"model_type": "mlp", "input_shape": [6], "hidden": [9]}))}, "net"),
    ],
)
def test_the_state_of_another_run_is_not_resumed(tmp_path_factory, change, word):
    folder = tmp_path_factory.getbasetemp() / "other run"
    own = {"net": NET, "data": (BLOBS.x_train, BLOBS.y_train), "seeds": [0]}
    own["config"] = TrainConfig(epochs=1, batch_size=80)
    train(**own, checkpoint_dir=folder)
    with pytest.raises(ValueError, match=f"another run: its {word} is"):
        train(**own | change, checkpoint_dir=folder)


@pytest.mark.parametrize(
    ("fields", "rates"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"schedule": "cosine"}, [1, 0.854, 0.5, 0.146, 0]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"warmup_steps": 4, "schedule": "linear"}, [0, 0.5, 1, 0.5, 0]),
    ],
)
def test_schedules_rise_and_fall_as_named(fields, rates):
    schedule = training._schedule(TrainConfig(learning_rate=1.0, **fields), 8)
    np.testing.assert_allclose([schedule(step) for step in (0, 2, 4, 6, 8)], rates, atol=1e-3)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_weight_decay_shrinks_matrices_but_not_biases(name):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = make_optimizer(TrainConfig(optimizer=name, weight_decay=0.1, learning_rate=0.1), 1)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    assert (updates["kernel"] < 0).all()
    assert (updates["bias"] == 0).all()


def test_running_statistics_are_trained_along_and_never_decayed():
    values = {"model_type": "resnet", "channels": [4], "blocks": [1], "norm": "batch", "input_shape": [8, 8]}
    net, digits = build(config_from_dict(values)), load("digits", train_size=200)
    config = TrainConfig(epochs=3, batch_size=50, optimizer="sgd", learning_rate=0.3, weight_decay=1e-3)
    result = train(net, (digits.x_train, digits.y_train), config, [0])
    (params,) = unstack(result.params)
    x, y = jnp.asarray(digits.x_train), jnp.asarray(digits.y_train)
    assert set(result.history) == {"loss", "accuracy"}
    assert result.history["loss"][-1, 0] < result.history["loss"][0, 0]
    assert (params["batch_stats"]["BatchNorm_0"]["var"] > 0).all()
    by_batch = cross_entropy(jax.jit(net.apply_train)(params, x)[0], y)
    by_running = evaluate(net.apply, params, x, y)[0]
    assert float(by_running) == pytest.approx(float(by_batch), abs=0.3)


def test_an_augmentation_is_applied_to_training_batches_with_fresh_keys():
    def noise(key, x):
        return x + 100 * jax.random.normal(key, x.shape)

    plain, noisy, again = (train(NET, BLOBS, CONFIG, [0], augment=f) for f in (None, noise, noise))
    assert noisy.history["loss"][0, 0] > 5 * plain.history["loss"][0, 0]
    assert_same(noisy.params, again.params)


def test_several_models_learn_digits_at_once():
    net = build(config_from_dict({"model_type": "mlp", "hidden": [64, 64]}))
    result = train(net, load("digits"), TrainConfig(epochs=25), seeds=range(3))
    assert (result.history["test_accuracy"][-1] > 0.95).all()


def test_a_language_model_learns_the_table_of_a_chain():
    values = {"vocab_size": 8, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    net = build(config_from_dict({"model_type": "gpt2"} | values))
    tokens = markov_tokens(jax.random.key(0), 256, 17, 8)
    config = TrainConfig(epochs=15, batch_size=32, optimizer="adamw", learning_rate=0.01)
    result = train(net, (tokens[:, :-1], tokens[:, 1:]), config, [0])
    least = -(0.8 * np.log(0.8) + 0.2 * np.log(0.2))  # nats per token where the two successors differ
    assert result.history["loss"][-1, 0] < least + 0.15 < result.history["loss"][0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, "give one per model"),
        ({"seeds": [0, -1]}, r"\[0, -1\]; give one per model, from 0 on"),
        ({"config": TrainConfig(batch_size=81)}, "batch size is 81, but there are 80 training examples"),
        ({"data": (BLOBS.x_train, BLOBS.y_train, BLOBS.x_test)}, "not 3 arrays"),
        ({"data": (BLOBS.x_train, BLOBS.y_test)}, "80 training inputs but 20 training labels"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        train(**{"net": NET, "data": BLOBS, "config": CONFIG, "seeds": [0]} | change)
