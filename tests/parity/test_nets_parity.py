"""GPT-2 and Llama against transformers, on tiny models with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="torch is not installed; parity needs the extra `parity`.")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; parity needs the extra `parity`."
)

from permjax.nets import gpt, llama  # noqa: E402
from permjax.nets.registry import build, config_from_dict  # noqa: E402

GPT2 = {"vocab_size": 61, "n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 4}
LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}


def randomised(model):
    """The model with weights so large that every one of them shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3, generator=generator)
            else:
                weight.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def both_logits(model, values, shapes):
    """Logits of transformers and of permjax for the same weights, with a check that the names agree."""
    config = config_from_dict(values)
    params = {name: jnp.asarray(leaf.numpy()) for name, leaf in model.state_dict().items()}
    if config.tie_word_embeddings:
        del params["lm_head.weight"]
    assert {name: leaf.shape for name, leaf in params.items()} == shapes(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 17))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    return theirs, jax.jit(build(config).apply)(params, jnp.asarray(tokens, jnp.int32))


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": False, "n_inner": 40, "layer_norm_epsilon": 1e-3}])
def test_gpt2_agrees_with_transformers(change):
    hf = transformers.GPT2Config(**GPT2, **change, bos_token_id=0, eos_token_id=0)
    model = randomised(transformers.GPT2LMHeadModel(hf))
    theirs, ours = both_logits(model, hf.to_dict() | {"prefix": "transformer."}, gpt.shapes)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 8},
        {"attention_bias": True, "head_dim": 6, "rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 37.0}},
    ],
)
def test_llama_agrees_with_transformers(change):
    hf = transformers.LlamaConfig(**LLAMA | change)
    model = randomised(transformers.LlamaForCausalLM(hf))
    theirs, ours = both_logits(model, hf.to_dict(), llama.shapes)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_saved_configurations_are_read_as_they_are():
    for hf in (transformers.GPT2Config(**GPT2), transformers.LlamaConfig(**LLAMA)):
        for values in (hf.to_dict(), hf.to_diff_dict()):
            assert config_from_dict(values).vocab_size == 61


def test_scaled_rotary_positions_are_refused():
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="rope_parameters"):
        config_from_dict(transformers.LlamaConfig(**LLAMA, rope_parameters=scaled).to_dict())
