"""Planted permutations of whole transformers, insides of heads included, under noise; the benchmark holds the rest."""

from importlib.util import module_from_spec, spec_from_file_location

import jax
import numpy as np
import pytest

from permjax.nets.registry import build, config_from_dict
from permjax.symmetry.trace import trace_spec

pytestmark = pytest.mark.fast

SMALL = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 30, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "llama": {
        "model_type": "llama", "vocab_size": 30, "max_position_embeddings": 16, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    },
    "vit": {"model_type": "vit", "input_shape": [8, 8], "patch": 2, "width": 32, "depth": 2, "heads": 4, "mlp": 48},
}  # fmt: skip
KINDS = {
    "gpt2": {"residual": 1, "heads": 2, "qk": 2, "vo": 2, "hidden": 2},
    "llama": {"residual": 1, "kv groups": 2, "query heads": 2, "vo": 2, "hidden": 2},
    "vit": {"residual": 1, "heads": 2, "qk": 2, "vo": 2, "hidden": 2},
}


@pytest.fixture(scope="module")
def benchmark(request):
    found = spec_from_file_location("attention", request.config.rootpath / "benchmarks" / "attention_recovery.py")
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=SMALL)
def transformer(request):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        net = build(config_from_dict(SMALL[request.param]))
        like = jax.eval_shape(net.init, jax.random.key(0))
        return request.param, net, trace_spec(net.apply, like, *net.example_inputs(1), verify=False)


def test_a_traced_transformer_has_every_kind_of_group_once_a_layer(benchmark, transformer):
    name, _, spec = transformer
    kinds = [benchmark.kind_of(spec, g.name) for g in spec.groups]
    assert {kind: kinds.count(kind) for kind in kinds} == KINDS[name]


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_every_unit_of_every_head_is_found_again(benchmark, transformer, noise):
    _, net, spec = transformer
    for seed in range(2):
        with jax.numpy_dtype_promotion("standard"):
            model = benchmark.random_model(net, seed)
        found = benchmark.recover(spec, model, noise, seed)
        assert found.shares == dict.fromkeys(found.shares, 1.0)
        assert found.unmixed


def test_query_heads_never_leave_their_group_even_where_nothing_can_be_found(benchmark, transformer):
    name, net, spec = transformer
    with jax.numpy_dtype_promotion("standard"):
        model = benchmark.random_model(net, 0)
    found = benchmark.recover(spec, model, 30.0, 0)
    assert min(found.shares.values()) < 1
    assert found.unmixed
    perms = {g.name: np.zeros(spec.shape(g.name), np.int32) for g in spec.groups}
    assert len(list(benchmark.query_heads(spec, perms))) == KINDS[name].get("query heads", 0)


def test_a_mixed_head_would_be_seen(benchmark):
    assert benchmark.unmixed(np.array([2, 3, 1, 0]), 2)
    assert not benchmark.unmixed(np.array([0, 2, 1, 3]), 2)
