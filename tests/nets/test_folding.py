"""Folding of norms: the same function, plain norms, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.nets.folding import fold_norms
from permjax.nets.registry import build, config_from_dict

pytestmark = pytest.mark.fast

GPT2 = {"model_type": "gpt2", "vocab_size": 11, "n_positions": 9, "n_embd": 12, "n_layer": 2, "n_head": 3}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 9,
}
LAYOUTS = {
    "gpt2": GPT2,
    "gpt2, untied with a prefix": GPT2 | {"tie_word_embeddings": False, "prefix": "transformer."},
    "llama": LLAMA,
    "llama, tied with biases": LLAMA | {"tie_word_embeddings": True, "attention_bias": True},
}


def draw(net, seed=0):
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(net.init, jax.random.key(0))
    return {name: rng.standard_normal(leaf.shape) * (0.4 if leaf.ndim > 1 else 1.0) for name, leaf in like.items()}


@pytest.fixture(params=LAYOUTS)
def net(request):
    return build(config_from_dict(LAYOUTS[request.param]))


def test_the_function_stays_the_same_to_the_last_digits(net):
    params = draw(net)
    folded, weights = fold_norms(net, params)
    (x,) = net.example_inputs(3)
    with jax.enable_x64(True):
        before, after = jax.jit(net.apply)(params, x), jax.jit(folded.apply)(weights, x)
        assert before.dtype == jnp.float64
        assert float(jnp.abs(before - after).max() / jnp.abs(before).max()) < 1e-13


def test_gains_are_one_and_only_the_last_bias_is_not_zero(net):
    folded, weights = fold_norms(net, draw(net))
    assert not folded.config.tie_word_embeddings
    assert weights.keys() == jax.eval_shape(folded.init, jax.random.key(0)).keys()
    norms = [name for name in weights if "norm" in name or ".ln_" in name or name.startswith("ln_")]
    assert len(norms) in (5, 10)
    for name in norms:
        np.testing.assert_array_equal(weights[name], float(name.endswith("weight") or "ln_f" in name))


def test_nothing_with_a_mean_enters_or_leaves_the_stream_of_gpt2():
    net = build(config_from_dict(GPT2))
    weights = fold_norms(net, draw(net))[1]
    for name in ("wte.weight", "wpe.weight", "h.1.attn.c_proj.weight", "h.1.mlp.c_proj.bias"):
        np.testing.assert_allclose(weights[name].mean(-1), 0, atol=1e-15)
    np.testing.assert_allclose(weights["h.0.attn.c_attn.weight"].mean(0), 0, atol=1e-15)


def test_folding_twice_changes_no_more(net):
    folded, once = fold_norms(net, draw(net))
    again, twice = fold_norms(folded, once)
    assert again is folded
    for name, leaf in once.items():
        np.testing.assert_allclose(twice[name], leaf, rtol=0, atol=1e-14)


def test_jax_weights_stay_in_their_precision_and_the_given_ones_untouched(net):
    params = {name: jnp.asarray(leaf, jnp.bfloat16) for name, leaf in draw(net).items()}
    before = dict(params)
    weights = jax.jit(lambda p: fold_norms(net, p)[1])(params)
    assert {leaf.dtype for leaf in weights.values()} == {jnp.dtype(jnp.bfloat16)}
    fold_norms(net, params)
    assert all(params[name] is before[name] for name in before)


def test_other_architectures_and_missing_weights_are_named():
    vit = build(config_from_dict({"model_type": "vit", "width": 12, "depth": 1, "heads": 3, "mlp": 16}))
    with pytest.raises(ValueError, match="layouts gpt2 and llama, not in 'vit'"):
        fold_norms(vit, {})
    net = build(config_from_dict(GPT2))
    params = draw(net)
    del params["h.1.ln_2.bias"]
    with pytest.raises(ValueError, match=r"lack 'h.1.ln_2.bias' of this gpt2"):
        fold_norms(net, params)
