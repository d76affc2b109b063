"""Which singular directions of a layer its inputs excite, and what two layers can differ by on them."""

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from permjax import tree
from permjax.lmc.matrices import Patterns, decompose, rank
from permjax.symmetry.capture import LeafIO, capture
from permjax.symmetry.spec import PermutationSpec


class InputAlignment(NamedTuple):
    """How far the inputs of every layer lie along its right singular vectors; see `input_alignment`.

    Attributes:
        alignment: use of a leaf -> mean |v_i . z| / |z|, `[r]`, or `[layers, r]` for a leaf used inside a scan.
        singular_values: use of a leaf -> singular values in the same order and shape.
    """

    alignment: dict[str, Float[np.ndarray, "*layers r"]]
    singular_values: dict[str, Float[np.ndarray, "*layers r"]]


def input_alignment(
    apply: Callable[..., Any], spec: PermutationSpec, model: PyTree, data: Iterable[Any], leaves: Patterns = "*"
) -> InputAlignment:
    """The mean over inputs z of |v_i . z| / |z| for the right singular vectors v_i of every layer.

    A direction that has nothing to do with the inputs gives about sqrt(2 / (pi n)) for n inputs. Inputs of norm zero
    do not count. For a convolution z is a patch, and |z| stands for what its kernel sees of it,
    sqrt(sum_j (v_j . z)^2), so that no patch is ever formed: v_j . z is the output along u_j over s_j.

    Args:
        apply: `apply(params, *inputs) -> outputs`.
        spec: the symmetry.
        model: its parameters.
        data: batches; a batch is an array or a tuple of inputs.
        leaves: patterns of leaf names (`fnmatch`).

    Returns:
        One entry for every contraction or convolution with a chosen leaf, in forward order; grouped convolutions and
        contractions with a batch axis are left out.

    Raises:
        ValueError: there is no data, or no chosen leaf is contracted or convolved.

    Source:
        Ito et al., ICLR 2025, section 4 and figure 4.
    """
    tree.check_finite(model, "the model")
    batches = (batch if isinstance(batch, tuple) else (batch,) for batch in data)
    first = next(batches, None)
    if first is None:
        raise ValueError("data holds no batch, so there is no input to look at.")
    chosen = tree.select(model, leaves)
    probes = {use: _probe(io, chosen[leaf]) for use, (leaf, io) in _uses(apply, spec, model, first, chosen).items()}
    if not probes:
        raise ValueError(f"No leaf that matches {leaves!r} is contracted or convolved; choose other leaves.")
    vectors = {use: probe.vectors for use, probe in probes.items()}

    @jax.jit
    def observe(vectors: Mapping[str, Array], *inputs: Any) -> dict[str, tuple[Array, Array]]:
        found = capture(apply, spec, model, *inputs).leaves
        return {use: _shares(found[use], directions) for use, directions in vectors.items()}

    seen = observe(vectors, *first)
    for batch in batches:
        seen = jax.tree.map(jnp.add, seen, observe(vectors, *batch))
    means = {use: np.asarray(total / jnp.maximum(count, 1)) for use, (total, count) in seen.items()}
    values = {use: probe.s for use, probe in probes.items()}
    return InputAlignment({use: means[use].reshape(s.shape) for use, s in values.items()}, values)


def output_gap_bound(
    a: Float[np.ndarray, "out in"],
    b: Float[np.ndarray, "out in"],
    z: Float[np.ndarray, "samples in"],
    k: int,
    lipschitz: float = 1.0,
) -> Float[np.ndarray, " samples"]:
    """How much the outputs of two layers can differ on the same inputs: |phi(W_a z) - phi(W_b z)| is at most this.

    With singular triplets (s, u, v) of either matrix, x_i = s_i^a (v_i^a . z), y_j = s_j^b (v_j^b . z), and K the
    Lipschitz constant of phi, the bound is K (dominant + |x_{>k}| + |y_{>k}|), where

        dominant^2 = sum_{i<=k} (x_i^2 + y_i^2) - 2 sum_{i,j<=k} x_i y_j (u_i^a . u_j^b)

    is the squared norm of sum_{i<=k} (x_i u_i^a - y_i u_i^b). Triangle inequality; the remainders have plain norms
    because the u_i are orthonormal. So alignment counts where the singular value and the input's share of a direction
    are both large, and nowhere else. At k = 0 alignment has no part in it; with all directions it is exact for a linear
    layer.

    Args:
        a: a weight matrix; layers with biases differ by K |b_a - b_b| more at most.
        b: another of the same shape.
        z: inputs.
        k: number of dominant directions whose alignment counts.
        lipschitz: Lipschitz constant K of the activation; 1 for ReLU and tanh.

    Source:
        In the direction of Ito et al., ICLR 2025, theorem 4.2; the form and the constants are ours.
    """
    here, there = decompose(a), decompose(b)
    x, y = (z @ triplets.v * triplets.s for triplets in (here, there))
    dominant = x[:, :k] @ here.u[:, :k].T - y[:, :k] @ there.u[:, :k].T
    norms = [np.linalg.norm(term, axis=1) for term in (dominant, x[:, k:], y[:, k:])]
    return lipschitz * np.sum(norms, axis=0)


