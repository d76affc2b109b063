"""Where an edit writes, for every layout."""

import jax
import pytest

from permjax.edit.places import layer_count, mlp_place
from permjax.nets.gpt import GPT2Config
from permjax.nets.llama import LlamaConfig
from permjax.nets.mlp import MLPConfig
from permjax.nets.registry import build

pytestmark = pytest.mark.fast

CONFIGS = (
    GPT2Config(vocab_size=7, n_positions=5, n_embd=4, n_layer=2, n_head=2, n_inner=6),
    GPT2Config(vocab_size=7, n_positions=5, n_embd=4, n_layer=2, n_head=2, n_inner=6, prefix="transformer."),
    LlamaConfig(vocab_size=7, hidden_size=4, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2),
)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_place_names_a_leaf_and_activations_of_the_width_its_orientation_says(config):
    net = build(config)
    params = jax.eval_shape(net.init, jax.random.key(0))
    seen = {}

    def note(name, value):
        seen[name] = value.shape[-1]
        return value

    jax.eval_shape(lambda p, x: net.apply(p, x, hook=note), params, *net.example_inputs(1))
    for layer in range(layer_count(config)):
        place = mlp_place(config, layer)
        widths = {"in": seen[place.key], "out": seen[place.value]}
        assert widths == {"in": 6, "out": seen[place.block]}
        assert params[place.weight].shape == tuple(widths[end] for end in place.orientation.split("_"))


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_out_of_range_is_refused(layer):
    with pytest.raises(ValueError, match=f"Layer {layer} .* has 2 layers; choose one of 0 to 1"):
        mlp_place(CONFIGS[0], layer)


def test_models_without_such_an_mlp_are_refused():
    with pytest.raises(ValueError, match="type 'mlp' cannot be edited"):
        mlp_place(MLPConfig(), 0)
