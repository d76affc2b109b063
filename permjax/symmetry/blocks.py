"""Leaves unfolded into blocks: one array axis for every end of an axis tree.

Products are reshaped, sums are cut. Every axis of a block is then one group, or fixed, so that permuting it, its Gram
matrices and its samples are ordinary array operations.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from permjax.permutation import namespace
from permjax.symmetry.spec import Axis, Fixed, Leaf, Of, PermutationSpec, Product, Sum

Pick: TypeAlias = range | tuple[int, ...]


class Layout(NamedTuple):
    """All of a block but its names, so that blocks of one kind share what is compiled for them.

    Attributes:
        picks: for every axis of the leaf, the positions that belong to the block.
        shape: sizes of the unfolded axes.
        outer: for every unfolded axis, the axes of the groups that its group is per.
    """

    picks: tuple[Pick, ...]
    shape: tuple[int, ...]
    outer: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Block:
    """A part of a leaf, unfolded.

    Attributes:
        leaf: name of the leaf.
        picks: for every axis of the leaf, the positions that belong to the block.
        shape: sizes of the unfolded axes.
        names: group (or index group) on every unfolded axis, `""` where fixed.
        beside: for every unfolded axis, the axis of each group that its group is per.
    """

    leaf: str
    picks: tuple[Pick, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    beside: tuple[tuple[tuple[str, int], ...], ...]

    @cached_property
    def layout(self) -> Layout:
        """The block without its names."""
        return Layout(self.picks, self.shape, tuple(tuple(i for _, i in beside) for beside in self.beside))

    def rows(self, permutations: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the permutation of every unfolded axis, None where there is none."""
        return tuple(permutations.get(name) for name in self.names)


def unfold(spec: PermutationSpec, leaves: tuple[str, ...]) -> tuple[Block, ...]:
    """Return the blocks of the named leaves, which cover every entry once."""
    return tuple(block for name in leaves for block in leaf_blocks(spec, spec.leaf(name)))


def extract(block: Block, value: Any) -> Any:
    """Return the entries of a block, in float32 or wider; a view of the leaf where possible."""
    value = view(block.layout, value)
    return value.astype(np.result_type(np.float32, value.dtype), copy=False)


def view(layout: Layout, value: Any) -> Any:
    """Return the entries of a block as they are stored; a view of the leaf where possible."""
    if value.shape == layout.shape:  # the block is the leaf
        return value
    for axis, pick in enumerate(layout.picks):
        if not isinstance(pick, range):
            value = value.take(np.asarray(pick, np.int32), axis=axis)
        elif len(pick) < value.shape[axis]:
            value = value[(slice(None),) * axis + (slice(pick.start, pick.stop),)]
    return value.reshape(layout.shape)


def move(block: Block, permutations: Mapping[str, Any], value: Any) -> Any:
    """Permute a block: outer groups first, then the groups that they index."""
    return gather(block.layout.outer, block.rows(permutations), value)


def gather(outer: Sequence[tuple[int, ...]], rows: Sequence[Any], value: Any) -> Any:
    """Permute an array: outer axes first, then those that they index.

    Args:
        outer: for every axis, the axes that index its permutation.
        rows: for every axis, its permutation `[*outer, n]`, or None where it stays.
        value: the array.
    """
    axes = [i for i, row in enumerate(rows) if row is not None]
    for axis in sorted(axes, key=lambda i: len(outer[i])) if len(axes) > 1 else axes:
        if not outer[axis]:
            value = value.take(rows[axis], axis=axis)
            continue
        places = [*outer[axis], axis]
        order = sorted(range(len(places)), key=places.__getitem__)
        shape = [n if i in places else 1 for i, n in enumerate(value.shape)]
        index = rows[axis].transpose(order).reshape(shape)
        value = namespace(value, index).take_along_axis(value, index, axis=axis)
    return value


def leaf_blocks(spec: PermutationSpec, leaf: Leaf) -> Iterator[Block]:
    """Yield the blocks of one leaf; every entry belongs to one of them."""
    parts = [list(_parts(spec, axis, np.arange(n), ())) for axis, n in zip(leaf.axes, leaf.shape, strict=True)]
    for chosen in product(*parts):
        ends = [(axis, *end) for axis, (found, _) in enumerate(chosen) for end in found]
        shape = tuple(n for _, index in chosen for n in index.shape)
        picks = tuple(_pick(index.reshape(-1)) for _, index in chosen)
        names = tuple(name for _, _, name in ends)
        yield Block(leaf.name, picks, shape, names, tuple(_beside(spec, leaf, ends, i) for i in range(len(ends))))


def _parts(spec: PermutationSpec, axis: Axis, index: np.ndarray, path: tuple[int, ...]) -> Iterator[tuple[list, Any]]:
    """Yield, for every choice of segments in an axis tree, its ends `(path, name)` and their positions."""
    match axis:
        case Fixed():
            yield [(path, "")], index
        case Of(group):
            yield [(path, group)], index
        case Sum(segments):
            stops = [*accumulate(spec.size(s) for s in segments)]
            for i, (segment, stop) in enumerate(zip(segments, stops, strict=True)):
                yield from _parts(spec, segment, index[stop - spec.size(segment) : stop], (*path, i))
        case Product(factors):
            sizes = [spec.size(f) for f in factors]
            found = [
                list(_parts(spec, f, np.arange(n), (*path, i)))
                for i, (f, n) in enumerate(zip(factors, sizes, strict=True))
            ]
            for chosen in product(*found):
                places = index.reshape(sizes)[np.ix_(*(where.reshape(-1) for _, where in chosen))]
                ends = [end for ends, _ in chosen for end in ends]
                yield ends, places.reshape([n for _, where in chosen for n in where.shape])


def _pick(index: np.ndarray) -> Pick:
    run = range(int(index[0]), int(index[0]) + len(index)) if len(index) else range(0)
    return run if np.array_equal(index, run) else tuple(index.tolist())


def _beside(spec: PermutationSpec, leaf: Leaf, ends: list, i: int) -> tuple[tuple[str, int], ...]:
    """Find the nearest place of every group that end `i` is per: in its own product first, then on other axes."""
    axis, path, name = ends[i]
    if not name:
        return ()

    def nearness(j: int) -> tuple[bool, int, int]:
        common = next((k for k, (s, t) in enumerate(zip(path, ends[j][1], strict=False)) if s != t), 0)
        return ends[j][0] == axis, common, j

    found = []
    for outer in spec.group(name).per:
        places = [j for j, end in enumerate(ends) if end[2] == outer and j != i]
        if not places:
            raise ValueError(
                f"group '{name}' is per '{outer}', which does not stand beside it in leaf '{leaf.name}', axis {axis}."
            )
        found.append((outer, max(places, key=nearness)))
    return tuple(found)
