"""PLeaS: merge networks of different initialisation into one of the size you choose, by layer-wise least squares."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from permjax import tree
from permjax.merge.block_apply import Apply, block_apply
from permjax.merge.fitting import LayerFit, fitted
from permjax.merge.gram import Gram
from permjax.merge.heads import own_heads
from permjax.merge.layer import Layer
from permjax.merge.norms import wide_statistics
from permjax.merge.partial import composed
from permjax.merge.planning import Selection, pleas_plan
from permjax.merge.preparing import check_request, many, prepared
from permjax.merge.statistics import Grams, Statistics, summed
from permjax.merge.sweep import Chunk, Mode, Sweep, batches
from permjax.permutation import namespace
from permjax.plan import Plan
from permjax.steps import MergeState, Result
from permjax.symmetry.spec import PermutationSpec

Ridge: TypeAlias = float | int | Literal["auto", "held_back"]
Targets: TypeAlias = Literal["mean", "owner"]

_HELD = 5  # every so-manieth batch is held back for the choice of the ridge


class PleasInfo(NamedTuple):
    """What was fitted, layer by layer in forward order, and what was not.

    Attributes:
        layers: names of the layers.
        before: mean squared error of the averaged weights over the variance of the targets.
        after: the same of the fitted weights, on the same samples.
        ridge: weight of the prior that was used.
        rows: number of equations.
        rank_deficient: where the inputs left the solution open, so that the one nearest to the prior was taken.
        averaged: leaves of two or more axes that were averaged only: kept, used several times, or not contracted.
        samples: number of calibration samples.
    """

    layers: tuple[str, ...]
    before: Float[np.ndarray, " layers"]
    after: Float[np.ndarray, " layers"]
    ridge: Float[np.ndarray, " layers"]
    rows: Int[np.ndarray, " layers"]
    rank_deficient: Bool[np.ndarray, " layers"]
    averaged: tuple[str, ...]
    samples: int


def pleas(
    spec: PermutationSpec,
    models: Sequence[Any],
    plan: Plan,
    *,
    apply: Apply | Sequence[Apply],
    data: Iterable | None = None,
    statistics: Statistics | None = None,
    mode: Mode = "parallel",
    targets: Targets = "mean",
    owners: Iterable | None = None,
    ridge: Ridge = "auto",
    keep: Sequence[str] = (),
    batch_statistics: Callable | Sequence[Callable] | None = None,
    positions: int | None = None,
    key: jax.Array | None = None,
    at_once: bool = True,
) -> Result:
    """Merge aligned models into the network that a plan describes; every layer is a ridge regression.

    Per layer `min_W ||X W - Y||^2 + ridge s ||W - W_0||^2` over the blocks of the plan (weights between the own units
    of different models stay zero), with `W_0` the averaged weights, `s` the mean square of an input feature, and a
    constant for the bias. `X` and `Y` are the layer's inputs and results on the calibration data, in the units of the
    merged network.

    Args:
        spec: the symmetry of the models.
        models: two or more aligned pytrees; NumPy leaves stay NumPy. Heads may differ in size (see `own_heads`).
        plan: the units of the merged network, over the aligned models; from `pleas_plan`, `partial_plan`, `zip_plan`.
        apply: `apply(params, *inputs) -> outputs`, in evaluation mode; one function for each model if they differ.
        data: calibration batches without labels; a tuple holds several inputs. A list or loader, read twice where
            `batch_statistics` is given.
        statistics: instead of data, what `pleas_statistics` collected (several may have been added up).
        mode: `"parallel"`: inputs are the mean of the parents' (the paper); `"sequential"`: those of the merged network
            as fitted so far, which takes up what its earlier layers got wrong; `"separate"`: every parent's inputs and
            results by themselves (RegMean).
        targets: of a shared unit: `"mean"` of its models (the paper), or that of the sample's `"owner"`.
        owners: for the latter, one array for each batch with the number of the model whose domain a sample is from.
        ridge: weight of the prior; `"auto"` is 1e-2, and 1e-1 below 200 samples; `"held_back"` chooses by the error on
            every fifth batch (of two or more), layer by layer.
        keep: leaves that are not fitted, such as heads that are to be reused.
        batch_statistics: `batch_statistics(params, *inputs) -> params` with the statistics of a batch, for networks
            with BatchNorm; the merged network gets the mean of these over the data, and in mode `"sequential"` runs as
            this function does, with those of the batch, while its layers are fitted one after the other.
        positions: use only so many random positions of every image in convolutions.
        key: for these positions.
        at_once: all data goes through the networks together, layer by layer, so that the statistics of one layer are in
            memory at a time. Otherwise batch by batch, which needs those of all layers, and no more than a batch.

    Returns:
        The merged parameters as the only model, the plan, and a `PleasInfo`. `block_apply(spec, plan, apply)` is the
        function that takes them.

    Raises:
        ValueError: models or plan that do not fit the spec, are not finite or of different architecture; data that is
            missing, not finite or does not fit; owners that are missing or not asked for; modes that cannot be
            combined.

    Warns:
        UserWarning: a layer has fewer equations than unknowns, so that the prior decides.

    Example:
        >>> plan = pleas_plan(spec, aligned, apply=apply, data=batches, budget=1.2)
        >>> result = pleas(spec, aligned, plan, apply=apply, data=batches)
        >>> logits = block_apply(spec, plan, apply)(result.models[0], x)

    Source:
        Nasery, Hayase, Koh, Oh, "PLeaS: Merging models with permutations and least squares", CVPR 2025, section 3
        (there by gradient descent, without prior, in parallel and with mean targets).
    """
    models = tuple(models)
    chunks = [] if data is None else batches(data, owners)
    check_request(models, chunks, statistics, mode, targets, owners, at_once, key, positions)
    sweep = prepared(spec, models, plan, apply, chunks, statistics, mode, keep, batch_statistics, positions, key)
    held = frozenset(range(_HELD - 1, len(chunks), _HELD)) or frozenset({len(chunks) - 1} if len(chunks) > 1 else ())
    held = held if ridge == "held_back" else frozenset()
    found: list[LayerFit] = []

    def visit(layer: Layer, grams: tuple[Gram, ...], back: tuple[Gram, ...]) -> None:
        fit, leaves = fitted(layer, grams, back, sweep.named, ridge)
        sweep.named.update(leaves)
        found.append(fit)

    if statistics is not None:
        _visit_all(sweep, statistics.inputs, statistics.grams, visit)
    elif at_once:
        sweep.walk(chunks, visit, held)
    else:
        _visit_all(sweep, chunks[0][0], _collected(sweep, chunks), visit)
    merged = tree.unflatten(models[0], _typed(sweep, models[0]))
    if batch_statistics is not None and chunks:
        merged = wide_statistics(sweep.wide, merged, many(batch_statistics, len(models)), [c for c, _ in chunks])
    _warn(found)
    samples = (
        sum(int(np.shape(jax.tree.leaves(c)[0])[0]) for c, _ in chunks) if statistics is None else statistics.samples
    )
    return Result((merged,), plan, _info(found, sweep, samples))


def pleas_statistics(
    spec: PermutationSpec,
    models: Sequence[Any],
    plan: Plan,
    *,
    apply: Apply | Sequence[Apply],
    data: Iterable,
    mode: Literal["parallel", "separate"] = "parallel",
    targets: Targets = "mean",
    owners: Iterable | None = None,
    keep: Sequence[str] = (),
    batch_statistics: Callable | Sequence[Callable] | None = None,
    positions: int | None = None,
    key: jax.Array | None = None,
) -> Statistics:
    """Return the statistics from which `pleas` can fit a plan without the data; arguments as there.

    Statistics of several data sets, collected with the same models and plan, add up (`a + b`), and they can be kept in
    a file. They hold sums over samples, no samples.
    """
    models, chunks = tuple(models), batches(data, owners)
    check_request(models, chunks, None, mode, targets, owners, False, key, positions)
    sweep = prepared(spec, models, plan, apply, chunks, None, mode, keep, batch_statistics, positions, key)
    return Statistics(_collected(sweep, chunks), tuple(jax.eval_shape(lambda *x: x, *chunks[0][0])))


@dataclass(frozen=True)
class Pleas:
    """Step form of `pleas_plan` and `pleas`: the aligned models of a state become one network of the chosen size.

    Attributes:
        budget: FLOPs of the merged network as a multiple of one model's, from 1 to the number of models; or
        params: its stored parameters (dense) as such a multiple; or
        width: pairs of a group and the share of its units that every model keeps for itself. One of the three.
        shape: how the budget is spread over groups; see `pleas_plan`.
        metric: by what units are chosen to be merged.
        selection: among matched pairs, or pairs chosen anew.
        mode: see `pleas`.
        targets: see `pleas`.
        ridge: see `pleas`.
        heads: `"shared"` by all models and fitted, or `"own"` for each model (outputs are concatenated): as they are,
            or with `"own_fitted"` fitted to the merged network.
        positions: see `pleas`.
    """

    budget: float | int | None = None
    params: float | int | None = None
    width: tuple[tuple[str, float | int], ...] | None = None
    shape: str = "uniform"
    metric: str = "correlation"
    selection: Selection = "matched"
    mode: Mode = "parallel"
    targets: Targets = "mean"
    ridge: Ridge = "auto"
    heads: Literal["shared", "own", "own_fitted"] = "shared"
    positions: int | None = None

    def __call__(self, state: MergeState) -> MergeState:
        """Return the state with the merged network as its only model, and spec, plan and `apply` that belong to it.

        Needs `apply` and `data`; owners and BatchNorm are for the function.
        """
        apply, data = state.need("apply", "Pleas"), state.need("data", "Pleas")
        spec, apart, keep = state.spec, (), ()
        if self.heads != "shared":
            first = batches(data, None)[0][0]
            spec, apart, keep = own_heads(spec, apply, state.models[0], *first)
        state, key = state.split()
        size: dict[str, Any] = {"budget": self.budget, "params": self.params, "width": self.width and dict(self.width)}
        chosen: dict[str, Any] = {"shape": self.shape, "metric": self.metric, "selection": self.selection}
        plan = pleas_plan(spec, state.models, apply=apply, data=data, apart=apart, **size, **chosen)
        fit = {"mode": self.mode, "targets": self.targets, "ridge": self.ridge, "positions": self.positions}
        kept = keep if self.heads == "own" else ()
        result = pleas(spec, state.models, plan, apply=apply, data=data, keep=kept, key=key, **fit)
        joined = "mean" if self.heads == "shared" else "concatenate"
        network = block_apply(spec, plan, apply, joined=joined)
        whole = plan if state.plan is None or apart else composed(spec, state.plan, plan)
        after = state.after(result._replace(plan=whole))
        return replace(after, spec=network.wide.wide_spec, apply=network)


def _collected(sweep: Sweep, chunks: Sequence[Chunk]) -> Grams:
    """Return the statistics of all layers, taken batch by batch."""
    found: Grams = {}

    def visit(layer: Layer, grams: tuple[Gram, ...], _: tuple[Gram, ...]) -> None:
        found[layer.leaf] = summed(found[layer.leaf], grams) if layer.leaf in found else grams

    for number, chunk in enumerate(chunks):
        key = None if sweep.key is None else jax.random.fold_in(sweep.key, number)
        replace(sweep, key=key).walk([chunk], visit)
    return found


def _visit_all(sweep: Sweep, inputs: Sequence[Any], grams: Grams, visit: Callable) -> None:
    layers = list(sweep.layers(inputs))
    for layer in layers:
        _check_grams(sweep, layer, grams.get(layer.leaf, ()))
    for layer in layers:
        visit(layer, grams[layer.leaf], ())


def _check_grams(sweep: Sweep, layer: Layer, grams: tuple[Gram, ...]) -> None:
    """Check that statistics are there, of the mode, and for the weights of the plan."""
    if not grams:
        raise ValueError(f"the statistics lack the layer '{layer.leaf}'; collect them with the same plan and `keep`.")
    if len(grams) != (sweep.count if sweep.mode == "separate" else 1):
        raise ValueError(
            f"the statistics of the layer '{layer.leaf}' are not those of mode '{sweep.mode}': there are {len(grams)} "
            f"for {sweep.count} models; collect them in the same mode."
        )
    if (shape := layer.matrix(sweep.named).shape) != grams[0].cross.shape:
        raise ValueError(
            f"the statistics of the layer '{layer.leaf}' are for weights {grams[0].cross.shape}, but the plan makes "
            f"{shape} of them (constant included); collect them with the same plan and `batch_statistics`."
        )


def _typed(sweep: Sweep, like: Any) -> dict[str, Any]:
    """Return the wide leaves of the kind that the parents' are."""
    return {n: namespace(x).asarray(sweep.named[n]) for n, x in tree.flatten(like).items()}


def _info(found: Sequence[LayerFit], sweep: Sweep, samples: int) -> PleasInfo:
    columns = {
        k: np.asarray([getattr(f, k) for f in found]) for k in ("before", "after", "ridge", "rows", "rank_deficient")
    }
    spec = sweep.wide.spec
    done = sweep.fitted | {bias for leaf, bias in sweep.biases.items() if leaf in sweep.fitted}
    averaged = [x.name for x in spec.leaves if x.role == "weight" and len(x.shape) > 1 and x.name not in done]
    return PleasInfo(tuple(f.leaf for f in found), **columns, averaged=tuple(averaged), samples=samples)


def _warn(found: Sequence[LayerFit]) -> None:
    short = [f for f in found if f.rows < f.unknowns]
    if short:
        worst = min(short, key=lambda f: f.rows / f.unknowns)
        warnings.warn(
            f"{len(short)} of {len(found)} layers have fewer equations than unknowns (layer '{worst.leaf}': "
            f"{worst.rows} for {worst.unknowns}), so that the averaged weights decide there; give more samples.",
            stacklevel=3,
        )
