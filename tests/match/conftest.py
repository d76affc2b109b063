"""Symmetries to match: one for each way in which groups stand in real networks, written by hand."""

import numpy as np
import pytest

from permjax.action import permute
from permjax.permutation import invert
from permjax.symmetry.spec import Of, PermutationSpec, Product, Sum


def chain(widths: tuple[int, ...]) -> PermutationSpec:
    """A multi-layer perceptron with biases."""
    last = len(widths) - 1
    groups = [None, *(f"h{i}" for i in range(1, last)), None]
    shapes, axes = {}, {}
    for i in range(last):
        shapes |= {f"{i}/kernel": (widths[i], widths[i + 1]), f"{i}/bias": (widths[i + 1],)}
        axes |= {f"{i}/kernel": (groups[i], groups[i + 1]), f"{i}/bias": (groups[i + 1],)}
    return PermutationSpec.from_axes(shapes, axes)


def residual() -> PermutationSpec:
    """Convolutions `HWIO` around two residual streams, with norms whose running means are statistics."""
    axes = {
        "stem": (None, None, None, "s0"),
        "b0/conv1": (None, None, "s0", "b0"),
        "b0/mean": ("b0",),
        "b0/conv2": (None, None, "b0", "s0"),
        "b0/scale": ("s0",),
        "b1/conv1": (None, None, "s0", "b1"),
        "b1/conv2": (None, None, "b1", "s1"),
        "b1/short": (None, None, "s0", "s1"),
        "b1/scale": ("s1",),
        "head": ("s1", None),
    }
    sizes = {"s0": 6, "b0": 7, "b1": 5, "s1": 8}
    shapes = {name: tuple(sizes[g] if g else 3 for g in entry) for name, entry in axes.items()}
    return PermutationSpec.from_axes(shapes, axes, roles={"b0/mean": "statistic"})


def attention() -> PermutationSpec:
    """A transformer layer with fused `q | k | v`, heads, and inner order by head; the head of the model is tied."""
    query, value = Product((Of("head"), Of("qk"))), Product((Of("head"), Of("vo")))
    axes = {
        "embed": (None, "res"),
        "norm": ("res",),
        "qkv/kernel": ("res", Sum((query, query, value))),
        "qkv/bias": (Sum((query, query, value)),),
        "out": (value, "res"),
        "up": ("res", "ff"),
        "down": ("ff", "res"),
    }
    shapes = {"embed": (20, 12), "norm": (12,), "qkv/kernel": (12, 42), "qkv/bias": (42,), "out": (12, 12)}
    shapes |= {"up": (12, 16), "down": (16, 12)}
    per = {"qk": ("head",), "vo": ("head",)}
    return PermutationSpec.from_axes(shapes, axes, sizes={"head": 3, "qk": 5, "vo": 4}, per=per)


def grouped_queries() -> PermutationSpec:
    """Attention in which key heads hold groups of query heads: three groups inside one, two by two in one leaf."""
    parts = {name: Product(tuple(map(Of, name.split()))) for name in ("kv q qk", "kv qk", "kv vo", "kv q vo")}
    axes = {
        "embed": (None, "res"),
        "q": ("res", parts["kv q qk"]),
        "k": ("res", parts["kv qk"]),
        "v": ("res", parts["kv vo"]),
        "o": (parts["kv q vo"], "res"),
    }
    shapes = {"embed": (20, 10), "q": (10, 24), "k": (10, 8), "v": (10, 6), "o": (18, 10)}
    per = dict.fromkeys(("q", "qk", "vo"), ("kv",))
    return PermutationSpec.from_axes(shapes, axes, sizes={"kv": 2, "q": 3, "qk": 4, "vo": 3}, per=per)


def recurrent(n: int = 6, inputs: int = 3) -> PermutationSpec:
    """One group on both axes of a square map, and on one axis of others."""
    axes = {"in": (None, "h"), "loop": ("h", "h"), "out": ("h", None)}
    return PermutationSpec.from_axes({"in": (inputs, n), "loop": (n, n), "out": (n, inputs)}, axes)


NETWORKS = {
    "perceptron": chain((6, 12, 9, 4)),
    "residual convolutions": residual(),
    "attention with heads": attention(),
    "grouped queries": grouped_queries(),
    "recurrent": recurrent(),
}


@pytest.fixture(scope="session", params=NETWORKS)
def network(request) -> PermutationSpec:
    """Every network's symmetry in turn."""
    return NETWORKS[request.param]


@pytest.fixture(scope="session")
def networks():
    """All networks' symmetries by name."""
    return NETWORKS


@pytest.fixture(scope="session")
def write_chain():
    """`write_chain(widths)`: the symmetry of a perceptron."""
    return chain


@pytest.fixture(scope="session")
def write_recurrent():
    """`write_recurrent(n, inputs)`: the symmetry of a recurrent layer."""
    return recurrent


@pytest.fixture(scope="session")
def plant(draw_params, draw_permutations):
    """`plant(spec, seed, noise)`: a model, a permuted (and disturbed) copy, and what brings the copy back."""

    def planted(spec: PermutationSpec, seed: int = 0, noise: float = 0.0):
        a, shift = draw_params(spec, 2 * seed), draw_params(spec, 2 * seed + 1)
        shuffle = draw_permutations(spec, seed + 1)
        near = {name: leaf + np.float32(noise) * shift[name] for name, leaf in a.items()}
        return a, permute(spec, shuffle, near), invert(spec, shuffle)

    return planted


@pytest.fixture(scope="session")
def objective():
    """`objective(spec, a, b)`: the inner product over leaves of role weight, in float64."""

    def value(spec: PermutationSpec, a, b) -> float:
        names = [leaf.name for leaf in spec.leaves if leaf.role == "weight"]
        return float(sum((np.asarray(a[n], np.float64) * np.asarray(b[n], np.float64)).sum() for n in names))

    return value
