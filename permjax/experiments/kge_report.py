"""What evaluating, asking and exporting a trained model tell."""

from typing import Any, TypeAlias

from permjax.experiments.nfe_rows import CLASSES, MEASURES, title
from permjax.kge.breakdown import by_cardinality, by_direction, by_relation
from permjax.kge.graph import Graph
from permjax.kge.model_files import KgeModel, family_name
from permjax.kge.rank import Policy, Ranks, rank_metrics
from permjax.kge.serve import Answers
from permjax.report import Outcome, Table

_POLICIES: dict[Policy, str] = {
    "optimistic": "optimistic: the answer before its ties",
    "realistic": "realistic: the mean over orders of ties",
    "pessimistic": "pessimistic: the answer behind its ties",
    "libkge": "as LibKGE: ties up to a tolerance",
}

_Numbers: TypeAlias = dict[Policy, dict[str, float]]


def evaluated_outcome(model: KgeModel, graph: Graph, found: Ranks, split: str) -> Outcome:
    """The outcome of an evaluation.

    Args:
        model: that ranked.
        graph: whose triples it ranked.
        found: the ranks.
        split: whose triples they are.
    """
    numbers: _Numbers = {policy: rank_metrics(found, policy) for policy in _POLICIES}
    chosen = {f"{name}_{policy}": numbers[policy][name] for policy in numbers for name in MEASURES}
    real = numbers["realistic"]
    return Outcome(
        title=f"{_what(model)} on the {split} triples of {graph.name}",
        summary=(
            f"{_what(model)} ranks head and tail of {len(graph.splits[split]):,} {split} triples of {graph.name}: "
            f"MRR {real['mrr']:.3f}, Hits@1 {real['hits_at_1']:.3f}, Hits@10 {real['hits_at_10']:.3f}."
        ),
        metrics={**{name: real[name] for name in (*MEASURES, "amr", "amri")}, **chosen},
        tables=(_policies(numbers), _parts(found, graph), _relations(found, graph)),
        headline=("mrr", "hits_at_1", "hits_at_10", "mrr_pessimistic"),
    )


def predicted_outcome(model: KgeModel, question: str, answers: Answers) -> Outcome:
    """The outcome of a question.

    Args:
        model: that was asked.
        question: as a triple with a question mark.
        answers: the best ones.
    """
    spread = answers.spread is not None
    rows = tuple(
        (place, one.name, one.score, one.known, *((one.spread,) if spread else ()))
        for place, one in enumerate(answers.answers, 1)
    )
    known = sum(bool(one.known) for one in answers.answers)
    words = f"The best answers to {question} by {_what(model)} of {model.graph.name}; {known} of them are known."
    caption = "Known: the split of the graph that has the triple."
    found: dict[str, Any] = {"best": rows[0][1], "best_score": rows[0][2], "known_answers": known}
    if answers.spread is not None:
        words += f" The law that it predicts has the spread {answers.spread:.4g}."
        caption += " Spread: the root mean square of the standard deviations of an entity's law."
        found["spread"] = answers.spread
    columns = ("rank", "entity", "score", "known", *(("spread",) if spread else ()))
    return Outcome(f"Answers to {question}", words, found, (Table("Answers", columns, rows, caption),))


def exported_outcome(model: KgeModel, out: str) -> Outcome:
    """The outcome of an export."""
    graph = model.graph
    summary = (
        f"{_what(model)} of {graph.name}, {graph.size:,} entities and {len(graph.relations)} relations with their "
        f"inverses, was written to {out}."
    )
    return Outcome(f"{_what(model)} exported", summary, {})


def _what(model: KgeModel) -> str:
    return title(family_name(model.family))


def _policies(numbers: _Numbers) -> Table:
    rows = tuple((words, *(numbers[policy][name] for name in MEASURES)) for policy, words in _POLICIES.items())
    caption = "Filtered: other answers that are known up to this split are left out."
    return Table("Ranks", ("ties", "MRR", "Hits@1", "Hits@3", "Hits@10", "mean rank"), rows, caption)


def _parts(found: Ranks, graph: Graph) -> Table:
    groups = by_direction(found) | by_cardinality(found, graph)
    rows = tuple((name, *(groups[name][m] for m in MEASURES)) for name in ("head", "tail", *CLASSES) if name in groups)
    columns = ("asked for, or kind of relation", "MRR", "Hits@1", "Hits@3", "Hits@10", "mean rank")
    return Table("By direction and kind of relation", columns, rows, "Realistic ranks.")


def _relations(found: Ranks, graph: Graph) -> Table:
    rows = tuple(
        (name, one["mrr"], one["hits_at_1"], one["hits_at_10"])
        for name, one in sorted(by_relation(found, graph).items(), key=lambda item: item[1]["mrr"])
    )
    return Table("By relation", ("relation", "MRR", "Hits@1", "Hits@10"), rows, "The most troubled first.")
