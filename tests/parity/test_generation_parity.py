"""Activations, injections and generated text against transformers, on tiny models with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="torch is not installed; parity needs the extra `parity`.")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; parity needs the extra `parity`."
)

from permjax.edit.places import mlp_place  # noqa: E402
from permjax.nets.generation import generate  # noqa: E402
from permjax.nets.language import record  # noqa: E402
from permjax.nets.registry import build, config_from_dict  # noqa: E402

LAYER = 1
LENGTHS = np.array([9, 4, 6], np.int32)
STEPS = 6


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=24, n_embd=24, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config)
    return model, config.to_dict() | {"prefix": "transformer."}, model.transformer.h


def llama():
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=24,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    return model, config.to_dict(), model.model.layers


@pytest.fixture(scope="module", params=[gpt2, llama])
def pair(request):
    """The torch model, its block, ours, the same weights, prompts."""
    model, values, blocks = request.param()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = float(weight.ndim == 1 and not name.endswith("bias"))  # of a norm
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + scale)
    net = build(config_from_dict(values))
    names = jax.eval_shape(net.init, jax.random.key(0))
    params = {name: jnp.asarray(leaf.numpy()) for name, leaf in model.state_dict().items() if name in names}
    tokens = np.random.default_rng(1).integers(0, 61, (3, 9)).astype(np.int32)
    return model.eval(), blocks[LAYER], net, params, tokens


def last_matrix(block):
    return block.mlp.c_proj if hasattr(block.mlp, "c_proj") else block.mlp.down_proj


def block_output(found):
    """Versions of transformers differ in whether a block returns a tuple."""
    return found if torch.is_tensor(found) else found[0]


def test_recorded_activations_are_those_of_transformers(pair):
    model, block, net, params, tokens = pair
    place = mlp_place(net.config, LAYER)
    theirs = {}
    hooks = [
        last_matrix(block).register_forward_hook(lambda _, x, y: theirs.update({place.key: x[0], place.value: y})),
        block.register_forward_hook(lambda *io: theirs.update({place.block: block_output(io[-1])})),
    ]
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits
    for hook in hooks:
        hook.remove()
    ours, seen = jax.jit(lambda p, x: record(net.apply, p, x, [place.key, place.value, place.block]))(params, tokens)
    np.testing.assert_allclose(ours, logits.numpy(), atol=1e-4)
    for name, activation in theirs.items():
        np.testing.assert_allclose(seen[name], activation.numpy(), atol=1e-4, err_msg=name)


def test_an_injection_changes_the_logits_as_in_transformers(pair):
    model, block, net, params, tokens = pair
    place = mlp_place(net.config, LAYER)
    shift = np.zeros((3, 9, 24), np.float32)
    shift[:, 3] = np.random.default_rng(2).normal(0, 3, 24)
    hook = last_matrix(block).register_forward_hook(lambda *io: io[-1] + torch.tensor(shift))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
        hook.remove()
        before = model(torch.tensor(tokens)).logits.numpy()

    def inject(name, value):
        return value + shift if name == place.value else value

    ours = jax.jit(lambda p, x: net.apply(p, x, hook=inject))(params, tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(theirs - before)[:, 3:].max() > 0.1


def test_generated_text_is_that_of_transformers(pair):
    model, _, net, params, tokens = pair
    theirs = []
    for row, length in zip(tokens, LENGTHS, strict=True):
        prompt = torch.tensor(row[None, :length], dtype=torch.long)
        options = {"do_sample": False, "max_new_tokens": STEPS, "pad_token_id": 0}
        theirs.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, length:].numpy())
    ours = generate(net, params, tokens, LENGTHS, steps=STEPS)
    np.testing.assert_array_equal(ours, theirs)
    assert len(np.unique(theirs)) > 4
