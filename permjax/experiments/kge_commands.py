"""The commands on knowledge graphs, as the command line sees them."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, Union

from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg, subcommand

from permjax.experiments import runs
from permjax.experiments.kge_report import evaluated_outcome, exported_outcome, predicted_outcome
from permjax.experiments.kge_rules_report import ruled_outcome
from permjax.experiments.runs import Finished, read_metrics
from permjax.kge.export import export
from permjax.kge.graph import GRAPHS, Graph, knowledge_graph, load_graph
from permjax.kge.model_files import KgeModel, load_kge, renamed
from permjax.kge.rank import rank_model
from permjax.kge.rules import measure_rules
from permjax.kge.serve import predict
from permjax.kge.triples import KINDS
from permjax.report import Outcome, write_report
from permjax.tree import nearest

_DEFAULT = "nfe_family"
_FEW = 20
_SLOW = ("exclusion", "composition", "intersection")

_Model = Annotated[str, Positional, arg(metavar="MODEL")]
_Name = Annotated[str | None, arg(metavar="NAME")]
_Graph = Annotated[str | None, arg(metavar="NAME|PATH")]
_Folder = Annotated[str | None, arg(metavar="DIR")]
_Report = Annotated[str | None, arg(aliases=("-o",), metavar="DIR")]


@dataclass(frozen=True)
class KgeTrain:
    """What to train, and where to.

    Attributes:
        config: a TOML file, or the name of one that comes with permjax; nfe_family by default.
        graph: train on this one instead: a name such as umls, a folder of triples, or an npz archive.
        out: the folder of the run, with the trained model in its folder model; runs/<CONFIG>-<hash> by default.
        overrides: replace one value of the configuration, as in training.epochs=3.
        force: start anew in a folder that holds a run.
        progress: show progress bars.
    """

    config: Annotated[str, Positional, arg(metavar="[CONFIG]")] = _DEFAULT
    graph: _Graph = None
    out: _Folder = None
    overrides: Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="SECTION.KEY=VALUE")] = ()
    force: FlagCreatePairsOff[bool] = False
    progress: bool = True


@dataclass(frozen=True)
class KgeEval:
    """What to evaluate.

    Attributes:
        model: the folder of a run, or its folder `model`.
        graph: rank the triples of this one instead of the model's own graph: a name such as umls, a folder of triples,
            or an npz archive; its names must be known to the model.
        split: which triples to rank.
        root: the folder of real data; the environment variable PERMJAX_DATA by default.
        out: also write a report to this folder.
    """

    model: _Model
    graph: _Graph = None
    split: Literal["train", "valid", "test"] = "test"
    root: _Folder = None
    out: _Report = None


@dataclass(frozen=True)
class KgePredict:
    """What to predict.

    Attributes:
        model: the folder of a run, or its folder `model`.
        relation: the name of a relation.
        head: the name of the head, to be told tails.
        tail: the name of the tail, to be told heads.
        top: how many answers.
        out: also write a report to this folder.
    """

    model: _Model
    relation: Annotated[str, arg(metavar="NAME")]
    head: _Name = None
    tail: _Name = None
    top: Annotated[int, arg(metavar="INT")] = 10
    out: _Report = None


@dataclass(frozen=True)
class KgeExport:
    """What to export, and where to.

    Attributes:
        model: the folder of a run, or its folder `model`.
        out: a `.npz` archive, or a `.tsv` file.
    """

    model: _Model
    out: Annotated[str, arg(aliases=("-o",), metavar="OUT")]


@dataclass(frozen=True)
class KgeRules:
    """Whose rules to list.

    Attributes:
        model: the folder of a run, or its folder `model`.
        kinds: a kind of rule: symmetry, antisymmetry, inverse, hierarchy, exclusion, composition or intersection; all
            of them by default, but the last three, which take long, only for graphs of at most 20 relations.
        top: how many rules of each kind.
        out: also write a report to this folder.
    """

    model: _Model
    kinds: Annotated[UseAppendAction[tuple[str, ...]], arg(name="kind", metavar="KIND")] = ()
    top: Annotated[int, arg(metavar="INT")] = 10
    out: _Report = None


Kge: TypeAlias = Union[  # noqa: UP007
    Annotated[
        KgeTrain, subcommand("train", description="Train models of a knowledge graph and rank its test triples.")
    ],
    Annotated[KgeEval, subcommand("eval", description="Rank triples by a trained model.")],
    Annotated[
        KgePredict, subcommand("predict", description="Tell the best answers to (head, relation, ?) or its tail.")
    ],
    Annotated[KgeRules, subcommand("rules", description="List the rules that the relations of a trained model keep.")],
    Annotated[KgeExport, subcommand("export", description="Write a trained model for other programs.")],
]
"""All commands on knowledge graphs."""


def run(given: Any, command: str) -> tuple[Outcome | None, Finished | None]:
    """Run a command; training reports in the folder of its run, others where they are told to."""
    if isinstance(given, KgeTrain):
        return None, _train(given, command)
    begin = time.perf_counter()
    outcome = _WORK[type(given)](given)
    if isinstance(given, KgeExport) or given.out is None:
        return outcome, None
    folder = Path(given.out)
    write_report(outcome, folder, given, command=command, seconds=time.perf_counter() - begin)
    return outcome, Finished(folder, read_metrics(folder))


def _train(given: KgeTrain, command: str) -> Finished:
    chosen = () if given.graph is None else (_setting(given.graph),)
    overrides = (*chosen, *given.overrides)
    return runs.run(given.config, given.out, overrides, force=given.force, visible=given.progress, command=command)


def _setting(name: str) -> str:
    """The override of a configuration that names a graph; its options begin with the folder of this command."""
    if name in GRAPHS:
        return f"graphs=[{{name = {json.dumps(name)}}}]"
    path = json.dumps(str(Path(name).resolve()))
    return f'graphs=[{{name = "folder", options = {{path = {path}}}}}]'


def _eval(given: KgeEval) -> Outcome:
    model = _open(given.model)
    asked = model.graph if given.graph is None else renamed(_load(given.graph, given.root), model.graph)
    return evaluated_outcome(model, asked, rank_model(model.family, model.params, asked, given.split), given.split)


def _open(path: str) -> KgeModel:
    """The model in its folder or file, or in the folder of the run that trained it."""
    inside = Path(path) / "model"
    return load_kge(inside if inside.is_dir() else path)


def _load(name: str, root: str | None) -> Graph:
    return knowledge_graph(name, root) if name in GRAPHS and name != "folder" else load_graph(name)


def _predict(given: KgePredict) -> Outcome:
    model = _open(given.model)
    answers = predict(model, given.relation, head=given.head, tail=given.tail, top=given.top)
    question = f"({given.head or '?'}, {given.relation}, {given.tail or '?'})"
    return predicted_outcome(model, question, answers)


def _export(given: KgeExport) -> Outcome:
    model = _open(given.model)
    export(model, given.out)
    return exported_outcome(model, given.out)


def _rules(given: KgeRules) -> Outcome:
    model = _open(given.model)
    if unknown := [kind for kind in given.kinds if kind not in KINDS]:
        message = f"There is no kind of rule {unknown[0]!r}{nearest(unknown[0], KINDS)}; known are {', '.join(KINDS)}."
        raise ValueError(message)
    few = len(model.graph.relations) <= _FEW
    kinds = given.kinds or (KINDS if few else tuple(kind for kind in KINDS if kind not in _SLOW))
    found = measure_rules(model.family, model.params, model.graph, kinds=kinds)
    return ruled_outcome(model, found, kinds, given.top)


_WORK: dict[type, Callable[[Any], Outcome]] = {
    KgeEval: _eval,
    KgePredict: _predict,
    KgeRules: _rules,
    KgeExport: _export,
}
