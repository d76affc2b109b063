"""How much every contraction and convolution of a program computes, and which groups stand on it."""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax

from permjax import tree
from permjax.symmetry.capture import Recorder, class_names, groups_on
from permjax.symmetry.groups import axis_tree
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.walk import Value


class Work(NamedTuple):
    """One contraction or convolution.

    Attributes:
        leaf: the leaf that is one of its operands, or None for a product of two activations (as in attention).
        groups: free groups on its operands, those that are contracted first.
        multiply_adds: output positions times contracted positions, all turns of a `scan` together. Convolutions count
            every window in full, also where it reaches over the border.
    """

    leaf: str | None
    groups: tuple[str, ...]
    multiply_adds: int


def contractions(apply: Callable, spec: PermutationSpec, params: Any, *inputs: Any) -> tuple[Work, ...]:
    """Return the contractions and convolutions of `apply(params, *inputs)` in forward order, without running it.

    A body of `while` counts once, and so does every branch of `cond`.

    Args:
        apply: `apply(params, *inputs) -> outputs`.
        spec: the symmetry.
        params: pytree of arrays or of `jax.ShapeDtypeStruct`.
        *inputs: inputs, concrete or abstract.

    Example:
        >>> sum(work.multiply_adds for work in contractions(apply, spec, params, x))
    """
    closed, counter = jax.make_jaxpr(apply)(params, *inputs), _Counter()
    leaves = counter.record(closed, tree.flatten(params), inputs)
    names = class_names(spec, leaves)

    def free(values: Iterable[Any]) -> list[str]:
        return [g for axis in values for g in groups_on(axis) if g in spec]

    found = []
    for use in counter.uses:
        groups = free(axis_tree(node, names) for value in use.operands for node in value.axes)
        if use.leaf is not None:
            axes = spec.leaf(use.leaf).axes
            groups = [*free(axes[i] for i in use.contracted), *free(axes)]
        found.append(Work(use.leaf, tuple(dict.fromkeys(groups)), use.multiply_adds))
    return tuple(found)


class _Use(NamedTuple):
    """A contraction as the walk meets it; `contracted` are axes of the leaf, if there is one."""

    leaf: str | None
    contracted: tuple[int, ...]
    operands: list[Value]
    multiply_adds: int


class _Counter(Recorder):
    """A recorder that also counts."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: list[_Use] = []

    def apply(self, eqn: Any, operands: list[Value]):
        """Visit one equation."""
        results = super().apply(eqn, operands)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            count = prod(node.size for node in self.context) * prod(eqn.outvars[0].aval.shape) * _length(eqn)
            self.uses.append(_Use(*self._leaf(eqn, operands), operands, count))
        return results

    def _leaf(self, eqn: Any, operands: list[Value]) -> tuple[str | None, tuple[int, ...]]:
        """Return the leaf of a contraction and which of its axes are contracted, if the other operand is not one."""
        sources = [self.sources.get(id(value)) for value in operands]
        for side, source in enumerate(sources):
            if source is not None and source.view is not None and sources[1 - side] is None:
                return source.leaf, tuple(source.view[i] for i in _contracted(eqn)[side])
        return None, ()


def _contracted(eqn: Any) -> tuple[Sequence[int], Sequence[int]]:
    """Return the contracted axes of both operands; for convolutions the feature axes."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        return numbers[0]
    return (numbers.lhs_spec[1],), (numbers.rhs_spec[1],)


def _length(eqn: Any) -> int:
    """Return how many products make one entry of the result."""
    shape, contracted = eqn.invars[1].aval.shape, _contracted(eqn)[1]
    window = () if eqn.primitive.name == "dot_general" else eqn.params["dimension_numbers"].rhs_spec[2:]
    return prod(shape[i] for i in (*contracted, *window))
