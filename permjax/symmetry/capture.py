"""The activations that carry each group, and what goes into and comes out of each matrix-like leaf."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from permjax import tree
from permjax.symmetry import rules  # noqa: F401  (registers the rules)
from permjax.symmetry.blocks import Block, extract, leaf_blocks
from permjax.symmetry.factors import Node
from permjax.symmetry.groups import axis_tree
from permjax.symmetry.replay import replay
from permjax.symmetry.spec import Axis, Leaf, Of, PermutationSpec, Product, Sum
from permjax.symmetry.spec import walk as ends
from permjax.symmetry.walk import Value, Walk
from permjax.symmetry.wreath import normal_form


class LeafIO(NamedTuple):
    """What a contraction or convolution with one leaf takes and gives.

    Attributes:
        input: activations with the contracted features last, `[..., in]`.
        output: the result before any bias, with the leaf's output features last, `[..., out]`.
        in_axes: axes of the leaf that are contracted (for convolutions its input-feature axis), in feature order.
        out_axes: axes of the leaf that make the output features.
        bias: name of the leaf that is added to the output, or None.
        kind: "dot" or "conv".
        stacked: number of leading layer axes that the arrays have because the leaf is used inside scans.
    """

    input: Any
    output: Any
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    bias: str | None
    kind: str
    stacked: int


class Captured(NamedTuple):
    """What `capture` returns; both dictionaries are in forward order.

    Attributes:
        groups: group -> tap name -> activations `[samples, *per sizes, n]`. A tap is named after the leaf that wrote
            it, with a number where one leaf writes several; streams with several writers have several taps.
        leaves: leaf -> its input and output, for leaves of two or more axes that are contracted or convolved.
    """

    groups: dict[str, dict[str, Any]]
    leaves: dict[str, LeafIO]


def capture(apply: Callable, spec: PermutationSpec, params: Any, *inputs: Any) -> Captured:
    """Run `apply(params, *inputs)` and return the activations that carry each group.

    Taps are the results of the contractions and convolutions with a leaf that writes the group, before any bias.
    Traceable, so it can be used inside `jit`; shapes do not depend on values.

    Args:
        apply: `apply(params, *inputs) -> outputs`.
        spec: the symmetry; every group gets an entry, empty if no leaf writes it by a contraction.
        params: pytree of arrays.
        *inputs: inputs.

    Example:
        >>> acts = capture(apply, spec, params, x).groups["w1:1"]["w1"]  # [batch, 32]
    """
    closed = jax.make_jaxpr(apply)(params, *inputs)
    named = tree.flatten(params)
    recorder = Recorder()
    leaves = recorder.record(closed, named, inputs)
    flat = [*named.values(), *jax.tree.leaves(inputs)]
    _, taps, _ = replay(closed, closed.consts, flat, {w.number for w in recorder.writers})
    names = class_names(spec, leaves)
    found = Captured({g.name: {} for g in spec.groups}, {})
    for writer in recorder.writers:
        if writer.number in taps:
            _collect(found, spec, writer, taps[writer.number], names)
    return found


class _Source(NamedTuple):
    """A value that holds one leaf's entries; `view` gives the leaf's axis for each of its axes, if that is all."""

    leaf: str
    view: tuple[int, ...] | None


@dataclass
class _Writer:
    """One contraction or convolution with a leaf."""

    number: int
    eqn: Any
    leaf: str
    side: int
    view: tuple[int, ...]
    result: Value
    bias: str | None = None


class Recorder(Walk):
    """A walk that also notes which contractions use which leaf, and which bias is added to their results."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[int, _Source] = {}
        self.writers: list[_Writer] = []
        self.written: dict[int, _Writer] = {}

    def record(self, closed: Any, named: Mapping[str, Any], inputs: tuple) -> dict[str, Value]:
        """Walk a closed jaxpr whose first inputs are the named leaves, and return their values."""
        leaves = {name: self.fresh(jnp.shape(a)) for name, a in named.items()}
        for name, value in leaves.items():
            self.sources[id(value)] = _Source(name, tuple(range(len(value.axes))))
        given = [self.fresh(jnp.shape(a)) for a in jax.tree.leaves(inputs)]
        self.run(closed, closed.consts, [*leaves.values(), *given])
        return leaves

    def moved(self, value: Value, out: Value, order) -> None:
        """Follow leaves and results through rearrangements."""
        if source := self.sources.get(id(value)):
            view = None if order is None or source.view is None else tuple(source.view[i] for i in order)
            self.sources[id(out)] = _Source(source.leaf, view)
        if writer := self.written.get(id(value)):
            self.written[id(out)] = writer

    def apply(self, eqn: Any, operands: list[Value]):
        """Visit one equation, noting contractions with leaves and the biases added after them."""
        number = self.visited + 1
        results = super().apply(eqn, operands)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            self._note(number, eqn, operands, results[0])
        if eqn.primitive.name in ("add", "add_any"):
            for one, other in (operands, operands[::-1]):
                writer, source = self.written.get(id(one)), self.sources.get(id(other))
                if writer is not None and source is not None and writer.bias is None:
                    writer.bias = source.leaf
        return results

    def _note(self, number: int, eqn: Any, operands: list[Value], result: Value) -> None:
        for side, value in enumerate(operands):
            source = self.sources.get(id(value))
            if source is not None and source.view is not None and len(source.view) >= 2:
                writer = _Writer(number, eqn, source.leaf, side, source.view, result)
                self.writers.append(writer)
                self.written[id(result)] = writer
                return


