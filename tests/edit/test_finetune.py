import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.edit.finetune import FtL, ft_l, last_nll
from permjax.edit.places import mlp_place
from permjax.edit.values import target_nll

pytestmark = pytest.mark.fast

LAYER = 0


@pytest.fixture(scope="module")
def tuned(edit_case):
    net, params, edits, _ = edit_case("gpt2")
    return ft_l(net, params, edits, layer=LAYER, learning_rate=0.02, limit=0.05, steps=6)


def test_fine_tuning_lowers_its_loss_and_keeps_every_element_near(edit_case, tuned):
    place = mlp_place(edit_case("gpt2").net.config, LAYER)
    assert (np.diff(tuned.info.losses) < 0).all()
    change = tuned.delta[place.weight].value
    assert np.abs(change).max() <= 0.05 * (1 + 1e-5)
    assert (np.abs(change) > 0.0499).any()  # so the limit was felt
    np.testing.assert_allclose(tuned.info.norm, np.linalg.norm(change), rtol=1e-6)


def test_fine_tuning_is_adam_with_a_clip_after_every_step(edit_case, tuned):
    net, params, edits, _ = edit_case("gpt2")
    weight = mlp_place(net.config, LAYER).weight
    tokens = jnp.asarray([edit.tokens[0] for edit in edits])
    position = np.asarray([edit.lengths[0] - 3 for edit in edits])
    answers = np.asarray([edit.tokens[0, edit.lengths[0] - 2 : edit.lengths[0]] for edit in edits])

    @jax.jit
    @jax.value_and_grad
    def loss(w):
        logits = net.apply({**params, weight: w}, tokens)[jnp.arange(len(edits)), position]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), answers, axis=1).mean()

    w = start = np.asarray(params[weight])
    first, second, losses = 0.0, 0.0, []
    for step in range(1, 7):
        value, slope = loss(w)
        losses.append(value)
        slope = np.asarray(slope, np.float64)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        move = 0.02 * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        w = np.clip(w - move, start - 0.05, start + 0.05).astype(np.float32)
    np.testing.assert_allclose(tuned.info.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(tuned.delta[weight].value, w - start, atol=2e-3)


def test_the_published_loss_asks_for_all_tokens_at_one_position():
    logits = np.random.default_rng(0).standard_normal((1, 5, 7)).astype(np.float32)
    targets = np.asarray([[-1, -1, 3, 5, -1]], np.int32)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    given = jnp.asarray(logits), jnp.asarray(targets)
    np.testing.assert_allclose(last_nll(*given), [-(log[0, 2, 3] + log[0, 2, 5]) / 2], rtol=1e-6)
    np.testing.assert_allclose(target_nll(*given), [-(log[0, 2, 3] + log[0, 3, 5]) / 2], rtol=1e-6)


def test_fine_tuning_stops_where_the_loss_is_low_enough(edit_case):
    net, params, edits, _ = edit_case("gpt2")
    info = ft_l(net, params, edits, layer=LAYER, stop=100.0, steps=6).info
    assert np.isfinite(info.losses).sum() == 1
    assert info.norm == 0


def test_settings_are_the_arguments_of_their_editor(edit_case, tuned):
    net, params, edits, _ = edit_case("gpt2")
    result = FtL(LAYER, learning_rate=0.02, limit=0.05, steps=6)(net, params, edits)
    np.testing.assert_array_equal(result.info.losses, tuned.info.losses)
