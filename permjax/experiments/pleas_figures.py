"""The figures of a PLeaS run: accuracy against cost, and what the fits left of the residuals."""

from collections.abc import Iterator

import numpy as np

from permjax.experiments.pleas_rows import FIELDS, TITLES, Rows
from permjax.report import Curve, Figure

_SHOWN = {
    "cost": (
        "PLeaS",
        (
            "pleas_owner",
            "pleas_parallel",
            "permutation_correlation",
            "lstsq_identity_owner",
            "ensemble",
            "joint_trained",
        ),
    ),
    "baselines": (
        "other methods",
        ("permutation_distance", "permutation_weights", "repair", "regmean", "zip", "average"),
    ),
    "controls": (
        "controls",
        (
            "pleas_owner",
            "pleas_sequential",
            "lstsq_identity_owner",
            "lstsq_identity_parallel",
            "distill_merged",
            "distill_scratch",
        ),
    ),
    "free": ("PLeaS-free", ("pleas_owner", "pleas_free", "pleas_parallel", "permutation_correlation")),
}
"""Figures by name: what they show, and of which methods; more than six lines cannot be told apart."""


def figures(rows: Rows) -> Iterator[Figure]:
    """Accuracy against cost in several figures, and residuals at the smallest budget of every method that fits."""
    fields = [f for f in rows.fields if f != "probe"]
    for field in fields:
        yield _cost_figure(rows, "cost", field)
    for name in ("baselines", "controls", *(("free",) if "pleas_free" in rows.methods else ())):
        yield _cost_figure(rows, name, fields[-1])
    for method in rows.methods:
        budget = next((b for b in rows.budgets if rows.residuals((method, b))), None)
        if budget is not None:
            yield _residual_figure(rows, method, budget)


def _cost_figure(rows: Rows, name: str, field: str) -> Figure:
    heading, methods = _SHOWN[name]
    curves = tuple(curve for m in methods if (curve := _curve(rows, m, field)) is not None)
    caption = "Cost counts operations with the block structure; the table of costs has what dense arrays would take."
    caption += " Bands span the pairs." if len(rows.trials) > 1 else ""
    title = f"{FIELDS[field]} against cost: {heading}"
    return Figure(f"{name}_{field}", title, caption, "cost, as a multiple of one parent's", "accuracy [%]", curves)


def _curve(rows: Rows, method: str, field: str) -> Curve | None:
    """Return the line of a method over its budgets, or its point."""
    known = sorted((rows.cost(row), rows.values(row, field)) for row in rows.all if row[0] == method)
    known = [(cost, values) for cost, values in known if values and not np.isnan(cost)]
    if not known:
        return None
    values = np.array([v for _, v in known])
    low, high = (values.min(1), values.max(1)) if values.shape[1] > 1 else (None, None)
    return Curve(TITLES[method], [cost for cost, _ in known], values.mean(1), low, high)


def _residual_figure(rows: Rows, method: str, budget: int) -> Figure:
    found = rows.residuals((method, budget))
    values = np.array(list(found.values()))  # [layers, 2]
    curves = (Curve("before", list(found), values[:, 0]), Curve("after", list(found), values[:, 1]))
    caption = "Of every layer that was fitted, relative to its targets, before and after the fit; means over the pairs."
    title = f"Residual of the layers: {TITLES[method]}, {budget} %"
    return Figure(f"residual_{method}", title, caption, "layer", "relative residual", curves, "bars")
