"""Activation statistics after merging: BatchNorm re-estimation and REPAIR."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from permjax import tree
from permjax.merge.average import Weights, average, check_aligned
from permjax.permutation import namespace
from permjax.steps import MergeState, Result
from permjax.symmetry.capture import capture
from permjax.symmetry.spec import PermutationSpec

_SILENT = 1e-6  # a channel whose std is below this share of its mean or its target does not vary


class RepairInfo(NamedTuple):
    """What REPAIR did, in forward order.

    Attributes:
        layers: the leaves that were corrected.
        skipped: leaves left alone: no bias leaf of their own covers their output channels, or they are used several
            times or inside a scan.
        std_ratio: std of the merged model over its target before the correction, mean over the channels of a layer;
            below one where the variance has collapsed.
        silent: channels of a layer that did not vary, so that only their mean was corrected.
    """

    layers: tuple[str, ...]
    skipped: tuple[str, ...]
    std_ratio: Float[np.ndarray, " layers"]
    silent: Int[np.ndarray, " layers"]


class Moments(NamedTuple):
    """Number of samples, their mean and the sum of squared deviations from it, per channel."""

    count: Any
    mean: Float[Array | np.ndarray, " channels"]
    deviation: Float[Array | np.ndarray, " channels"]

    @property
    def std(self) -> Float[np.ndarray, " channels"]:
        """Standard deviation of the samples seen."""
        return np.sqrt(self.deviation / self.count)


class _Layer(NamedTuple):
    leaf: str
    out_axes: tuple[int, ...]
    bias: str


def reestimate_statistics(
    spec: PermutationSpec, model: Any, *, data: Iterable, batch_statistics: Callable[..., Any]
) -> Any:
    """The model with fresh running statistics: for every statistic, the mean over all batches of that of one batch.

    Every batch counts the same, as in PyTorch's BatchNorm with `momentum=None`.

    Args:
        spec: the symmetry; its leaves of role statistic are re-estimated.
        model: a pytree; NumPy leaves stay NumPy.
        data: batches; a tuple or list holds several inputs.
        batch_statistics: `batch_statistics(params, *inputs) -> params` with the statistics of this batch alone.

    Returns:
        A pytree like `model`; other leaves are the same objects.

    Raises:
        ValueError: the spec has no statistics, `data` has no batches, `batch_statistics` returns another structure, or
            a statistic is not finite.

    Source:
        Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018, section 3.2.
    """
    names = [leaf.name for leaf in spec.leaves if leaf.role == "statistic"]
    if not names:
        raise ValueError("The spec has no leaf of role statistic; name them by `statistics=` when you trace it.")

    @jax.jit
    def collect(params, *inputs):
        found = batch_statistics(params, *inputs)
        tree.check_same_structure([params, found])
        return {name: leaf for name, leaf in tree.flatten(found).items() if name in names}

    params, count, sums = jax.tree.map(jnp.asarray, model), 0, dict.fromkeys(names, np.zeros(()))
    for inputs in _batches(data):
        found = collect(params, *inputs)
        sums = {name: total + np.asarray(found[name], np.float64) for name, total in sums.items()}
        count += 1
    named = tree.flatten(model)
    fresh = {name: _like(named[name], total / count) for name, total in sums.items()}
    tree.check_finite(fresh, "the re-estimated statistics")
    return tree.unflatten(model, named | fresh)


def repair(
    spec: PermutationSpec,
    models: Sequence[Any],
    merged: Any,
    *,
    apply: Callable[..., Any],
    data: Iterable,
    weights: Weights = None,
) -> Result:
    """REPAIR: give every channel of the merged model the mean and std that it has in its parents.

    Layer by layer in forward order: `W' = (s* / s) W` and `b' = m* - (s* / s) m` per output channel, where m and s are
    mean and std of `W x` in the merged model corrected so far, m* is the mean over the parents of their means (bias
    included) and s* that of their stds. Layers without a bias leaf of their own are left alone. With BatchNorm, use
    `reestimate_statistics` before this if the convolutions have no bias, and after this if they have one: the corrected
    channels match the mean of the parents' statistics that an average holds.

    Args:
        spec: the symmetry.
        models: the aligned parents.
        merged: the model to correct, of the same structure; NumPy leaves stay NumPy.
        apply: `apply(params, *inputs) -> outputs`, in evaluation mode.
        data: batches, read once per parent and once per layer; a tuple or list holds several inputs.
        weights: share of every parent in the targets; equal ones by default.

    Returns:
        The corrected model as the only one, no plan, and a `RepairInfo`.

    Raises:
        ValueError: models that `average` refuses, or `data` without batches.

    Source:
        Jordan, Sedghi, Saukh, Entezari, Neyshabur, "REPAIR", ICLR 2023, section 3. There BatchNorm layers are inserted
        and fused; here the outputs of the network are corrected as well.
    """
    models = tuple(models)
    check_aligned(spec, (*models, merged))
    shares = np.asarray(average(spec, models, weights=weights).info.weights, np.float64)
    layers, skipped = _layers(apply, spec, merged, next(_batches(data)))
    moments = _batch_moments(apply, spec, [layer.leaf for layer in layers])
    targets = _targets(moments, models, shares, layers, data)
    named, ratios, silent = tree.flatten(merged), [], []
    for layer in layers:
        here = _measure(moments, tree.unflatten(merged, named), data)[layer.leaf]
        mean, std = targets[layer.leaf]
        varies = here.std > _SILENT * np.maximum(std, np.abs(here.mean))
        scale = np.divide(std, here.std, out=np.ones_like(std), where=varies)
        named |= _folded(named, layer, scale, mean - scale * here.mean)
        ratios.append(np.mean(np.divide(here.std, std, out=np.ones_like(std), where=std > 0)))
        silent.append(np.sum(~varies))
    info = RepairInfo(tuple(x.leaf for x in layers), skipped, np.asarray(ratios, float), np.asarray(silent, int))
    return Result((tree.unflatten(merged, named),), None, info)


@dataclass(frozen=True)
class Repair:
    """Step form of `repair`: the models of a state become their weighted mean, repaired against them."""

    weights: tuple[float, ...] | None = None

    def __call__(self, state: MergeState) -> MergeState:
        """Return the state with the repaired mean as its only model; needs `apply` and `data`."""
        apply, data = state.need("apply", "Repair"), state.need("data", "Repair")
        (mean,) = average(state.spec, state.models, weights=self.weights).models
        return state.after(repair(state.spec, state.models, mean, apply=apply, data=data, weights=self.weights))


def joined(a: Moments, b: Moments) -> Moments:
    """The moments of two sets of samples together (Chan, Golub, LeVeque 1983, equation 2.1)."""
    count, step = a.count + b.count, b.mean - a.mean
    deviation = a.deviation + b.deviation + step**2 * (a.count * b.count / count)
    return Moments(count, a.mean + step * (b.count / count), deviation)


def _batches(data: Iterable) -> Iterator[tuple]:
    """Yield the inputs of every batch as a tuple."""
    empty = True
    for batch in data:
        empty = False
        yield tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if empty:
        raise ValueError(
            "`data` gave no batches; it is read several times, so give a list or a loader that can start again."
        )


def _layers(apply: Callable, spec: PermutationSpec, params: Any, inputs: tuple) -> tuple[list[_Layer], tuple[str, ...]]:
    """Return the layers that can be corrected and the names of the others, in forward order; nothing is computed."""
    found = {}

    def trace(params, *inputs):
        found.update(capture(apply, spec, params, *inputs).leaves)

    jax.eval_shape(trace, params, *inputs)
    biases = Counter(io.bias for io in found.values())
    fit = {name for name, io in found.items() if biases[io.bias] == 1 and _can_fold(spec, name, io, found)}
    layers = [_Layer(name, tuple(io.out_axes), io.bias) for name, io in found.items() if name in fit]
    return layers, tuple(name for name in found if name not in fit)


def _can_fold(spec: PermutationSpec, name: str, io: Any, found: Mapping[str, Any]) -> bool:
    """Tell whether a leaf is used once, outside scans, and a bias leaf covers exactly its output channels."""
    if io.bias is None or io.stacked or f"{name}'" in found or name.endswith("'"):
        return False
    channels = [spec.leaf(name).shape[i] for i in io.out_axes]
    return spec.leaf(io.bias).shape in (tuple(channels), (prod(channels),))


def _batch_moments(apply: Callable, spec: PermutationSpec, names: Sequence[str]) -> Callable[..., dict[str, Moments]]:
    """Return the compiled function from params and inputs to the moments of the outputs of the named leaves."""

    @jax.jit
    def moments(params, *inputs):
        leaves = capture(apply, spec, params, *inputs).leaves
        return {name: _moments(leaves[name].output) for name in names}

    return moments


def _moments(output: Float[Array, "... channels"]) -> Moments:
    samples = output.reshape(-1, output.shape[-1])
    samples = samples.astype(jnp.result_type(jnp.float32, samples.dtype))
    mean = jnp.mean(samples, axis=0)
    return Moments(jnp.asarray(len(samples), samples.dtype), mean, jnp.sum((samples - mean[None]) ** 2, axis=0))


def _measure(moments: Callable, params: Any, data: Iterable) -> dict[str, Moments]:
    """Return the moments of every layer over all batches, joined in float64."""
    params, total = jax.tree.map(jnp.asarray, params), {}
    for inputs in _batches(data):
        seen = jax.tree.map(lambda x: np.asarray(x, np.float64), moments(params, *inputs))
        total = {name: joined(total[name], m) if total else m for name, m in seen.items()}
    return total


def _targets(moments: Callable, models: Sequence[Any], shares: np.ndarray, layers: Sequence[_Layer], data: Iterable):
    """Return, for every layer, the parents' mean of means with bias and mean of stds per channel."""
    parents = [(tree.flatten(model), _measure(moments, model, data)) for model in models]
    targets = {}
    for leaf, _, bias in layers:
        means = [seen[leaf].mean + np.asarray(named[bias], np.float64).reshape(-1) for named, seen in parents]
        stds = [seen[leaf].std for _, seen in parents]
        targets[leaf] = np.average(means, axis=0, weights=shares), np.average(stds, axis=0, weights=shares)
    return targets


def _folded(named: dict[str, Any], layer: _Layer, scale: np.ndarray, bias: np.ndarray) -> dict[str, Any]:
    """Return the weight scaled along its output axes, and its bias leaf."""
    weight = named[layer.leaf]
    ordered = scale.reshape([weight.shape[i] for i in layer.out_axes]).transpose(np.argsort(layer.out_axes))
    shape = [size if i in layer.out_axes else 1 for i, size in enumerate(weight.shape)]
    scaled = np.asarray(weight, np.float64) * ordered.reshape(shape)
    return {layer.leaf: _like(weight, scaled), layer.bias: _like(named[layer.bias], bias)}


def _like(leaf: Any, value: np.ndarray) -> Any:
    """Return a value with the kind, shape and dtype of a leaf."""
    return namespace(leaf).asarray(value.reshape(leaf.shape).astype(leaf.dtype))
