"""REPAIR for merged networks of any width: every unit gets the mean and spread that it has in its parents."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.merge.block_apply import Apply
from permjax.merge.layer import Layer
from permjax.merge.preparing import prepared
from permjax.merge.sweep import Sweep, batches
from permjax.permutation import namespace
from permjax.plan import Plan
from permjax.steps import Result
from permjax.symmetry.spec import PermutationSpec

_SILENT = 1e-6  # a unit whose spread is below this share of its target or its mean does not vary


@dataclass(frozen=True)
class _Moments:
    """Number of rows, and sums of values and squares of every output in float64."""

    count: int
    total: np.ndarray
    squares: np.ndarray

    def __add__(self, other: "_Moments") -> "_Moments":
        return _Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.squares / self.count - self.mean**2, 0))


def block_repair(
    spec: PermutationSpec, models: Sequence[Any], plan: Plan, *, apply: Apply | Sequence[Apply], data: Iterable
) -> Result:
    """Merge aligned models by averaging and give every unit its parents' mean and standard deviation, layer by layer.

    `W' = (s* / s) W`, `b' = m* - (s* / s) m` per output unit, where m and s are those of the merged network as repaired
    so far and m*, s* the means over the models that share the unit. Layers without a bias of their own are left alone;
    for BatchNorm, `wide_statistics` does the same. At full merging this is `repair`.

    Args:
        spec: the symmetry of the models.
        models: aligned pytrees.
        plan: the units of the merged network.
        apply: `apply(params, *inputs) -> outputs`.
        data: batches; all of them are held together.

    Returns:
        The merged parameters as the only model, the plan, and the names of the layers that were repaired.

    Source:
        Jordan, Sedghi, Saukh, Entezari, Neyshabur, "REPAIR", ICLR 2023, section 3.
    """
    models, chunks = tuple(models), batches(data, None)
    sweep = prepared(spec, models, plan, apply, chunks, None, "sequential", (), None, None, None)
    sweep = replace(sweep, measure=_measure)
    done: list[str] = []

    def visit(layer: Layer, moments: tuple[Any, ...], _: Any) -> None:
        if layer.bias is not None and not layer.contraction.batch:
            sweep.named.update(_repaired(layer, moments, sweep.named))
            done.append(layer.leaf)

    sweep.walk(chunks, visit)
    merged = {n: namespace(x).asarray(sweep.named[n]) for n, x in tree.flatten(models[0]).items()}
    return Result((tree.unflatten(models[0], merged),), plan, tuple(done))


def _measure(sweep: Sweep, layer: Layer, inputs: Sequence[Any], results: Sequence[Any]) -> list[_Moments]:
    """Return the moments of the outputs of every parent, then of the merged network, biases included."""
    c = layer.contraction
    biases = layer.biases([*sweep.leaves, sweep.named])
    outs = [layer.own(result, bias) for result, bias in zip(results, biases, strict=False)]
    merged = c.multiply(c.inputs(inputs, sweep.shown), jnp.asarray(sweep.named[c.ref.leaf]))
    return [_moments(out) for out in (*outs, layer.with_bias(merged, biases[-1]))]


def _moments(out: Any) -> _Moments:
    rows = np.asarray(out, np.float64).reshape(-1, out.shape[-1])
    return _Moments(len(rows), rows.sum(0), (rows**2).sum(0))


def _repaired(layer: Layer, moments: Sequence[_Moments], named: dict[str, Any]) -> dict[str, Any]:
    c = layer.contraction
    *parents, here = moments
    mean, std = (_shared(layer, [getattr(m, name) for m in parents]) for name in ("mean", "std"))
    varies = here.std > _SILENT * np.maximum(std, np.abs(here.mean))
    scale = np.divide(std, here.std, out=np.ones_like(std), where=varies)
    matrix = layer.matrix(named)  # [k, n], or [groups, k, n / groups]
    shape = (matrix.shape[0], 1, -1) if c.groups > 1 else (1, -1)
    matrix = matrix * scale.reshape(shape)
    matrix[..., -1, :] += (mean - scale * here.mean).reshape(matrix[..., -1, :].shape)
    return layer.stored(matrix, named)


def _shared(layer: Layer, values: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean over the models that have an output, in the order of the merged network."""
    wide, axis = layer.wide, layer.contraction.out_axis
    total, count = np.zeros(wide.wide_spec.size(axis)), np.zeros(wide.wide_spec.size(axis))
    for model, value in enumerate(values):
        np.add.at(total, wide.index(axis, model), value)
        np.add.at(count, wide.index(axis, model), 1)
    return total / np.maximum(count, 1)
