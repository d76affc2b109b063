"""One walk through parents and merged network side by side, fitting every layer where it stands."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.merge.block_apply import BlockApply, together
from permjax.merge.contraction import contraction
from permjax.merge.gram import Gram
from permjax.merge.layer import Layer
from permjax.merge.statistics import summed
from permjax.merge.wide import Wide
from permjax.symmetry.program import Ref, Use, steps, survey

Mode: TypeAlias = Literal["parallel", "sequential", "separate"]
Visit: TypeAlias = Callable[[Layer, tuple[Gram, ...], tuple[Gram, ...]], None]
"""Takes a layer, its statistics, and those of the chunks held back."""
Chunk: TypeAlias = tuple[tuple[Any, ...], Any]
"""Inputs of one batch, and the owner of each of its samples or None."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """What a walk needs to know.

    Attributes:
        network: the merged network.
        models: the aligned parents.
        named: wide leaves (NumPy), replaced as layers are fitted.
        biases: leaf -> the bias that is added after it.
        fitted: names of the leaves that are fitted.
        mode: where the inputs come from: the parents, the merged network itself, or each parent by itself.
        constant: fit a constant also where there is no bias leaf.
        running: the function that the merged network runs, `apply` but for networks with statistics of the batch.
        positions: positions of an image that count, for convolutions.
        key: random key for these.
        measure: what is summed over batches in place of Grams: `measure(sweep, layer, inputs, results)`.
    """

    network: BlockApply
    models: tuple[Any, ...]
    named: dict[str, Any]
    biases: Mapping[str, str | None]
    fitted: frozenset[str]
    mode: Mode = "parallel"
    constant: bool = False
    running: BlockApply | None = None
    positions: int | None = None
    key: jax.Array | None = None
    measure: Callable[..., Sequence[Any]] | None = None
    leaves: tuple[Mapping[str, Any], ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "leaves", tuple(tree.flatten(model) for model in self.models))

    @property
    def wide(self) -> Wide:
        """The geometry."""
        return self.network.wide

    def walk(self, chunks: Sequence[Chunk], visit: Visit, held: frozenset[int] = frozenset()) -> None:
        """Go through all layers, each on all chunks, and hand the statistics of those to be fitted to `visit`.

        What `visit` writes into `named` is what the merged network goes on with. Chunks whose numbers are `held` make
        statistics of their own, for a choice between solutions.
        """
        merged, number = self.running or self.network, 0
        programs = [self._parent(m, inputs) for inputs, _ in chunks for m in range(self.count)]
        like = tree.unflatten(self.models[0], self.named)
        memos: list[dict] = [{} for _ in chunks]
        for (inputs, _), memo in zip(chunks, memos, strict=True):
            programs += [merged.start(m, like, inputs, self.named, memo) for m in self.shown]

        def answer(uses: Sequence[Use]) -> list[Any]:
            nonlocal number
            number += 1
            leaf, split = uses[0].ref.leaf, self.count * len(chunks)
            results = [use.result(self.leaves[i % self.count][leaf]) for i, use in enumerate(uses[:split])]
            layer = self.layer(uses[0])
            own, seen = ([use.other for use in part] for part in (uses[:split], uses[split:]))
            if leaf in self.fitted:
                sums: dict[bool, tuple[Gram, ...]] = {False: (), True: ()}
                for i, (_, owner) in enumerate(chunks):
                    here = slice(i * self.count, (i + 1) * self.count)
                    inputs = seen[i * len(self.shown) : (i + 1) * len(self.shown)] or own[here]
                    found = self._measured(layer, inputs, results[here], owner, (number, i))
                    before = sums[i in held]
                    sums[i in held] = summed(before, found) if before else tuple(found)
                visit(layer, sums[False], sums[True])
            for memo in memos:
                memo.clear()
            return [*results, *self._merged(layer, seen)]

        together(programs, answer)

    @property
    def count(self) -> int:
        """Number of models."""
        return len(self.models)

    @property
    def shown(self) -> tuple[int, ...]:
        """The views of the merged network that are run; none where the parents' activations are the inputs."""
        return self.wide.views if self.mode == "sequential" else ()

    def layer(self, use: Use) -> Layer:
        """Return the layer of a use."""
        bias = self.biases.get(use.ref.leaf)
        return Layer(contraction(self.wide, use), bias, bias is not None or self.constant)

    def layers(self, inputs: Sequence[Any]) -> Iterator[Layer]:
        """Yield the layers that are fitted, in forward order; nothing is computed."""
        for use in survey(self.network.applies[0], self.models[0], *inputs).uses:
            if use.ref.leaf in self.fitted:
                yield self.layer(use)

    def _parent(self, model: int, inputs: Sequence[Any]) -> Any:
        named = self.leaves[model]

        def fetch(ref: Ref) -> Any:
            return named[ref.leaf]

        return steps(self.network.applies[model], self.models[model], *inputs, fetch=fetch)

    def _measured(self, layer: Layer, inputs, results, owner, place: tuple[int, int]) -> Sequence[Any]:
        if self.measure is not None:
            return self.measure(self, layer, inputs, results)
        key = None if self.key is None else jax.random.fold_in(jax.random.fold_in(self.key, place[0]), place[1])
        options: dict[str, Any] = {"positions": self.positions, "key": key}
        biases, c = layer.biases(self.leaves), layer.contraction
        if self.mode != "separate":
            x = c.inputs(inputs, self.shown or range(self.count))
            return [layer.gram(x, layer.target(results, biases, owner), **options)]
        rows = zip(inputs, results, biases, strict=True)
        return [layer.gram(c.inputs([x], [m]), layer.only(y, b, m), **options) for m, (x, y, b) in enumerate(rows)]

    def _merged(self, layer: Layer, seen: Sequence[Any]) -> list[Any]:
        """Return what the merged network gives now, in every view and for every chunk."""
        if not seen:
            return []
        c, leaf, step = layer.contraction, jnp.asarray(self.named[layer.contraction.ref.leaf]), len(self.shown)
        found = []
        for i in range(0, len(seen), step):
            y = c.multiply(c.inputs(seen[i : i + step], self.shown), leaf)
            found += c.results(y, self.shown)
        return found


