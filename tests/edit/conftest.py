"""Tiny random models of both layouts, with edits and covariances, made without the code under test."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.edit.covariance import Covariance, fingerprint
from permjax.edit.prepare import PreparedEdit
from permjax.nets.registry import build, config_from_dict

WIDTH, INNER, LAYERS, VOCABULARY, LENGTH, ROWS = 12, 20, 2, 23, 8, 3
GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 12, "prefix": "transformer."}
LLAMA = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 12,
}
CONFIGS = {
    "gpt2": {"model_type": "gpt2", "n_inner": INNER, **GPT2},
    "gpt2, square": {"model_type": "gpt2", "n_inner": WIDTH, **GPT2},
    "llama": {"model_type": "llama", "intermediate_size": INNER, **LLAMA},
    "llama, square": {"model_type": "llama", "intermediate_size": WIDTH, **LLAMA},
}


class Case(NamedTuple):
    net: object
    params: dict
    edits: list
    covariances: dict


def random_edit(seed: int, *, length: int = LENGTH, rows: int = ROWS, answer: int = 2) -> PreparedEdit:
    """Random tokens: a prompt of three, prefixes of three before it in the later rows, and an answer at the end."""
    rng = np.random.default_rng(seed)
    prompt, wanted = rng.integers(1, VOCABULARY, 3), rng.integers(1, VOCABULARY, answer)
    texts = [np.concatenate([rng.integers(1, VOCABULARY, 3 if row else 0), prompt, wanted]) for row in range(rows)]
    lengths = np.asarray([len(text) for text in texts], np.int32)
    tokens = np.stack([np.pad(text, (0, length - len(text))) for text in texts]).astype(np.int32)
    targets = np.full((rows, length), -1, np.int32)
    for row, end in enumerate(lengths):
        targets[row, end - answer - 1 : end - 1] = wanted
    essence = np.asarray([*rng.integers(1, VOCABULARY, 4), *[0] * (length - 4)], np.int32)
    return PreparedEdit(tokens, lengths - np.int32(answer + 1), targets, lengths, essence, np.asarray(1, np.int32))


def random_covariance(seed: int, size: int) -> np.ndarray:
    """A positive matrix with eigenvalues over two decades."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return (turn * np.logspace(-2, 0, size)) @ turn.T


def _strong(name: str, x: jnp.ndarray) -> jnp.ndarray:
    """Weights of a model in which MLPs have a say, and biases that are not zero."""
    if name.endswith("bias"):
        return x + jnp.float32(0.1)
    if x.ndim < 2:
        return x
    return x * jnp.float32(25)


@cache
def make_case(name: str) -> Case:
    config = config_from_dict({"vocab_size": VOCABULARY, **CONFIGS[name]})
    net = build(config)
    start = net.init(jax.random.key(0))
    params = {n: _strong(n, x) for n, x in start.items()}
    mark, size = fingerprint(params), WIDTH if "square" in name else INNER
    covariances = {i: Covariance(random_covariance(i, size), 1000, i, mark) for i in range(LAYERS)}
    return Case(net, params, [random_edit(seed) for seed in range(3)], covariances)


@pytest.fixture(scope="session")
def edit_case():
    """`edit_case(name)`: a network with parameters, prepared edits and covariances, by the name of a layout."""
    return make_case
