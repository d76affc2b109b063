"""ROME against the algorithm in eager PyTorch on tiny random models, and edited weights in transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="torch is not installed; parity needs the extra `parity`.")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; parity needs the extra `parity`."
)

from permjax.edit.covariance import Covariance, fingerprint  # noqa: E402
from permjax.edit.delta import apply_delta  # noqa: E402
from permjax.edit.memit import Memit  # noqa: E402
from permjax.edit.places import mlp_place  # noqa: E402
from permjax.edit.prepare import PreparedEdit  # noqa: E402
from permjax.edit.rome import Rome  # noqa: E402
from permjax.edit.values import ValueSettings  # noqa: E402
from permjax.nets.generation import generate  # noqa: E402
from permjax.nets.registry import build, config_from_dict  # noqa: E402

LAYER, ROWS, PROMPT, ANSWER = 0, 4, 5, 2
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}


def gpt2():
    config = transformers.GPT2Config(vocab_size=61, n_positions=24, n_embd=24, n_layer=2, n_head=4, **NO_TOKENS)
    model = transformers.GPT2LMHeadModel(config)
    return model, config.to_dict() | {"prefix": "transformer."}, model.transformer.h[LAYER].mlp.c_proj


def llama():
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=24,  # square: no shape tells the layout
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        pad_token_id=None,
        **NO_TOKENS,
    )
    model = transformers.LlamaForCausalLM(config)
    return model, config.to_dict(), model.model.layers[LAYER].mlp.down_proj


@pytest.fixture(scope="module", params=[gpt2, llama])
def pair(request):
    """The torch model, the matrix to edit, our network and the same weights, an edit and a covariance."""
    model, values, matrix = request.param()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = float(weight.ndim == 1 and not name.endswith("bias"))  # of a norm
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + scale)
    net = build(config_from_dict(values))
    names = jax.eval_shape(net.init, jax.random.key(0))
    params = {name: jnp.asarray(leaf.numpy()) for name, leaf in model.state_dict().items() if name in names}
    return model.eval(), matrix, net, params, prepared()


def prepared():
    """A prompt that ends with its subject; every row but the first has a prefix of three tokens."""
    rng = np.random.default_rng(1)
    prompt, answer = rng.integers(1, 61, PROMPT), rng.integers(1, 61, ANSWER)
    rows = [np.concatenate([rng.integers(1, 61, 3 if row else 0), prompt, answer]) for row in range(ROWS)]
    lengths = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.stack([np.pad(row, (0, 12 - len(row))) for row in rows]).astype(np.int32)
    targets = np.full((ROWS, 12), -1, np.int32)
    for row, length in enumerate(lengths):
        targets[row, length - ANSWER - 1 : length - 1] = answer
    essence = np.pad(rng.integers(1, 61, 4), (0, 8)).astype(np.int32)
    return PreparedEdit(tokens, lengths - np.int32(ANSWER + 1), targets, lengths, essence, np.asarray(1, np.int32))


def covariances_of(params, size):
    half = np.random.default_rng(2).standard_normal((size, 4 * size)) * np.logspace(-1, 0, size)[:, None]
    mark = fingerprint(params)
    return {layer: Covariance(half @ half.T / (4 * size), 4 * size, layer, mark) for layer in range(2)}


def eager_rome(model, matrix, edit, covariance, settings):
    """The losses and the change of ROME step by step: hooks, Adam, no fixed shapes."""
    tokens = torch.tensor(np.concatenate([edit.tokens, edit.kl_tokens[None]]), dtype=torch.long)
    subject = np.append(edit.subject, edit.kl_subject)
    rows, seen = np.arange(ROWS + 1), {}
    delta = torch.zeros(24, requires_grad=True)

    def hook(_, inputs, output):
        seen.update(key=inputs[0].detach(), value=output.detach())
        output = output.clone()
        output[rows, subject] += delta
        return output

    def loss():
        logs = torch.log_softmax(model(tokens).logits, -1)
        chosen = [
            -logs[r, p, edit.targets[r, p]] / ANSWER for r in range(ROWS) for p in np.flatnonzero(edit.targets[r] >= 0)
        ]
        new = logs[-1, edit.kl_subject]
        seen.setdefault("old", new.detach())
        divergence = torch.nn.functional.kl_div(seen["old"], new, log_target=True, reduction="sum")
        start = seen.setdefault("start", seen["value"][0, subject[0]])
        decay = settings.weight_decay * delta.norm() / start.norm() ** 2
        return sum(chosen) / ROWS + settings.kl * divergence + decay

    handle, losses = matrix.register_forward_hook(hook), []
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    for step in range(settings.steps):
        adam.zero_grad()
        value = loss()
        losses.append(value.item())
        if value < settings.stop or step == settings.steps - 1:
            break
        value.backward()
        adam.step()
        most = settings.clamp * seen["start"].norm()
        with torch.no_grad():
            delta *= min(1.0, (most / delta.norm()).item())
    handle.remove()
    keys = seen["key"][rows, subject][:ROWS].double().numpy()
    u = np.linalg.inv(covariance) @ keys.mean(axis=0)
    u /= np.linalg.norm(u)
    return np.asarray(losses), np.outer(delta.detach().double().numpy() / (keys[0] @ u), u)


def test_rome_is_the_algorithm_of_the_paper_in_eager_pytorch(pair):
    model, matrix, net, params, edit = pair
    place = mlp_place(net.config, LAYER)
    size = params[place.weight].shape[0 if place.orientation == "in_out" else 1]
    covariances, settings = covariances_of(params, size), ValueSettings(steps=10)
    theirs, change = eager_rome(model, matrix, edit, covariances[LAYER].matrix, settings)
    ours = Rome(LAYER, value=settings)(net, params, [edit], covariances=covariances)
    np.testing.assert_allclose(ours.info.losses[0, :5], theirs[:5], rtol=1e-4)
    np.testing.assert_allclose(ours.info.losses[0, : len(theirs)], theirs, rtol=1e-2)
    assert theirs.min() < theirs[0] - 0.5
    mine = ours.delta[place.weight].dense().value
    mine = mine.T if place.orientation == "in_out" else mine
    np.testing.assert_allclose(mine, change, atol=1e-2 * np.abs(change).max())


def test_edited_weights_say_the_same_in_transformers(pair):
    model, _, net, params, edit = pair
    result = Memit((0, 1), weight=1e-2, value=ValueSettings(steps=5))(net, params, [edit])
    edited = apply_delta(params, result.delta)
    tokens, length = edit.tokens[1:], PROMPT + 3
    before = jax.jit(net.apply)(params, tokens)
    state = {name: torch.tensor(np.asarray(edited.get(name, leaf))) for name, leaf in model.state_dict().items()}
    original = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        prompts = torch.tensor(tokens[:, :length], dtype=torch.long)
        options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
        said = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, length:].numpy()
    model.load_state_dict(original)
    np.testing.assert_allclose(jax.jit(net.apply)(edited, tokens), logits, atol=1e-4)
    assert np.abs(logits - before).max() > 0.1
    lengths = np.full(len(tokens), length, np.int32)
    np.testing.assert_array_equal(generate(net, edited, tokens[:, :length], lengths, steps=6), said)
