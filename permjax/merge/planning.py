"""From a budget to a plan: how many units of every group are merged, and which."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from permjax.match.assignment import Solver
from permjax.merge.block_apply import Apply, block_apply
from permjax.merge.budget import cost
from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.partial import constrained_plan, partial_plan, widenable
from permjax.merge.preparing import check_inputs
from permjax.merge.ratios import ratios_for
from permjax.merge.scores import matched_scores, unit_scores
from permjax.merge.wide import Wide
from permjax.plan import Plan
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.work import contractions

Selection: TypeAlias = Literal["matched", "constrained"]


def pleas_plan(
    spec: PermutationSpec,
    models: Sequence[Any],
    *,
    apply: Callable,
    data: Iterable,
    budget: float | int | None = None,
    params: float | int | None = None,
    width: Mapping[str, float | int] | None = None,
    shape: str = "uniform",
    metric: str = "correlation",
    selection: Selection = "matched",
    apart: Sequence[str] = (),
    whole: Sequence[str] = (),
    kernels: Mapping[str, Any] | None = None,
    solver: Solver = "auto",
) -> Plan:
    """Return which units of aligned models are merged so that the network has the size that is asked for.

    Args:
        spec: the symmetry of the models.
        models: two or more aligned pytrees.
        apply: `apply(params, *inputs) -> outputs`.
        data: calibration batches; the first one also tells the shapes.
        budget: FLOPs of the merged network, block-sparse, as a multiple of one model's, from 1 to their number (or what
            the groups apart cost, if that is more); or
        params: parameters as they are stored, zero blocks included, as such a multiple; or
        width: group -> share of its units that every model keeps for itself. Exactly one of the three.
        shape: `"uniform"`: one ratio for all groups; `"staged"`: the first groups merged, the last ones separate;
            `"optimised"`: by what each group is worth on the data (`group_probes`).
        metric: by which units are chosen; see `unit_scores`.
        selection: the k best of the matched pairs (the paper), or the k best pairs anew (two models).
        apart: groups that no models share, as heads of different label spaces.
        whole: groups in which all units are merged.
        kernels: what `unit_scores` gave for this metric before; to be computed otherwise.
        solver: of the assignments of `"constrained"`.

    Returns:
        A plan over the aligned models.

    Raises:
        ValueError: a size that cannot be had, unknown names, or models and data that do not fit.

    Source:
        Nasery, Hayase, Koh, Oh, "PLeaS", CVPR 2025, sections 3.1 and 3.3.
    """
    models = tuple(models)
    inputs = _inputs(next(iter(data), None))
    check_inputs(apply, models[0], inputs)
    works = contractions(apply, spec, models[0], *inputs)
    size: dict[str, Any] = {"budget": budget, "params": params, "width": width}
    options: dict[str, Any] = {"models": len(models), "apart": tuple(apart), "whole": tuple(whole)}
    probes = None
    if shape == "optimised":
        probes = group_probes(spec, models, apply=apply, inputs=inputs, apart=apart, whole=whole)
    if budget is not None and apart:  # heads of their own may cost more than one network by themselves
        heads = partial_plan(spec, ratios=dict.fromkeys(apart, 1.0), models=len(models))
        size["budget"] = max(budget, cost(works, spec, heads).relative["flops"])
    ratios = ratios_for(works, spec, **size, shape=shape, probes=probes, **options)
    kernels = kernels or unit_scores(spec, models, metric=metric, apply=apply, data=data)
    if selection == "matched":
        return partial_plan(spec, ratios=ratios, scores=matched_scores(kernels), models=len(models))
    if selection != "constrained" or len(models) != 2:
        raise ValueError(
            f"selection is {selection!r} of {len(models)} models; choose 'matched', or 'constrained' for two."
        )
    return constrained_plan(spec, ratios=ratios, kernels={g: k[0] for g, k in kernels.items()}, solver=solver)


def group_probes(
    spec: PermutationSpec,
    models: Sequence[Any],
    *,
    apply: Apply,
    inputs: Sequence[Any],
    apart: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> dict[str, tuple[float, float]]:
    """Return what every group is worth: (gain of keeping only it separate, loss of merging only it).

    The quality of a merged network is minus the mean squared error of its outputs, in the view of every model, against
    this model's, relative to their variance. No labels are needed, and nothing is fitted.

    Source:
        Nasery, Hayase, Koh, Oh, "PLeaS", CVPR 2025, section 3.3 (there by accuracy on ImageNet).
    """
    groups = [g for g in widenable(spec) if g not in (*apart, *whole)]
    always = dict.fromkeys(apart, 1.0)
    wanted = [jax.jit(apply)(model, *inputs) for model in models]
    summed = contracted_axes(apply, models[0], *inputs)

    def quality(ratios: Mapping[str, float]) -> float:
        plan = partial_plan(spec, ratios=always | dict(ratios), models=len(models))
        network = block_apply(spec, plan, apply, joined="tuple")
        outputs = jax.jit(network)(wide_average(Wide(spec, plan), models, summed), *inputs)
        return -float(np.mean([_error(a, b) for a, b in zip(outputs, wanted, strict=True)]))

    merged, separate = quality({}), quality(dict.fromkeys(groups, 1.0))
    return {g: (quality({g: 1.0}) - merged, separate - quality({h: 1.0 for h in groups if h != g})) for g in groups}


def _error(outputs: Any, wanted: Any) -> float:
    pairs = list(zip(jax.tree.leaves(outputs), jax.tree.leaves(wanted), strict=True))
    return float(np.mean([jnp.mean((a - b) ** 2) / jnp.maximum(jnp.var(b), 1e-12) for a, b in pairs]))


def _inputs(batch: Any) -> tuple:
    if batch is None:
        raise ValueError("`data` gave no batches; give a list of batches, each as `apply` takes it.")
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)