def _collect(found: Captured, spec: PermutationSpec, writer: _Writer, tap, names) -> None:
    operands, (output,) = tap
    io = _leaf_io(writer, operands, output)
    label = writer.leaf
    while label in found.leaves:
        label += "'"
    found.leaves[label] = io
    written = {e for i in io.out_axes for e in groups_on(spec.leaf(writer.leaf).axes[i])}
    nodes = [*writer.result.context, *writer.result.axes]
    axes = tuple(axis_tree(n, names) for n in nodes)
    blocks = [b for b in leaf_blocks(spec, Leaf(label, tuple(output.shape), axes)) if written & set(b.names)]
    for number, block in enumerate(blocks):
        tap_name = label if len(blocks) == 1 else f"{label}[{number}]"
        for group in sorted(written & set(block.names) & set(found.groups)):
            samples = _samples(spec, block, group, output)
            if samples is not None:
                found.groups[group][tap_name] = samples


def _samples(spec: PermutationSpec, block: Block, group: str, output: Any) -> Any:
    """Return the block as `[samples, *per, n]`, or None where the group stands twice in it."""
    if block.names.count(group) != 1:
        return None
    axis = block.names.index(group)
    last = [*(i for _, i in block.beside[axis]), axis]
    array = extract(block, output)
    array = array.transpose(*(i for i in range(array.ndim) if i not in last), *last)
    return array.reshape((prod(array.shape[: array.ndim - len(last)]), *spec.shape(group)))


def _leaf_io(writer: _Writer, operands: list[Any], output: Any) -> LeafIO:
    stacked = len(writer.result.context)
    other = operands[1 - writer.side]
    if writer.eqn.primitive.name == "conv_general_dilated":
        numbers = writer.eqn.params["dimension_numbers"]
        taken, made = (numbers.lhs_spec[1],), (numbers.out_spec[1],)
        in_axes, out_axes = (writer.view[numbers.rhs_spec[1]],), (writer.view[numbers.rhs_spec[0]],)
        kind = "conv"
    else:
        contracted, batch = writer.eqn.params["dimension_numbers"]
        mine = tuple(int(i) for i in contracted[writer.side])
        taken = tuple(int(i) for i in contracted[1 - writer.side])
        free = [i for i in range(len(writer.view)) if i not in mine and i not in batch[writer.side]]
        in_axes, out_axes = tuple(writer.view[i] for i in mine), tuple(writer.view[i] for i in free)
        first = len(batch[0]) if writer.side == 0 else output.ndim - stacked - len(free)
        made, kind = tuple(range(first, first + len(free))), "dot"
    leaf_in, leaf_out = _last(other, taken, stacked), _last(output, made, stacked)
    return LeafIO(leaf_in, leaf_out, in_axes, out_axes, writer.bias, kind, stacked)


def _last(array: Any, axes: tuple[int, ...], stacked: int) -> Any:
    """Move the given axes to the end and flatten them; `stacked` leading axes precede the numbering."""
    last = [i + stacked for i in axes]
    lead = [i for i in range(array.ndim) if i not in last]
    array = jnp.transpose(array, (*lead, *last))
    return array.reshape((*array.shape[: len(lead)], prod(array.shape[len(lead) :])))


def groups_on(axis: Axis) -> Iterator[str]:
    """Yield the group of every end of an axis tree, major to minor."""
    yield from (end.group for _, end in ends(axis) if isinstance(end, Of))


def class_names(spec: PermutationSpec, leaves: Mapping[str, Value]) -> dict[tuple[Node, ...], str]:
    """Return which runs of classes (one, or several that were fused) a group of the spec stands for."""
    names: dict[tuple[Node, ...], str] = {}
    for name, value in leaves.items():
        for axis, node in zip(spec.leaf(name).axes, value.axes, strict=True):
            alternatives = {alt.start: alt.atoms for alt in normal_form(node)}
            for start, stride, group in _stands(spec, axis, 0, 1):
                size = spec.group(group).size
                run = tuple(a for a, step in alternatives.get(start, []) if stride <= step < stride * size)
                if run:
                    names[run] = group
    return names


def _stands(spec: PermutationSpec, axis: Axis, start: int, stride: int):
    """Yield (start of the segment, stride, group) for every end of an axis tree that carries a group."""
    match axis:
        case Of(group):
            yield start, stride, group
        case Sum(parts):
            for part in parts:
                yield from _stands(spec, part, start, stride)
                start += spec.size(part) * stride
        case Product(parts):
            starts = {start}
            for part in reversed(parts):
                if isinstance(part, Sum):
                    edges, at = set(), start
                    for s in part.segments:
                        edges.add(at)
                        at += spec.size(s) * stride
                    starts = edges
                    yield from _stands(spec, part, start, stride)
                else:
                    for first in starts:
                        yield from _stands(spec, part, first, stride)
                stride *= spec.size(part)
