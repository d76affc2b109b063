"""Texts before a prompt: cut from others, or written by the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.edit.prefixes import random_prefixes, sampled_prefixes
from permjax.io.tokenizers import WordTokenizer
from permjax.nets.gpt import GPT2Config
from permjax.nets.registry import build

pytestmark = pytest.mark.fast

TEXTS = ["one two three four five six seven eight nine", "too short", "a b c d e f g h"]


def test_random_prefixes_are_pieces_of_the_texts():
    prefixes = random_prefixes(TEXTS, jax.random.key(0), count=40, words=(2, 5))
    assert len(prefixes) == 40
    assert all(any(f" {prefix} " in f" {text} " for text in TEXTS) for prefix in prefixes)
    assert {len(prefix.split()) for prefix in prefixes} == {2, 3, 4, 5}
    assert any(prefix.endswith("nine") for prefix in prefixes)
    assert any(prefix.startswith("a ") for prefix in prefixes)


def test_the_key_decides_the_prefixes():
    draws = [random_prefixes(TEXTS, jax.random.key(seed), count=5) for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_texts_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match="None of the 3 texts has 12 words"):
        random_prefixes(TEXTS, jax.random.key(0), count=1, words=(3, 12))


WORDS = WordTokenizer((*"abcdefghijklmnop", "The", "You", "see", "."))


@pytest.fixture(scope="module")
def model():
    net = build(GPT2Config(vocab_size=WORDS.size, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return net, {name: jnp.asarray(rng.normal(0, 1, leaf.shape), jnp.float32) for name, leaf in shapes.items()}


def test_sampled_prefixes_have_their_starts_and_lengths_and_come_from_the_model(model):
    net, params = model
    options = {"lengths": ((4, 3), (6, 2)), "starts": ("The", "You see"), "top": 3}
    prefixes = sampled_prefixes(net, params, WORDS, jax.random.key(0), **options)
    assert all(prefix.startswith(start) for prefix, start in zip(prefixes, ("The", "You see") * 3, strict=False))
    rows = [WORDS.encode(prefix).ids for prefix in prefixes]
    assert [len(row) - 1 for row in rows] == [4, 4, 4, 6, 6]  # and the full stop
    assert all(prefix.endswith(".") for prefix in prefixes)
    apply = jax.jit(net.apply)
    for row, start in zip(rows, (1, 2) * 3, strict=False):
        padded = np.zeros((1, 8), np.int32)
        padded[0, : len(row)] = row
        likely = np.argsort(apply(params, padded)[0], axis=-1)[:, -3:]
        assert all(row[place + 1] in likely[place] for place in range(start - 1, len(row) - 2))
    assert prefixes != sampled_prefixes(net, params, WORDS, jax.random.key(1), **options)


def test_starts_that_are_too_long_or_unknown_are_refused(model):
    net, params = model
    with pytest.raises(ValueError, match="A start has 3 tokens, but a prefix is to have 2"):
        sampled_prefixes(net, params, WORDS, jax.random.key(0), lengths=((2, 1),), starts=("You see a",))
    with pytest.raises(ValueError, match="The word 'Therefore'"):
        sampled_prefixes(net, params, WORDS, jax.random.key(0))
