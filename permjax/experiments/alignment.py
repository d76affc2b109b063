"""What matching found between models from files: numbers, tables and a sentence."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from permjax import tree
from permjax.match.activations import ActivationInfo
from permjax.match.weights import WeightInfo
from permjax.plan import Plan
from permjax.report import Curve, Figure, Table, Text
from permjax.symmetry.spec import PermutationSpec

HEADLINE = ("l2_before", "l2_after", "l2_reduction_percent", "equivalence_error")
"""What is said first of an alignment, of its `metrics`."""


class Alignment(NamedTuple):
    """Models before and after matching, the anchor first.

    Attributes:
        names: what to call them.
        spec: their symmetry.
        before: the models as read, float32 or wider.
        after: the models in the anchor's order.
        plan: the labels of their units.
        l2_before: for every model but the anchor, its distance to the anchor over leaves of role weight.
        l2_after: the same after matching.
        found: what else the matching tells, by name, for every model but the anchor.
        changes: for every model but the anchor, how much its outputs on the example inputs changed, relative to the
            largest one.
        seconds: time spent on matching.
    """

    names: tuple[str, ...]
    spec: PermutationSpec
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    plan: Plan
    l2_before: Float[np.ndarray, " models"]
    l2_after: Float[np.ndarray, " models"]
    found: Mapping[str, np.ndarray]
    changes: tuple[float, ...]
    seconds: float


def findings(info: WeightInfo | ActivationInfo) -> dict[str, np.ndarray]:
    """What a matching tells besides distances: what it made large, for every model but the anchor."""
    if isinstance(info, WeightInfo):
        return {"objective": info.objective[:, -1], "sweeps": info.sweeps}
    return {f"correlation {when}": np.nanmean(getattr(info, when), axis=1) for when in ("before", "after")}


def metrics(alignment: Alignment) -> dict[str, float | int]:
    """Means over the models but the anchor, the worst equivalence error, and distances one by one if several."""
    found = {
        "models": len(alignment.names),
        "l2_before": float(alignment.l2_before.mean()),
        "l2_after": float(alignment.l2_after.mean()),
        "l2_reduction_percent": float(_reductions(alignment).mean()),
        **{name.replace(" ", "_"): float(values.mean()) for name, values in alignment.found.items()},
        "equivalence_error": max(alignment.changes),
        "seconds_matching": alignment.seconds,
    }
    each = {
        f"l2_{when}_{index}": float(value)
        for when, values in (("before", alignment.l2_before), ("after", alignment.l2_after))
        for index, value in enumerate(values, 1)
    }
    return found | (each if len(alignment.names) > 2 else {})


def sentence(alignment: Alignment) -> str:
    """The result in words."""
    found = metrics(alignment)
    sizes = {g.name: np.prod(alignment.spec.shape(g.name)) for g in alignment.spec.groups}
    moved = sum(sizes[group] * share for group, share in _moved(alignment.plan).items()) / sum(sizes.values())
    several = ", on average" if len(alignment.names) > 2 else ""
    return (
        f"{100 * moved:.0f} % of the units in {len(sizes)} groups moved{several}; the distance to the anchor went from "
        f"{found['l2_before']:.4g} to {found['l2_after']:.4g} ({-found['l2_reduction_percent']:+.1f} %), and the "
        f"outputs changed by {found['equivalence_error']:.1e} (rounding)."
    )


def pages(alignment: Alignment) -> tuple[tuple[Table, Table], Figure]:
    """A table of the models, and a table and a figure of the groups."""
    before, after = (_cosines(alignment.spec, models) for models in (alignment.before, alignment.after))
    groups = [g.name for g in alignment.spec.groups]
    curves = Curve("before", groups, before), Curve("after", groups, after)
    caption = "Of the weights that carry each group, with those of the anchor."
    title, ylabel = "Similarity before and after matching", "cosine similarity"
    figure = Figure("similarity", title, caption, "group", ylabel, curves, "bars")
    return (_of_models(alignment), _of_groups(alignment, before, after)), figure


def explanation(spec: PermutationSpec) -> Text:
    """The symmetry in words."""
    return Text("Permutation spec", spec.explain())


def _of_models(alignment: Alignment) -> Table:
    distances = {"L2 before": alignment.l2_before, "L2 after": alignment.l2_after}
    columns = {**distances, "reduction [%]": _reductions(alignment), **alignment.found}
    columns["change of outputs"] = np.asarray(alignment.changes)
    rows = tuple(zip(alignment.names[1:], *columns.values(), strict=True))
    large = "inner product" if "objective" in alignment.found else "mean correlation of units"
    caption = (
        f"Distance over all weights to the anchor, {alignment.names[0]}, and the {large} with it, which matching "
        "makes large. The outputs of a permuted model change by rounding only."
    )
    return Table("Models", ("model", *columns), rows, caption)


def _of_groups(
    alignment: Alignment, before: Float[np.ndarray, " groups"], after: Float[np.ndarray, " groups"]
) -> Table:
    columns = ("group", "units", "per", "moved [%]", "cosine before", "cosine after")
    moved = _moved(alignment.plan)
    rows = tuple(
        (g.name, g.size, ", ".join(g.per), 100 * moved[g.name], b, a)
        for g, b, a in zip(alignment.spec.groups, before, after, strict=True)
    )
    caption = (
        "Units that changed their place, and cosine similarity of the weights that carry the group with the anchor's"
    )
    return Table("Groups", columns, rows, caption + ("; means over the models." if len(alignment.names) > 2 else "."))


def _reductions(alignment: Alignment) -> Float[np.ndarray, " models"]:
    """How much nearer each model came, in percent; 0 where it was no distance away."""
    before = np.where(alignment.l2_before > 0, alignment.l2_before, 1.0)
    return 100 * (alignment.l2_before - alignment.l2_after) / before


def _moved(plan: Plan) -> dict[str, float | int]:
    """The share of the units of each group whose place changed."""
    return {
        group: float(np.mean([rows != np.arange(rows.shape[-1]) for rows in labels[1:]]))
        for group, labels in plan.labels.items()
    }


def _cosines(spec: PermutationSpec, models: tuple[Any, ...]) -> Float[np.ndarray, " groups"]:
    """The mean cosine with the anchor of the weights that carry each group."""
    anchor, *others = (tree.flatten(model) for model in models)
    weights = [leaf.name for leaf in spec.leaves if leaf.role == "weight"]
    pairs = [{name: (anchor[name], other[name]) for name in weights} for other in others]
    return np.mean([_cosines_of_pair(spec, pair) for pair in pairs], axis=0)


def _cosines_of_pair(spec: PermutationSpec, pairs: Mapping[str, tuple[Any, Any]]) -> list[float]:
    products = {n: np.array([tree.dot(a, b), tree.dot(a, a), tree.dot(b, b)]) for n, (a, b) in pairs.items()}

    def cosine(group: str) -> float:
        names = {member.leaf for member in spec.members(group)} & products.keys()
        both, here, there = np.sum([products[name] for name in sorted(names)], axis=0)
        return float(both / np.sqrt(here * there)) if here * there > 0 else 1.0

    return [cosine(g.name) for g in spec.groups]
