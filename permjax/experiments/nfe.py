"""Knowledge graphs as permutations of random variables: train families on graphs, and rank what they did not see."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from permjax import tree
from permjax.config import to_dict
from permjax.experiments.nfe_config import NfeConfig, Setting
from permjax.experiments.nfe_report import report
from permjax.experiments.nfe_rows import Trial, Trials
from permjax.experiments.registry import Experiment
from permjax.kge.base import Params
from permjax.kge.graph import Graph
from permjax.kge.model_files import KgeModel, save_kge
from permjax.kge.queries import Queries, queries
from permjax.kge.rank import Ranks, model_scorer, rank_queries
from permjax.kge.train import KgeResult, train_kge
from permjax.report import Outcome

_LEAST = 10_000
"""Triples of a control, so that it is at chance by more than luck."""


def run(config: NfeConfig, out: Path, progress: Any) -> Outcome:
    """Run the experiment.

    Args:
        config: what to do.
        out: folder of the run; it gets the folder `model` with the first model, and training keeps its state in
            `out/state`, so that an interrupted run goes on.
        progress: told about training and ranking.

    Returns:
        Metrics, tables and figures.
    """
    graphs = {one.key: config.load(one.key) for one in config.graphs}
    seeds = [config.seed + number for number in range(config.seeds)]
    trials: dict[tuple[str, str], Trial] = {}
    first: KgeModel | None = None
    for setting in config.settings():
        graph = graphs[setting.graph]
        result = _trained(setting, graph, seeds, out, progress)
        models: Sequence[Params] = tree.unstack(result.params)
        rng = np.random.default_rng((config.seed, 1))
        control = _control(graph, rng) if setting.model == config.models[0].name else None
        trials[setting.graph, setting.model] = _ranked(setting, graph, result, models, control, progress)
        if first is None:
            first = _best(setting, graph, seeds, result, models)
            save_kge(out / "model", first)
    assert first is not None  # a configuration has one graph and one model at least
    return report(config, graphs, Trials(seeds, trials), first)


def permuted(graph: Graph, rng: np.random.Generator, least: int = _LEAST) -> Graph:
    """The graph with other names on the entities of its test triples: no model can know them better than chance.

    Those that happen to be facts of train or valid are left out.

    Args:
        graph: a graph.
        rng: draws the permutations.
        least: number of triples to permute; one permutation follows another until there are as many.
    """
    head, relation, tail = graph.test.T
    names = [rng.permutation(graph.size).astype(np.int32) for _ in range(-(-least // len(graph.test)))]
    triples = np.unique(np.concatenate([np.stack([n[head], relation, n[tail]], axis=1) for n in names]), axis=0)
    sizes = np.array([len(graph.relations) * graph.size, graph.size, 1], np.int64)
    facts = np.concatenate([graph.train, graph.valid])
    return replace(graph, test=triples[~np.isin(triples @ sizes, facts @ sizes)])


def _control(graph: Graph, rng: np.random.Generator) -> Queries:
    """Questions about permuted test triples; they are no facts, so they are not left out of each other's ranks."""
    return queries(permuted(graph, rng), filtered=("train", "valid"))


def _trained(setting: Setting, graph: Graph, seeds: Sequence[int], out: Path, progress: Any) -> KgeResult:
    family, training = setting.family, setting.training
    progress.start(f"{setting.model} on {graph.name}", training.epochs)

    def tell(_: int, values: dict[str, np.ndarray]) -> None:
        shown = {name: f"{np.nanmean(value):.4g}" for name, value in values.items() if np.isfinite(value).any()}
        progress.step(1, **shown)

    folder = out / "state" / f"{setting.graph}-{setting.model}"
    result = train_kge(family, graph, training, seeds, checkpoint_dir=folder, progress=tell)
    progress.done()
    return result


def _ranked(
    setting: Setting,
    graph: Graph,
    result: KgeResult,
    models: Sequence[Params],
    control: Queries | None,
    progress: Any,
) -> Trial:
    progress.start(f"ranking by {setting.model} on {graph.name}", len(models))
    asked, found, controls = queries(graph), [], []
    for params in models:
        found.append(_rank(setting, graph, params, asked))
        if control is not None:
            controls.append(_rank(setting, graph, params, control))
        progress.step(1)
    begin = time.perf_counter()  # all is compiled by now
    _rank(setting, graph, models[0], asked)
    rate = len(asked.triples) / (time.perf_counter() - begin)
    progress.done()
    return Trial(tuple(found), tuple(controls), result, rate)


def _rank(setting: Setting, graph: Graph, params: Params, asked: Queries) -> Ranks:
    return rank_queries(model_scorer(setting.family, params, graph), asked)


def _best(
    setting: Setting, graph: Graph, seeds: Sequence[int], result: KgeResult, models: Sequence[Params]
) -> KgeModel:
    """The model of the seed that is best on the validation triples."""
    number = int(np.argmax(np.nan_to_num(result.valid_mrr, nan=-1.0)))
    valid_mrr = float(result.valid_mrr[number])
    about = {
        "model": setting.model,
        "seed": seeds[number],
        "valid_mrr": valid_mrr if np.isfinite(valid_mrr) else None,
        "training": to_dict(setting.training),
    }
    return KgeModel(setting.family, models[number], graph, setting.training.gamma, about)


EXPERIMENT = Experiment(NfeConfig, run)