def batches(data: Iterable, owners: Iterable | None) -> list[Chunk]:
    """Return batches with the owners of their samples.

    Raises:
        ValueError: no batch, batches unlike the first one or without the same number of samples in inputs and owners,
            or NaN in them.
    """
    found = [tuple(b) if isinstance(b, tuple | list) else (b,) for b in data]
    if not found:
        raise ValueError("`data` gave no batches; give a list of batches, each as `apply` takes it.")
    who = [None] * len(found) if owners is None else [np.asarray(o) for o in owners]
    if len(who) != len(found):
        raise ValueError(f"there are {len(found)} batches of data but {len(who)} of owners; give one for each.")
    for number, (inputs, owner) in enumerate(zip(found, who, strict=True)):
        if (kind := _kind(inputs)) != _kind(found[0]):
            raise ValueError(
                f"batch {number} of the data has inputs {kind}, but batch 0 {_kind(found[0])} (shape of one sample and "
                "dtype); all batches must be alike."
            )
        _check_batch(number, inputs, owner)
    return list(zip(found, who, strict=True))


def _kind(inputs: tuple) -> list[tuple[tuple[int, ...], str]]:
    return [(np.shape(x)[1:], str(jnp.result_type(x))) for x in jax.tree.leaves(inputs)]


def _check_batch(number: int, inputs: tuple, owner: Any) -> None:
    tree.check_finite(dict(enumerate(map(np.asarray, jax.tree.leaves(inputs)))), f"batch {number} of the data")
    sizes = {int(np.shape(x)[0]) for x in jax.tree.leaves(inputs) if np.ndim(x)}
    if owner is not None and (owner.ndim != 1 or not np.issubdtype(owner.dtype, np.integer) or {len(owner)} != sizes):
        raise ValueError(
            f"batch {number}: owners must be one whole number for each of its {sorted(sizes)} samples, "
            f"not {owner.dtype} of shape {owner.shape}."
        )
