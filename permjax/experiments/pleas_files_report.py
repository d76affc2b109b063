"""What merging files by PLeaS tells: what the network costs, how well its layers fit, and what to beware of."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from permjax.experiments.alignment import Alignment, explanation, metrics, pages, sentence
from permjax.experiments.calibration_files import Calibration
from permjax.experiments.file_options import MergeOptions
from permjax.experiments.model_files import ModelFiles
from permjax.merge.block_apply import BlockApply
from permjax.merge.budget import Cost
from permjax.merge.pleas import PleasInfo
from permjax.merge.scale import ScaleInfo
from permjax.report import Curve, Figure, Outcome, Table, Text

HEADLINE = ("flops", "dense_params", "residual_before", "residual_after", "samples")
"""What is said first, of the metrics."""


class Fit(NamedTuple):
    """A network that was fitted.

    Attributes:
        params: its parameters.
        network: the function that takes them.
        info: how the fit went.
        cost: what the network costs.
        warnings: what was warned of.
        seconds: time spent on the choice of units and on the fit.
    """

    params: Any
    network: BlockApply
    info: PleasInfo
    cost: Cost
    warnings: tuple[str, ...]
    seconds: float

    @property
    def is_wide(self) -> bool:
        """Whether the network has other widths than one model."""
        return bool(self.network.wide.widened)


def outcome(
    options: MergeOptions,
    files: ModelFiles,
    data: Calibration,
    alignment: Alignment | None,
    fit: Fit,
    scaled: tuple[ScaleInfo, ...],
) -> Outcome:
    """The outcome of a merge."""
    tables, figure = pages(alignment) if alignment else ((), None)
    warned = tuple(_warnings(files, data, fit))
    words = [
        sentence(alignment) if alignment else "The models were taken as they are, without alignment.",
        *_scales(scaled),
        _fit_sentence(options, data, fit),
        _place(options, files, fit),
        *(f"Warning: {warning}" for warning in warned),
    ]
    return Outcome(
        title=f"{', '.join(options.models)} merged by PLeaS",
        summary=" ".join(words),
        metrics=_metrics(files, alignment, fit, len(warned)),
        tables=(_cost_table(fit.cost), _layer_table(fit.info), _group_table(fit), *tables),
        figures=(_residuals(fit.info), *((figure,) if figure else ())),
        texts=(*_averaged(fit.info), explanation(fit.network.wide.spec)),
        headline=HEADLINE,
    )


# -- numbers -------------------------------------------------------------------------------------------------------


def _metrics(files: ModelFiles, alignment: Alignment | None, fit: Fit, warned: int) -> dict[str, Any]:
    info = fit.info
    return {
        **{name: fit.cost.relative[name] for name in ("flops", "dense_flops", "params", "dense_params")},
        "residual_before": float(info.before.mean()) if len(info.layers) else 0.0,
        "residual_after": float(info.after.mean()) if len(info.layers) else 0.0,
        "samples": info.samples,
        "layers_fitted": len(info.layers),
        "leaves_averaged": len(info.averaged),
        "warnings": warned,
        "groups": len(files.spec.groups),
        **(metrics(alignment) if alignment else {"models": len(files.checkpoints)}),
        "seconds_fitting": fit.seconds,
    }


# -- words ---------------------------------------------------------------------------------------------------------


def _fit_sentence(options: MergeOptions, data: Calibration, fit: Fit) -> str:
    info, how = fit.info, options.pleas
    inputs = {"parallel": "the mean of the models' inputs", "sequential": "the inputs they get in the merged network"}
    targets = {"mean": "the mean of the models", "owner": "the model in whose domain the sample is"}
    heads = {
        "shared": "All models share one output layer.",
        "own": "Every model keeps its own output layer as it was; outputs stand one after the other.",
        "own-fitted": "Every model keeps an output layer of its own, fitted; outputs stand one after the other.",
    }
    change = f"from {info.before.mean():.4g} to {info.after.mean():.4g}" if len(info.layers) else "nowhere"
    return (
        f"{len(info.layers)} layers were fitted on {data.source}, to {inputs[how.mode]}, with {targets[how.targets]} "
        f"as the target of shared units; their relative residual went {change} on average. {heads[how.heads]}"
    )


def _scales(scaled: tuple[ScaleInfo, ...]) -> Iterator[str]:
    if scaled:
        counts = ", ".join(str(len(info.groups)) for info in scaled)
        change = max(info.change for info in scaled)
        yield f"The units of {counts} groups were brought to canonical scale, which changed outputs by {change:.1e}."


def _place(options: MergeOptions, files: ModelFiles, fit: Fit) -> str:
    relative = fit.cost.relative
    if not fit.is_wide:
        like = files.checkpoints[0].path
        return f"The network has the widths of one model and was written to {options.out}, stored like {like}."
    return (
        f"The network takes {relative['flops']:.3f} times the operations of one model and, stored densely, "
        f"{relative['dense_params']:.3f} times its numbers. It was written to {options.out} with its block structure; "
        "permjax.load_merged runs it at that cost."
    )


def _warnings(files: ModelFiles, data: Calibration, fit: Fit) -> Iterator[str]:
    """Yield what a reader has to beware of."""
    if data.generated:
        yield (
            "calibrated on generated noise, not on data like the models' (PLeaS-free): how well the network works on "
            "data depends on how alike they are."
        )
    yield from fit.warnings
    if any(leaf.role == "statistic" for leaf in files.spec.leaves):
        if files.statistics is None:
            yield "running statistics are means of the models': estimate them again on data before it is used."
        elif data.generated:
            yield "running statistics were estimated on this noise: estimate them again on data before it is used."


def _averaged(info: PleasInfo) -> Iterator[Text]:
    if info.averaged:
        head = "Leaves of two or more axes that no fit touches: they are kept, used several times, or not contracted."
        yield Text("Averaged only", "\n".join((head, "", *info.averaged)))


# -- tables and figure ---------------------------------------------------------------------------------------------


def _cost_table(cost: Cost) -> Table:
    rows = tuple(
        (what, parent, merged, merged / max(parent, 1))
        for what, parent, merged in (
            ("operations, without zero blocks", cost.parent_flops, cost.flops),
            ("operations, zero blocks included", cost.parent_flops, cost.dense_flops),
            ("numbers, without zero blocks", cost.parent_params, cost.params),
            ("numbers as stored", cost.parent_params, cost.dense_params),
        )
    )
    caption = (
        "Operations of contractions and convolutions on the example inputs. Weights between own units of different "
        "models are zero: they are stored, but permjax.load_merged does not compute with them."
    )
    return Table("Cost", ("what", "one model", "merged", "multiple"), rows, caption)


def _layer_table(info: PleasInfo) -> Table:
    columns = ("layer", "residual before", "residual after", "ridge", "equations", "left open by the inputs")
    values = (info.before, info.after, info.ridge, info.rows, info.rank_deficient)
    rows = tuple(zip(info.layers, *(column.tolist() for column in values), strict=True))
    caption = (
        "Mean squared error of the averaged and of the fitted weights over the variance of the targets, on the "
        "calibration data; weight of the averaged weights in the fit; and whether the inputs left the solution open, "
        "so that the one nearest to the averaged weights was taken."
    )
    if info.averaged:
        shown = ", ".join(info.averaged[:5]) + (f" and {len(info.averaged) - 5} more" if info.averaged[5:] else "")
        caption += f" Averaged only: {shown}."
    return Table("Layers", columns, rows, caption)


def _group_table(fit: Fit) -> Table:
    wide = fit.network.wide
    rows = []
    for group in (g for g in wide.spec.groups if not g.per):
        labels, width = wide.plan.labels[group.name], wide.plan.widths[group.name]
        counts = np.sum([np.bincount(np.unique(rows), minlength=width) for rows in labels], axis=0)
        rows.append((group.name, group.size, width, int((counts == wide.models).sum()), int((counts == 1).sum())))
    caption = "Units of one model, of the merged network, and how many of these belong to all models and to one alone."
    return Table("Units", ("group", "one model", "merged", "shared", "own"), tuple(rows), caption)


def _residuals(info: PleasInfo) -> Figure:
    curves = Curve("before", info.layers, info.before), Curve("after", info.layers, info.after)
    caption = "Of every layer that was fitted, relative to its targets, on the calibration data."
    return Figure("residual", "Residual of the layers", caption, "layer", "relative residual", curves, "bars")
