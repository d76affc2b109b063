"""The networks themselves: shapes, leaves, precision, training mode, causality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.nets.registry import build, config_from_dict
from permjax.tree import flatten

pytestmark = pytest.mark.fast

IMAGE = [8, 8, 3]
SMALL = {
    "mlp": {"model_type": "mlp", "hidden": [6, 5], "norm": "layer"},
    "vgg": {"model_type": "vgg", "layers": [4, "M", 6, "M"], "hidden": [5], "input_shape": IMAGE},
    "vgg_batch": {
        "model_type": "vgg",
        "layers": [4, "M", 6],
        "hidden": [5],
        "norm": "batch",
        "input_shape": [8, 8],
    },
    "resnet": {"model_type": "resnet", "channels": [4, 6], "blocks": [1, 1], "input_shape": IMAGE},
    "resnet_batch": {
        "model_type": "resnet",
        "channels": [4, 6],
        "blocks": [1, 1],
        "norm": "batch",
        "input_shape": [8, 8],
    },
    "vit": {"model_type": "vit", "width": 12, "depth": 1, "heads": 3, "mlp": 16, "input_shape": IMAGE},
    "gpt2": {"model_type": "gpt2", "vocab_size": 11, "n_positions": 9, "n_embd": 12, "n_layer": 1, "n_head": 3},
    "gpt2_untied": {
        "model_type": "gpt2",
        "vocab_size": 11,
        "n_positions": 9,
        "n_embd": 12,
        "n_layer": 1,
        "n_head": 3,
        "n_inner": 20,
        "tie_word_embeddings": False,
        "prefix": "transformer.",
    },
    "llama": {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 9,
        "attention_bias": True,
    },
}
LANGUAGE = ("gpt2", "gpt2_untied", "llama")


def net_of(name):
    return build(config_from_dict(SMALL[name]))


def abstract(net):
    return jax.eval_shape(net.init, jax.random.key(0))


def random_params(net, dtype=np.float32):
    """Random weights of a size that makes every leaf matter; what must be positive is."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        values = rng.uniform(0.5, 1.5, leaf.shape) if leaf.ndim < 2 else rng.normal(size=leaf.shape) * 0.4
        return jnp.asarray(values.astype(dtype))

    return jax.tree.map(draw, abstract(net))


@pytest.mark.parametrize("name", SMALL)
def test_apply_gives_one_row_of_logits_per_example_that_depends_on_it_alone(name):
    net = net_of(name)
    params, apply = random_params(net), jax.jit(net.apply)
    (x,) = net.example_inputs(3)
    logits, other = apply(params, x), apply(params, x.at[1].set(x[2]))
    assert logits.shape == ((3, 9, 11) if name in LANGUAGE else (3, 10))
    np.testing.assert_allclose(other, logits[np.array([0, 2, 2])], rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(logits[1] - logits[2]).max()) > 1e-2


@pytest.mark.parametrize("name", SMALL)
def test_everything_runs_in_float64_when_the_parameters_do(name):
    net = net_of(name)
    (x,) = net.example_inputs(2)
    with jax.enable_x64(True):
        wide = x.astype(jnp.float64) if x.dtype == jnp.float32 else x
        jaxpr = str(jax.make_jaxpr(net.apply)(random_params(net, np.float64), wide))
    assert "f64[" in jaxpr
    assert "f32[" not in jaxpr
    assert "bf16[" not in jaxpr


@pytest.mark.parametrize("name", SMALL)
def test_every_leaf_matters(name):
    """A leaf that changes nothing would be one that the network forgot; softmax itself forgets the bias of keys."""
    net = net_of(name)
    (x,) = net.example_inputs(2)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(net.apply(p, x)).sum()))(random_params(net))
    idle = [leaf for leaf, values in flatten(gradient).items() if not np.abs(values).max() > 1e-4]
    assert idle == [leaf for leaf in flatten(gradient) if leaf.endswith("key/bias")]


