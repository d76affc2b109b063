"""Average embeddings of one graph that were trained from different seeds: as they are, and after alignment."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from permjax import tree
from permjax.experiments.data_root import DataRoot
from permjax.experiments.nfe_alignment_report import Pair, report
from permjax.experiments.nfe_config import GraphConfig, ModelConfig, NfeConfig, Setting
from permjax.experiments.registry import Experiment
from permjax.kge.alignment import Motion, align_coordinates, canonical, move
from permjax.kge.base import Family, Params
from permjax.kge.queries import Queries, queries
from permjax.kge.rank import model_scorer, rank_metrics, rank_queries
from permjax.kge.train import KgeTraining, train_kge
from permjax.kge.triples import Graph
from permjax.report import Outcome

POINTS = np.linspace(0.0, 1.0, 11)
"""Where the line between two models is measured."""


@dataclass(frozen=True)
class NfeAlignmentConfig:
    """An experiment on aligning two trained tables.

    Attributes:
        graph: what the models learn.
        model: their family.
        dimension: of models that do not give their own.
        training: how they are trained.
        data: where real data is.
        trials: number of pairs of models.
        seed: the models of the pairs have the seeds `seed`, `seed + 1`, ...
    """

    experiment: ClassVar[str] = "nfe_alignment"
    graph: GraphConfig = GraphConfig()
    model: ModelConfig = ModelConfig()
    dimension: int = 128
    training: KgeTraining = KgeTraining()
    data: DataRoot = DataRoot()
    trials: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, not {self.trials}.")
        self.training_run()

    def training_run(self) -> NfeConfig:
        """The training of all models, as the experiment `nfe` would do it."""
        count = 2 * self.trials
        parts = (self.graph,), (self.model,), self.dimension, self.training
        return NfeConfig(*parts, data=self.data, seeds=count, seed=self.seed)


def run(config: NfeAlignmentConfig, out: Path, progress: Any) -> Outcome:
    """Run the experiment.

    Args:
        config: what to do.
        out: folder of the run; training keeps its state in `out/state`, so that an interrupted run goes on.
        progress: told about training and pairs.

    Returns:
        Metrics, tables and figures.
    """
    plan = config.training_run()
    setting = next(plan.settings())
    graph = plan.load(setting.graph)
    models = _trained(setting, graph, range(config.seed, config.seed + 2 * config.trials), out, progress)
    asked = queries(graph)
    progress.start("aligning", config.trials)
    pairs = []
    for number in range(config.trials):
        some = models[2 * number : 2 * number + 2]
        pairs.append(_pair(setting.family, graph, asked, some, np.random.default_rng((config.seed, number))))
        progress.step(1)
    progress.done()
    return report(config, graph, setting, pairs, POINTS)


def _trained(setting: Setting, graph: Graph, seeds: Sequence[int], out: Path, progress: Any) -> Sequence[Params]:
    progress.start(f"{len(seeds)} models on {graph.name}", setting.training.epochs)
    tell = lambda _, values: progress.step(1, loss=f"{np.nanmean(values['loss']):.4g}")  # noqa: E731
    state = out / "state"
    result = train_kge(setting.family, graph, setting.training, (*seeds,), checkpoint_dir=state, progress=tell)
    progress.done()
    return tree.unstack(result.params)


def _pair(family: Family, graph: Graph, asked: Queries, models: Sequence[Params], rng: np.random.Generator) -> Pair:
    mrr = partial(_mrr, family, graph, asked)
    first, second = models
    aligned = align_coordinates(family, first, second)
    others = {
        "unaligned": second,
        "unsigned": align_coordinates(family, first, second, signed=False).params,
        "random": move(family, second, _random(family, rng)),
        "aligned": aligned.params,
    }
    lines = {name: [mrr(_between(family, first, other, t)) for t in POINTS] for name, other in others.items()}
    planted = _random(family, rng)
    found = align_coordinates(family, first, move(family, first, planted))
    back = np.asarray(planted.permutation)[found.motion.permutation] == np.arange(family.dimension)
    rows = (canonical(family, one) for one in (first, found.params))
    error = max(float(abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, rows), strict=True))
    return Pair({name: np.array(line) for name, line in lines.items()}, aligned.correlation, back.mean(), error)


def _mrr(family: Family, graph: Graph, asked: Queries, params: Params) -> float:
    return rank_metrics(rank_queries(model_scorer(family, params, graph), asked))["mrr"]


def _between(family: Family, first: Params, second: Params, t: float) -> Params:
    return tree.lerp(canonical(family, first), canonical(family, second), t)


def _random(family: Family, rng: np.random.Generator) -> Motion:
    """A random order of coordinates with random signs, which no shift follows."""
    d = family.dimension
    signs = np.ones(d) if type(family).__name__ == "Nfe1Sigma" else rng.choice([-1.0, 1.0], d)
    return Motion(rng.permutation(d), signs, np.zeros(d))


EXPERIMENT = Experiment(NfeAlignmentConfig, run)
