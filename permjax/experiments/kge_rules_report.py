"""What measuring the rules of a trained model tells: the strongest of each kind, and how many known ones they are."""

from collections.abc import Collection
from typing import Any

import numpy as np

from permjax.experiments.nfe_rows import title
from permjax.kge.graph import Graph
from permjax.kge.model_files import KgeModel, family_name
from permjax.kge.rules import CONFIDENCE, STRENGTH, MeasuredRule, Recovery, RuleReport, recovery
from permjax.kge.triples import KINDS, Rule
from permjax.report import Matrix, Outcome, Table, Text

_LARGEST_MAP = 13  # relations


def ruled_outcome(model: KgeModel, found: RuleReport, kinds: Collection[str], top: int) -> Outcome:
    """The outcome of measuring rules.

    Args:
        model: whose rules they are.
        found: all that were measured.
        kinds: which kinds were.
        top: how many of each kind to list.
    """
    graph, strong = model.graph, found.found()
    counts = {kind: sum(row.rule.kind == kind for row in strong) for kind in KINDS}
    told = ", ".join(f"{kind} {count}" for kind, count in counts.items() if count) or "none"
    known = [rule for rule in graph.rules if rule.kind in kinds]
    summary = (
        f"{title(family_name(model.family))} of {graph.name}: {len(strong)} of {len(found.rules)} rules have at least "
        f"the strength {STRENGTH:g} in the model and the confidence {CONFIDENCE:g} in train ({told})."
    )
    numbers: dict[str, Any] = {"rules_measured": len(found.rules), "rules_found": len(strong)}
    tables = [rule_table(found, graph, top)]
    if known:
        numbers |= recovered(found, known)
        summary += f" {recovered_in_words(numbers)}"
        tables.append(recovery_table(found, known))
    return Outcome(
        title=f"Rules of {graph.name} in a model",
        summary=summary,
        metrics=numbers | {f"{kind}_found": count for kind, count in counts.items() if count},
        tables=(*tables,),
        figures=(agreement_map(found, graph),),
        texts=(Text("All rules", "\n".join(f"{row.strength:.3f}  {row.rule}" for row in found.rules)),),
        headline=(*numbers,),
    )


def recovered(found: RuleReport, known: Collection[Rule]) -> dict[str, float]:
    """The precision and the recall of the rules that are found, all kinds together."""
    _, *counts = zip(*recovery(found.found(), known), strict=True)
    whole = Recovery("all", *map(sum, counts))
    return {"rules_precision": whole.precision, "rules_recall": whole.recall}


def recovered_in_words(numbers: dict[str, Any]) -> str:
    """Precision and recall in a sentence."""
    return (
        f"Of those found {numbers['rules_precision']:.0%} are rules that the graph was made with, and of these "
        f"{numbers['rules_recall']:.0%} are found."
    )


def rule_table(found: RuleReport, graph: Graph, top: int) -> Table:
    """The strongest rules of each kind, with what the graph says of them."""
    known = {*graph.rules}
    best = [row for kind in KINDS for row in [row for row in found.rules if row.rule.kind == kind][:top]]
    rows = tuple((*_cells(row), *(["yes" if row.rule in known else "no"] if known else [])) for row in best)
    columns = ("rule", "kind", "strength", "agreement", "answered", "support", "confidence")
    caption = (
        "Strength: 1 where the model keeps the rule. Agreement of the two sides as maps: 1 for equal maps, 0 for two "
        "relations picked at random. Answered: mean of 1 / rank of what the rule concludes. Support: pairs in train "
        "that bear it out. Confidence: the part of the pairs in train with its premises that have the conclusion too."
    )
    return Table(f"The {top} strongest rules of each kind", (*columns, *(["holds"] if known else [])), rows, caption)


def _cells(row: MeasuredRule) -> tuple:
    agreement = "" if np.isnan(row.agreement) else f"{row.agreement:.3f}"
    return str(row.rule), row.rule.kind, row.strength, agreement, row.answered, row.support, row.confidence


def recovery_table(found: RuleReport, known: Collection[Rule]) -> Table:
    """Precision and recall of each kind of rule."""
    rows = tuple((*row, row.precision, row.recall) for row in recovery(found.found(), known))
    caption = (
        "Rules without exception in the whole graph, of which train has a part, against those with at least the "
        f"strength {STRENGTH:g} in the model and the confidence {CONFIDENCE:g} in train."
    )
    columns = ("kind", "hold", "found", "found and hold", "precision", "recall")
    return Table("Known rules that are found", columns, rows, caption)


def agreement_map(found: RuleReport, graph: Graph) -> Matrix:
    """How alike each of the most frequent relations is to the reverse of each other one."""
    count = len(graph.relations)
    frequent = np.argsort(-np.bincount(graph.train[:, 1], minlength=count), kind="stable")
    shown = np.sort(frequent[:_LARGEST_MAP])
    names, reverses = [found.names[r] for r in shown], [found.names[r + count] for r in shown]
    caption = (
        "As maps of what was learned: 1 where the relation is the inverse of the other (on the diagonal: symmetric), 0 "
        "where they are no more alike than two relations picked at random."
    )
    values = np.clip(found.agreement[np.ix_(shown, shown + count)], 0, 1)
    return Matrix("agreement", "Relations and reverses", caption, "reverse", "relation", "", names, reverses, values)
