"""Hooks and generation of the language models: what is recorded is used, and the cache changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.nets.generation import generate, sample
from permjax.nets.language import record
from permjax.nets.registry import build, config_from_dict

pytestmark = pytest.mark.fast

CONFIGS = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 23,
        "n_positions": 12,
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 3,
        "tie_word_embeddings": False,
    },
    "llama": {
        "model_type": "llama",
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 12,
    },
}
MATRIX = {"gpt2": "h.1.mlp.c_proj", "llama": "layers.1.mlp.down_proj"}
BLOCK = {"gpt2": "h.1", "llama": "layers.1"}
LENGTHS = np.array([7, 3, 5], np.int32)
STEPS = 5
SPREAD = {1: 0.3, 2: 0.6}  # by number of axes


def randomised(net):
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return {
        name: jnp.asarray(
            float(leaf.ndim == 1 and not name.endswith("bias")) + rng.normal(0, SPREAD[leaf.ndim], leaf.shape),
            jnp.float32,
        )
        for name, leaf in shapes.items()
    }


def model_of(name):
    """Name, network, random weights, and prompts of three lengths with noise for padding."""
    net = build(config_from_dict(CONFIGS[name]))
    return name, net, randomised(net), np.random.default_rng(1).integers(0, 23, (3, 7)).astype(np.int32)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return model_of(request.param)


@pytest.fixture(scope="module")
def recorded(model):
    """Logits, the MLP's keys and values, and the residual stream of the last layer."""
    name, net, params, tokens = model
    names = [f"{MATRIX[name]}:in", f"{MATRIX[name]}:out", BLOCK[name]]
    logits, seen = jax.jit(lambda p, x: record(net.apply, p, x, names))(params, tokens)
    return logits, *(np.asarray(seen[name]) for name in names)


def test_recording_leaves_the_logits_alone(model, recorded):
    _, net, params, tokens = model
    np.testing.assert_array_equal(recorded[0], jax.jit(net.apply)(params, tokens))


def test_the_matrix_maps_what_goes_in_to_what_comes_out(model, recorded):
    name, _, params, _ = model
    _, keys, values, _ = recorded
    if name == "gpt2":
        by_hand = keys @ np.asarray(params["h.1.mlp.c_proj.weight"]) + np.asarray(params["h.1.mlp.c_proj.bias"])
    else:
        by_hand = keys @ np.asarray(params["model.layers.1.mlp.down_proj.weight"]).T
    np.testing.assert_allclose(values, by_hand, atol=1e-5)


def test_what_a_hook_returns_is_used_from_then_on(model, recorded):
    """A shift of the MLP's output is one of the residual stream, and only what comes after the place can change."""
    name, net, params, tokens = model
    _, _, values, stream = recorded
    shift = np.zeros_like(values)
    shift[:, 4] = np.linspace(-2, 2, values.shape[-1])

    def shifted(params, tokens):
        def inject(at, value):
            return value + shift if at == f"{MATRIX[name]}:out" else value

        return record(net.apply, params, tokens, [BLOCK[name]], hook=inject)

    logits, after = jax.jit(shifted)(params, tokens)
    np.testing.assert_allclose(after[BLOCK[name]], stream + shift, atol=1e-5)
    changed = np.abs(logits - recorded[0]).max(axis=(0, 2))
    assert changed[4] > 1e-2
    assert np.delete(changed, 4).max() < 1e-5  # it is the last layer: no other position looks at it


def test_an_activation_that_does_not_exist_is_named(model):
    _, net, params, tokens = model
    with pytest.raises(ValueError, match=r"no activation 'h1'.*nearest: '"):
        jax.eval_shape(lambda x: record(net.apply, params, x, ["h1"]), tokens)


@pytest.fixture(scope="module")
def generated(model):
    _, net, params, tokens = model
    return np.asarray(generate(net, params, tokens, LENGTHS, steps=STEPS))


def test_the_cache_gives_what_running_the_whole_text_again_gives(model, generated):
    _, net, params, tokens = model
    apply = jax.jit(net.apply)
    text = np.zeros((3, 12), np.int32)
    text[:, :7] = tokens
    for step in range(STEPS):
        logits = np.asarray(apply(params, text))
        ends = LENGTHS + step
        text[np.arange(3), ends] = logits[np.arange(3), ends - 1].argmax(axis=-1)
    by_hand = np.stack([row[end : end + STEPS] for row, end in zip(text, LENGTHS, strict=True)])
    np.testing.assert_array_equal(generated, by_hand)
    assert len(np.unique(by_hand)) > 3


def test_padding_is_never_looked_at(model, generated):
    _, net, params, tokens = model
    other = np.where(np.arange(7)[None] < LENGTHS[:, None], tokens, 22 - tokens)
    np.testing.assert_array_equal(generate(net, params, other, LENGTHS, steps=STEPS), generated)


def test_drawing_from_the_likeliest_token_alone_is_greedy(model, generated):
    _, net, params, tokens = model
    greedy = sample(net, params, tokens, LENGTHS, jax.random.key(0), steps=STEPS, top=1)
    np.testing.assert_array_equal(greedy, generated)


def test_drawn_tokens_are_among_the_likeliest_and_depend_on_the_key():
    _, net, params, tokens = model_of("gpt2")
    draws = np.stack([sample(net, params, tokens, LENGTHS, jax.random.key(k), steps=STEPS, top=2) for k in range(20)])
    logits = np.asarray(jax.jit(net.apply)(params, tokens))[np.arange(3), LENGTHS - 1]
    for row in range(3):
        assert set(draws[:, row, 0]) == set(np.argsort(logits[row])[-2:])
    assert not (draws == draws[0]).all()


def test_impossible_lengths_are_refused(model):
    _, net, params, tokens = model
    with pytest.raises(ValueError, match="0 to 7 tokens in rows of 7"):
        generate(net, params, tokens, np.array([7, 0, 1]), steps=1)
    with pytest.raises(ValueError, match="7 tokens and 7 steps need 13 positions, but the model has 12"):
        generate(net, params, tokens, LENGTHS, steps=7)
