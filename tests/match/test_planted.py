"""A network and its shuffled copy: matching by weights puts every unit back, whatever the architecture."""

import jax
import numpy as np
import pytest

from permjax import tree
from permjax.action import permute
from permjax.match.weights import weight_matching
from permjax.nets.registry import build, config_from_dict
from permjax.permutation import random_permutations
from permjax.symmetry.trace import trace_spec

LANGUAGE = {"vocab_size": 64, "max_position_embeddings": 16}
NETS = {
    "mlp": {"model_type": "mlp", "input_shape": [28, 28], "hidden": [512, 512, 512]},
    "vgg": {"model_type": "vgg", "layers": [16, "M", 32, "M", 64, "M"], "hidden": [64], "norm": "layer"},
    "resnet-20, width 1": {"model_type": "resnet", "width": 1},
    "resnet-20, width 4": {"model_type": "resnet", "width": 4},
    "resnet-20, width 8": {"model_type": "resnet", "width": 8},
    "resnet-20, batch norm": {"model_type": "resnet", "norm": "batch"},
    "vit": {"model_type": "vit", "width": 48, "depth": 2, "heads": 4, "mlp": 64},
    "gpt-2": {"model_type": "gpt2", "vocab_size": 64, "n_positions": 16, "n_embd": 64, "n_layer": 3, "n_head": 4},
    "llama, grouped queries": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 2, **LANGUAGE,
    },
}  # fmt: skip


QUICK = ("mlp", "vgg", "gpt-2", "llama, grouped queries")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.fast) if n in QUICK else n for n in NETS])
def test_a_planted_permutation_is_recovered_exactly(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        net = build(config_from_dict(NETS[name]))
        like = jax.eval_shape(net.init, jax.random.key(0))
        spec = trace_spec(net.apply, like, *net.example_inputs(1), verify=False)
    draw = np.random.default_rng(0)
    a = tree.map_named(lambda _, leaf: draw.standard_normal(leaf.shape, np.float32), like)
    planted = {g: np.asarray(p) for g, p in random_permutations(spec, jax.random.key(7)).items()}
    result = weight_matching(spec, [a, permute(spec, planted, a)], key=jax.random.key(1))
    for leaf, found in zip(jax.tree.leaves(a), jax.tree.leaves(result.models[1]), strict=True):
        np.testing.assert_array_equal(leaf, found)
    assert (np.diff(result.info.objective) >= 0).all()
