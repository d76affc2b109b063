"""What a run on knowledge graphs tells: ranks under both treatments of ties, by relation, and controls."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from permjax.experiments.kge_rules_report import agreement_map, recovered, recovery_table, rule_table
from permjax.experiments.nfe_figures import figures
from permjax.experiments.nfe_rows import CLASSES, MEASURES, Trial, Trials, title
from permjax.experiments.pleas_scores import Difference, paired_difference
from permjax.kge.breakdown import cardinalities
from permjax.kge.graph import Graph
from permjax.kge.leakage import Leakage, leakage
from permjax.kge.model_files import KgeModel
from permjax.kge.rules import measure_rules
from permjax.report import Outcome, Table, Text

_FILTERED = (
    "Filtered ranks of head and tail of every test triple: other answers that train, valid or test know are left out. "
    "Ties count half (realistic); 'pessimistic' puts the answer behind them."
)


def report(config: Any, graphs: Mapping[str, Graph], trials: Trials, first: KgeModel) -> Outcome:
    """The outcome of all models on all graphs.

    Args:
        config: of the run, with `compared`.
        graphs: by the names that the trials have.
        trials: what was measured.
        first: the model that is saved.
    """
    leaks = {key: leakage(graph) for key, graph in graphs.items()}
    differences = dict(_differences(config.compared, trials))
    rules = measure_rules(first.family, first.params, first.graph) if first.graph.rules else None
    metrics = dict(_metrics(trials, graphs, differences, leaks))
    metrics |= {} if rules is None else recovered(rules, first.graph.rules)
    models = ", ".join(map(title, trials.models))
    tables = [
        _results(trials, graphs),
        *([_compared(differences)] if differences else []),
        _parts(trials, graphs),
        _relations(trials, next(iter(graphs.values()))),
        _speed(trials, graphs),
        _leaks(graphs, leaks),
        *([] if rules is None else [recovery_table(rules, first.graph.rules), rule_table(rules, first.graph, 5)]),
    ]
    return Outcome(
        title=f"Knowledge graphs by normalizing flows: {models} on {', '.join(g.name for g in graphs.values())}",
        summary=" ".join((_setting(trials, graphs), *_verdicts(trials, graphs, differences))),
        metrics=metrics,
        tables=(*tables,),
        figures=(
            *figures(trials, graphs, differences, first),
            *([] if rules is None else [agreement_map(rules, first.graph)]),
        ),
        texts=tuple(_texts(graphs, leaks)),
        headline=("mrr", "hits_at_1", "hits_at_10", "mrr_pessimistic", "triples_per_second", "queries_per_second"),
    )


# metrics


def _metrics(
    trials: Trials, graphs: Mapping[str, Graph], differences: Mapping[Any, Difference], leaks: Mapping[str, Leakage]
) -> Iterator[tuple[str, Any]]:
    """Yield the numbers of the first trial, then by model on the first graph, then by graph and model."""
    graph, trial = next(iter(graphs.values())), trials.first
    yield from _numbers("", trial)
    yield "amr", float(np.mean(trial.values("amr")))
    yield from trial.control().items()
    yield from ((f"{side}_mrr", value) for side, value in trial.directions().items())
    yield from ((f"mrr_{name.lower().replace('-', '_')}", value) for name, value in trial.classes(graph).items())
    yield from (("entities", graph.size), ("relations", len(graph.relations)), ("test_triples", len(graph.test)))
    yield "test_triples_answered_by_train", next(iter(leaks.values())).answered
    yield "seeds", len(trials.seeds)
    for (key, name, other), difference in differences.items():
        stem = f"{key}_{name}_over_{other}" if len(graphs) > 1 else f"{name}_over_{other}"
        yield stem, difference.mean
        if difference.seeds > 1:
            yield from ((f"{stem}_low", difference.low), (f"{stem}_high", difference.high))
    for (key, name), trial in trials.found.items():
        if len(trials.models) > 1 and key == trials.graphs[0]:
            yield from _numbers(f"{name}_", trial)
        if len(graphs) > 1:
            yield from _numbers(f"{key}_{name}_", trial)


def _numbers(prefix: str, trial: Trial) -> Iterator[tuple[str, float]]:
    """Yield the means over seeds, and of what the ranks give the standard deviation and the pessimistic form."""
    for measure in MEASURES:
        yield from _spread(prefix + measure, trial.values(measure))
    for measure in MEASURES:
        yield from _spread(f"{prefix}{measure}_pessimistic", trial.values(measure, "pessimistic"))
    yield f"{prefix}valid_mrr", float(np.mean(trial.result.valid_mrr))
    yield f"{prefix}triples_per_second", trial.result.triples_per_second
    yield f"{prefix}queries_per_second", trial.queries_per_second
    yield f"{prefix}seconds_train", trial.result.seconds


def _spread(name: str, values: Sequence[float]) -> Iterator[tuple[str, float]]:
    yield name, float(np.mean(values))
    if len(values) > 1:
        yield f"{name}_std", float(np.std(values, ddof=1))


def _differences(
    compared: Sequence[tuple[str, str]], trials: Trials
) -> Iterator[tuple[tuple[str, str, str], Difference]]:
    """Yield differences in MRR, paired over seeds, by graph and the two models."""
    for graph in trials.graphs:
        for name, other in compared:
            values = (trials.found[graph, model].values("mrr") for model in (name, other))
            yield (graph, name, other), paired_difference(*values)


# words


def _setting(trials: Trials, graphs: Mapping[str, Graph]) -> str:
    sizes = "; ".join(
        f"{graph.name} with {graph.size:,} entities, {len(graph.relations)} relations and "
        f"{' / '.join(f'{len(triples):,}' for triples in graph.splits.values())} triples"
        for graph in graphs.values()
    )
    count = len(trials.seeds)
    seeds = f"the seeds {trials.seeds[0]}..{trials.seeds[-1]}" if count > 1 else f"the seed {trials.seeds[0]}"
    return f"{sizes} (train / valid / test). Trained from {seeds}; the best epoch is that of the validation triples."


def _verdicts(trials: Trials, graphs: Mapping[str, Graph], differences: Mapping[Any, Difference]) -> Iterator[str]:
    """Yield what the numbers say, whatever that is; of several graphs only of the first model and the first pair."""
    several = len(graphs) > 1
    for (key, name), trial in trials.found.items():
        if several and name != trials.models[0]:
            continue
        mrr, behind = (float(np.mean(trial.values("mrr", policy))) for policy in ("realistic", "pessimistic"))
        ties = "" if f"{mrr:.3f}" == f"{behind:.3f}" else f" ({behind:.3f} with ties at their worst)"
        yield f"{title(name)} on {graphs[key].name}: MRR {mrr:.3f}{ties}."
    control = trials.first.control()
    if control:
        yield (
            f"With permuted entities in the test triples the MRR is {control['permuted_mrr']:.4f}, where chance gives "
            f"{control['chance_mrr']:.4f}."
        )
    pairs = list(dict.fromkeys((name, other) for _, name, other in differences))
    for (key, name, other), found in differences.items():
        if several and (name, other) != pairs[0]:
            continue
        yield f"{title(name)} minus {title(other)} on {graphs[key].name}: {_points(found)} MRR, {_effect(found)}."


def _points(found: Difference) -> str:
    ends = f" [{found.low:+.4f}, {found.high:+.4f}]" if found.seeds > 1 else ""
    return f"{found.mean:+.4f}{ends}"


def _effect(found: Difference) -> str:
    """Say whether a difference is clear; one seed never shows it."""
    clear = found.seeds > 1 and (found.low > 0 or found.high < 0)
    return ("a gain" if found.mean > 0 else "a loss") if clear else "no clear difference"


# tables


def _results(trials: Trials, graphs: Mapping[str, Graph]) -> Table:
    rows = []
    for (key, name), trial in trials.found.items():
        cells = [_cell(trial.values(measure), 1 if measure == "mr" else 3) for measure in MEASURES]
        behind = _cell(trial.values("mrr", "pessimistic"))
        rows.append((graphs[key].name, title(name), *cells, behind, _chance(trial)))
    columns = ("graph", "model", "MRR", "Hits@1", "Hits@3", "Hits@10", "mean rank", "MRR, pessimistic", "permuted")
    caption = (
        f"{_FILTERED}{_over(trials)} 'Permuted': the MRR of test triples with permuted entities / that of chance; they "
        "must agree."
    )
    return Table("Test triples", columns, tuple(rows), caption)


def _chance(trial: Trial) -> str:
    control = trial.control()
    return f"{control['permuted_mrr']:.4f} / {control['chance_mrr']:.4f}" if control else ""


def _compared(differences: Mapping[tuple[str, str, str], Difference]) -> Table:
    rows = tuple(
        (graph, f"{title(name)} - {title(other)}", found.mean, found.low, found.high, _effect(found))
        for (graph, name, other), found in differences.items()
    )
    columns = ("graph", "difference in MRR", "mean", "low", "high", "")
    caption = "Paired over seeds, with the 95 % interval of Student's t."
    return Table("Differences", columns, rows, caption)


def _parts(trials: Trials, graphs: Mapping[str, Graph]) -> Table:
    rows = []
    for (key, name), trial in trials.found.items():
        sides, classes = trial.directions(), trial.classes(graphs[key])
        cells = (f"{classes[one]:.3f}" if one in classes else "" for one in CLASSES)
        rows.append((graphs[key].name, title(name), sides["head"], sides["tail"], *cells))
    caption = (
        "Realistic MRR of questions for heads and for tails, and of relations by how many heads and tails they have."
    )
    return Table("By direction and kind of relation", ("graph", "model", "heads", "tails", *CLASSES), (*rows,), caption)


def _relations(trials: Trials, graph: Graph) -> Table:
    asked = np.bincount(graph.test[:, 1], minlength=len(graph.relations))
    found = {name: trials.found[trials.graphs[0], name].relations(graph) for name in trials.models}
    kinds = cardinalities(graph)
    rows = tuple(
        (graph.relations[r], kinds[r], int(asked[r]), *(one[graph.relations[r]] for one in found.values()))
        for r in np.argsort(-asked, kind="stable")
        if asked[r]
    )
    columns = ("relation", "kind", "test triples", *map(title, found))
    return Table(f"By relation, {graph.name}", columns, rows, "Realistic MRR, the most frequent relations first.")


def _speed(trials: Trials, graphs: Mapping[str, Graph]) -> Table:
    rows = tuple(
        (
            graphs[key].name,
            title(name),
            round(trial.result.triples_per_second),
            round(trial.queries_per_second),
            trial.result.seconds,
            f"{np.mean(trial.result.best_epoch) + 1:.0f}",
        )
        for (key, name), trial in trials.found.items()
    )
    columns = ("graph", "model", "triples / s", "queries / s", "training [s]", "best epoch")
    caption = (
        f"Training counts both directions of a triple; seconds are of {len(trials.seeds)} models with validation and "
        "compilation. A query ranks all entities under all treatments of ties."
    )
    return Table("Speed", columns, rows, caption)


def _leaks(graphs: Mapping[str, Graph], leaks: Mapping[str, Leakage]) -> Table:
    rows = tuple(
        (graph.name, leaks[key].triples, leaks[key].repeated, leaks[key].answered, len(leaks[key].twins))
        for key, graph in graphs.items()
    )
    columns = ("graph", "test triples", "repeated in train", "answered by a twin", "relations with a twin")
    caption = (
        "A test triple is answered by a twin where train has the same two entities in a relation that says the same, "
        "possibly turned around (its inverse, or itself where it is symmetric). The texts below say which."
    )
    return Table("What train gives away", columns, rows, caption)


def _texts(graphs: Mapping[str, Graph], leaks: Mapping[str, Leakage]) -> Iterator[Text]:
    for key, graph in graphs.items():
        yield Text(f"{graph.name}: leakage", "\n".join(leaks[key].sentences()))
        if graph.notes:
            yield Text(f"{graph.name}: notes", "\n".join(graph.notes))
        if graph.rules:
            yield Text(f"{graph.name}: rules that hold", "\n".join(map(str, graph.rules)))


def _over(trials: Trials) -> str:
    count = len(trials.seeds)
    return f" Mean and standard deviation over {count} seeds." if count > 1 else ""


def _cell(values: Sequence[float], digits: int = 3) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
