"""Data made from a random key: for tests and examples."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from permjax.data.dataset import Dataset, split


def blobs(
    *,
    seed: int = 0,
    examples: int = 1000,
    features: int = 16,
    classes: int = 4,
    spread: float = 1.0,
    train_size: int | None = None,
) -> Dataset:
    """Gaussian blobs, x = c_y + spread * e, with centres c and noise e drawn from the standard normal.

    Args:
        seed: of everything.
        examples: number of points.
        features: their dimension.
        classes: number of blobs.
        spread: standard deviation of the noise.
        train_size: how many are for training; 80 % by default.
    """
    centre_key, label_key, noise_key = jax.random.split(jax.random.key(seed), 3)
    centres = jax.random.normal(centre_key, (classes, features))
    labels = jax.random.randint(label_key, (examples,), 0, classes)
    points = centres[labels] + spread * jax.random.normal(noise_key, (examples, features))
    size = examples * 4 // 5 if train_size is None else train_size
    names = tuple(str(label) for label in range(classes))
    return split(np.asarray(points), np.asarray(labels), train_size=size, seed=seed, classes=names, name="blobs")


def random_tokens(key: Array, batch: int, length: int, vocabulary: int) -> Int[Array, "batch length"]:
    """Independent uniform tokens."""
    return jax.random.randint(key, (batch, length), 0, vocabulary, jnp.int32)


def markov_tokens(key: Array, batch: int, length: int, vocabulary: int) -> Int[Array, "batch length"]:
    """Sequences of a random sparse Markov chain: each token has two likely successors, so there is much to learn."""
    table_key, start_key, choice_key = jax.random.split(key, 3)
    successors = jax.random.randint(table_key, (vocabulary, 2), 0, vocabulary, jnp.int32)
    start = jax.random.randint(start_key, (batch,), 0, vocabulary, jnp.int32)
    choices = jax.random.bernoulli(choice_key, 0.8, (length, batch)).astype(jnp.int32)

    def step(token: Array, choice: Array) -> tuple[Array, Array]:
        return successors[token, choice], token

    return jax.lax.scan(step, start, choices)[1].T