@pytest.mark.parametrize("name", ["vgg_batch", "resnet_batch"])
def test_training_moves_running_statistics_to_those_of_the_batch(name):
    net = net_of(name)
    params = random_params(net)
    (x,) = net.example_inputs(16)
    step = jax.jit(net.apply_train)
    outputs, after = step(params, x)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    old, new = flatten(params), flatten(after)
    moved = {leaf for leaf in old if not np.array_equal(old[leaf], new[leaf])}
    assert moved == {leaf for leaf in old if leaf.startswith("batch_stats/")}
    for _ in range(100):  # each step goes a tenth of the way
        after = step(after, x)[1]
    evaluate = jax.jit(net.apply)
    np.testing.assert_allclose(evaluate(after, x), outputs, rtol=1e-3, atol=1e-3)
    assert float(jnp.abs(evaluate(params, x) - outputs).max()) > 0.1


@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_without_running_statistics_training_mode_is_evaluation_mode(name):
    net = net_of(name)
    params = random_params(net)
    outputs, after = jax.jit(net.apply_train)(params, *net.example_inputs(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), after, params))
    np.testing.assert_array_equal(outputs, jax.jit(net.apply)(params, *net.example_inputs(2)))


def test_a_batchnorm_resnet_50_has_320_leaves_with_its_statistics():
    values = {
        "model_type": "resnet",
        "input_shape": [224, 224, 3],
        "channels": [64, 128, 256, 512],
        "blocks": [3, 4, 6, 3],
        "classes": 1000,
        "norm": "batch",
        "block": "bottleneck",
        "stem": "imagenet",
    }
    net = build(config_from_dict(values))
    leaves = flatten(abstract(net))
    assert len(leaves) == 320
    convolutions = sum(int(np.prod(leaf.shape)) for leaf in leaves.values() if leaf.ndim == 4)
    assert convolutions == 23_454_912  # as published


def test_resnet_20_has_as_many_convolution_weights_as_published():
    net = build(config_from_dict({"model_type": "resnet"}))
    leaves = flatten(abstract(net)).values()
    in_blocks = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    shortcuts = 16 * 32 + 32 * 64
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves if leaf.ndim == 4) == in_blocks + shortcuts


def test_the_width_multiplier_multiplies_every_channel():
    shapes = [flatten(abstract(build(config_from_dict(SMALL["resnet"] | {"width": w})))) for w in (1, 3)]
    kernel = "params/BasicBlock_1/Conv_1/kernel"
    assert shapes[0][kernel].shape == (3, 3, 6, 6)
    assert shapes[1][kernel].shape == (3, 3, 18, 18)


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_token_sees_all_earlier_ones_in_their_order_and_no_later_one(name):
    net = net_of(name)
    params, apply = random_params(net), jax.jit(net.apply)
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 6, 7, 8, 9]], jnp.int32)
    logits = apply(params, tokens)
    for changed in (tokens.at[0, 5].set(0), tokens.at[0, 5:7].set(jnp.array([7, 6]))):
        difference = np.abs(apply(params, changed) - logits).max(axis=(0, 2))
        assert difference[:5].max() < 1e-5
        assert difference[5:].min() > 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sequences_longer_than_the_positions_are_refused(name):
    net = net_of(name)
    with pytest.raises(ValueError, match="10 tokens, but the model has 9 positions"):
        net.apply(random_params(net), jnp.zeros((1, 10), jnp.int32))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_half_precision_stays_half_precision(name):
    net = net_of(name)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(net))
    assert jax.eval_shape(net.apply, params, *net.example_inputs(1)).dtype == jnp.bfloat16


def test_a_prefix_only_renames():
    net, plain = net_of("gpt2_untied"), build(config_from_dict(SMALL["gpt2_untied"] | {"prefix": ""}))
    params = random_params(net)
    renamed = {name.removeprefix("transformer."): leaf for name, leaf in params.items()}
    assert set(renamed) == set(abstract(plain))
    (x,) = plain.example_inputs(2)
    np.testing.assert_array_equal(jax.jit(plain.apply)(renamed, x), jax.jit(net.apply)(params, x))


@pytest.mark.parametrize("name", SMALL)
def test_initial_weights_have_a_dtype_of_their_own(name):
    assert not any(
        leaf.weak_type for leaf in jax.tree.leaves(build(config_from_dict(SMALL[name])).init(jax.random.key(0)))
    )


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_keys_decide_the_initial_weights(name):
    first, again, other = (flatten(net_of(name).init(jax.random.key(seed))) for seed in (0, 0, 1))
    for leaf, values in first.items():
        assert np.array_equal(values, again[leaf])
        if values.ndim > 1:
            assert not np.any(values == other[leaf])
