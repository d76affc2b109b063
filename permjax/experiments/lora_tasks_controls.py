"""Adapters beside those that were trained: the same functions written otherwise, and random ones."""

import numpy as np

from permjax.lora.pool import Adapter, Factors


def permuted(adapter: Adapter, rng: np.random.Generator) -> Adapter:
    """The same function, its ranks in random order, in every module another one."""
    orders = {name: rng.permutation(len(factors.a)) for name, factors in adapter.items()}
    return {name: Factors(f.a[orders[name]], f.b[:, orders[name]]) for name, f in adapter.items()}


def regauged(adapter: Adapter, rng: np.random.Generator, sigma: float) -> Adapter:
    """The same function, its ranks in random order, with signs and scales `exp(N(0, sigma))` moved from b to a."""
    found = {}
    for name, factors in permuted(adapter, rng).items():
        size = len(factors.a)
        moved = (rng.choice([-1.0, 1.0], size) * np.exp(sigma * rng.standard_normal(size))).astype(np.float32)
        found[name] = Factors(factors.a * moved[:, None], factors.b / moved[None])
    return found


def random_like(adapter: Adapter, rng: np.random.Generator) -> Adapter:
    """Normal random factors of the same ranks, with the norm that each module's update has."""
    found = {}
    for name, factors in adapter.items():
        a, b = (rng.standard_normal(np.shape(part)).astype(np.float32) for part in factors)
        root = np.sqrt(np.linalg.norm(factors.b @ factors.a) / np.linalg.norm(b @ a), dtype=np.float32)
        found[name] = Factors(a * root, b * root)
    return found


def change(before: Adapter, after: Adapter) -> float:
    """The norm of the difference of all updates, relative to that of the updates before."""
    first, second = ([one[name].b @ one[name].a for name in before] for one in (before, after))
    moved = sum(float(np.sum(np.square(u - v))) for u, v in zip(first, second, strict=True))
    return float(np.sqrt(moved / sum(float(np.sum(np.square(u))) for u in first)))