class _Probe(NamedTuple):
    """Singular values, and the vectors whose products with a layer's input (or output) are looked at."""

    s: Float[np.ndarray, "*layers r"]
    vectors: Float[np.ndarray, "layers features r"]


def _uses(
    apply: Callable, spec: PermutationSpec, model: PyTree, inputs: tuple, chosen: Mapping[str, Any]
) -> dict[str, tuple[str, LeafIO]]:
    """Return the contractions with a chosen leaf that a plain matrix describes: use -> leaf and shapes."""
    found: dict[str, tuple[str, LeafIO]] = {}

    def look(*inputs: Any) -> None:
        uses = capture(apply, spec, model, *inputs).leaves
        found.update({use: (use.rstrip("'"), io) for use, io in uses.items() if use.rstrip("'") in chosen})

    jax.eval_shape(look, *inputs)
    return {use: (leaf, io) for use, (leaf, io) in found.items() if _is_plain(io, np.shape(chosen[leaf]))}


def _is_plain(io: LeafIO, shape: tuple[int, ...]) -> bool:
    features = prod(shape[i] for i in io.in_axes)
    return io.input.shape[-1] == features and (io.kind == "conv" or len(shape) == _named_axes(io))


def _named_axes(io: LeafIO) -> int:
    return io.stacked + len(io.in_axes) + len(io.out_axes)


def _probe(io: LeafIO, leaf: Any) -> _Probe:
    """Return right vectors of a dense layer, or of a convolution the left ones over their singular values."""
    array = np.asarray(leaf)
    array = array.astype(np.result_type(np.float32, array.dtype), copy=False)
    side = io.in_axes if io.kind == "dot" else io.out_axes
    stack = tuple(range(io.stacked))
    others = tuple(i for i in range(array.ndim) if i not in (*stack, *side))
    lead, size = array.shape[: io.stacked], prod(array.shape[i] for i in side)
    flat = array.transpose(*stack, *side, *others).reshape(prod(lead), size, -1)
    found = [decompose(matrix) for matrix in flat]
    s = np.stack([triplets.s for triplets in found]).reshape(*lead, -1)
    vectors = [t.u if io.kind == "dot" else _per_value(t.u, t.s, rank(t)) for t in found]
    return _Probe(s, np.stack(vectors))


def _per_value(u: Float[np.ndarray, "out r"], s: Float[np.ndarray, " r"], count: int) -> Float[np.ndarray, "out r"]:
    safe = np.where(np.arange(len(s)) < count, s, np.inf)
    return u / safe


def _shares(io: LeafIO, vectors: Float[Array, "layers features r"]) -> tuple[Array, Array]:
    """Return sums over samples of |v_i . z| / |z| `[layers, r]`, and how many samples are not zero `[layers, 1]`."""
    seen = io.input if io.kind == "dot" else io.output
    seen = seen.reshape(vectors.shape[0], -1, vectors.shape[1]).astype(vectors.dtype)
    along = jnp.abs(jnp.einsum("lsf,lfr->lsr", seen, vectors, precision=jax.lax.Precision.HIGHEST))
    norm = jnp.linalg.norm(seen if io.kind == "dot" else along, axis=-1, keepdims=True)
    shares = jnp.where(norm > 0, along / jnp.where(norm > 0, norm, 1), 0)
    return shares.sum(axis=1), (norm > 0).sum(axis=1).astype(vectors.dtype)
