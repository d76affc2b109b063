"""Models over devices: the same values as on one device, wherever they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax import tree
from permjax.parallel import MODELS, model_mesh, pmap_models, shard_models

pytestmark = pytest.mark.fast


def models(count: int):
    rng = np.random.default_rng(0)
    return [{"w": rng.standard_normal((3, 2), np.float32), "b": np.full(2, i, np.float32)} for i in range(count)]


def norm(model, scale):
    return {"norm": scale * tree.dot(model, model), "b": model["b"]}


def test_the_tests_have_several_devices():
    assert model_mesh().shape == {MODELS: len(jax.devices())} == {MODELS: 4}


def test_a_stack_is_laid_over_all_devices():
    stack = shard_models(tree.stack(models(8)))
    assert len(stack["w"].sharding.device_set) == 4
    assert stack["w"].addressable_shards[0].data.shape == (2, 3, 2)


@pytest.mark.parametrize("count", [1, 3, 4, 10])
@pytest.mark.parametrize("devices", [1, 4])
def test_a_mapped_function_gives_what_single_models_give(count, devices):
    mesh = model_mesh(jax.devices()[:devices])
    found = pmap_models(norm, mesh)(tree.stack(models(count)), jnp.float32(2))
    expected = [norm(model, 2) for model in models(count)]
    np.testing.assert_allclose(found["norm"], [e["norm"] for e in expected], rtol=1e-6)
    np.testing.assert_array_equal(found["b"], [e["b"] for e in expected])


def test_models_that_do_not_divide_the_devices_are_refused():
    with pytest.raises(ValueError, match="3 models cannot be laid over 4 devices"):
        shard_models(tree.stack(models(3)))


@pytest.mark.parametrize("stack", [{}, {"a": np.zeros(2), "b": np.zeros(3)}, {"a": np.float32(1)}])
def test_what_is_no_stack_is_refused(stack):
    with pytest.raises(ValueError, match=r"permjax\.tree\.stack"):
        pmap_models(norm)(stack)
