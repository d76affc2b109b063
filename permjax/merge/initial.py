"""The weights of a partially merged network before anything is fitted."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from permjax import tree
from permjax.merge.wide import Wide
from permjax.permutation import namespace
from permjax.symmetry.program import survey


def contracted_axes(apply: Callable, params: Any, *inputs: Any) -> dict[str, frozenset[int]]:
    """Return for every leaf that is contracted over which of its axes; nothing is computed."""
    found: dict[str, frozenset[int]] = {}
    for use in survey(apply, params, *inputs).uses:
        found[use.ref.leaf] = found.get(use.ref.leaf, frozenset()) | frozenset(use.contracted)
    return found


def wide_average(wide: Wide, models: Sequence[Any], contracted: Mapping[str, frozenset[int]]) -> Any:
    """The weights that follow from a plan alone: mean over the units with one label, sum over those that they read.

    `W[p, q] = mean over (m, i) with label p of the sum over j with label q of W_m[i, j]`. For two models and partly
    merged groups these are the blocks of PLeaS: shared <- shared the mean of both, own <- shared and own <- own the
    model's, shared <- own half of the model's, and zero between the own units of different models.

    Args:
        wide: the geometry, over aligned models.
        models: pytrees; NumPy leaves stay NumPy.
        contracted: leaf -> its axes that are summed over, as `contracted_axes` finds them; on the others means are
            taken.

    Returns:
        Wide parameters of the structure of the models; floating leaves in their dtypes, computed in float64. Leaves
        without widened units are plain means (those that are no floats, the first model's).

    Source:
        Nasery et al., "PLeaS: Merging models with permutations and least squares", CVPR 2025, section 3; for several
        units of one model on one label Stoica et al., "ZipIt!", ICLR 2024.
    """
    named = [tree.flatten(model) for model in models]

    def merged(name: str, leaf: Any) -> Any:
        if not np.issubdtype(np.asarray(leaf).dtype, np.inexact) and str(leaf.dtype) != "bfloat16":
            return leaf
        leaves = [np.asarray(n[name], np.float64) for n in named]
        value = _widened(wide, name, leaves, contracted.get(name, frozenset()))
        return namespace(leaf).asarray(value.astype(leaf.dtype))

    return tree.map_named(merged, models[0])


def _widened(wide: Wide, name: str, leaves: Sequence[np.ndarray], summed: frozenset[int]) -> np.ndarray:
    axes = wide.spec.leaf(name).axes
    shape = wide.wide_spec.leaf(name).shape
    total, count = np.zeros(shape), np.zeros([1 if i in summed else n for i, n in enumerate(shape)])
    for model, leaf in enumerate(leaves):
        index = [wide.index(axis, model) for axis in axes]
        np.add.at(total, np.ix_(*index), leaf)
        units = [np.bincount(where, minlength=n) for where, n in zip(index, shape, strict=True)]
        kept = [np.ones(1) if i in summed else u for i, u in enumerate(units)]
        count += reduce(np.multiply.outer, kept, np.ones(()))
    return total / np.maximum(count, 1)
