"""What a run on knowledge graphs trains: families with their settings, on graphs with theirs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from permjax.config import from_dict, to_dict
from permjax.experiments.data_root import DataRoot
from permjax.kge.base import Family
from permjax.kge.graph import GRAPHS, Graph, knowledge_graph
from permjax.kge.model_files import family_named
from permjax.kge.train import KgeTraining
from permjax.tree import nearest


@dataclass(frozen=True)
class GraphConfig:
    """A graph.

    Attributes:
        name: one of `permjax.kge.graph.GRAPHS`.
        options: of its reader, such as `path` of a `folder`.
        training: settings of the training that are others on this graph.
    """

    name: str = "family"
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What it is called in the names of metrics."""
        return Path(str(self.options.get("path", self.name))).stem.replace("-", "_").replace(" ", "_").lower()


@dataclass(frozen=True)
class ModelConfig:
    """A model.

    Attributes:
        name: what to call it.
        family: one of `permjax.kge.models.FAMILIES`; the name by default.
        options: hyper-parameters of the family, such as `mode`.
        training: settings of the training that are others for this model, whatever the graph.
    """

    name: str = "nfe_1"
    family: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


class Setting(NamedTuple):
    """One model on one graph."""

    graph: str
    model: str
    family: Family
    training: KgeTraining


@dataclass(frozen=True)
class NfeConfig:
    """An experiment on embeddings of knowledge graphs.

    Attributes:
        graphs: one or more; the metrics without a prefix are those of the first one.
        models: one or more; the metrics without a prefix are those of the first one, which is saved.
        dimension: of models that do not give their own.
        training: how all are trained, up to what graphs and models change.
        compared: pairs of models whose difference in MRR is reported with its interval.
        data: where real data is.
        seeds: number of models of every kind; results are means over them.
        seed: they have the seeds `seed`, `seed + 1`, ...
    """

    experiment: ClassVar[str] = "nfe"
    graphs: tuple[GraphConfig, ...] = (GraphConfig(),)
    models: tuple[ModelConfig, ...] = (ModelConfig(),)
    dimension: int = 128
    training: KgeTraining = KgeTraining()
    compared: tuple[tuple[str, str], ...] = ()
    data: DataRoot = DataRoot()
    seeds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        keys, names = [one.key for one in self.graphs], [one.name for one in self.models]
        for what, given in (("graphs", keys), ("models", names)):
            if not given or len({*given}) < len(given):
                raise ValueError(f"{what} must be one or more of different names, not {given}.")
        for one in self.graphs:
            if one.name not in GRAPHS:
                known = ", ".join(GRAPHS)
                raise ValueError(f"there is no graph {one.name!r}{nearest(one.name, GRAPHS)}; known are {known}.")
        for name in (name for pair in self.compared for name in pair):
            if name not in names:
                raise ValueError(f"compared names {name!r}{nearest(name, names)}, which is none of the models {names}.")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, not {self.seeds}.")
        tuple(self.settings())

    def settings(self) -> Iterator[Setting]:
        """Every model on every graph, those of the first graph first."""
        for one in self.graphs:
            for model in self.models:
                yield Setting(one.key, model.name, self._family(model), self._training(one, model))

    def load(self, key: str) -> Graph:
        """One of the graphs.

        Raises:
            MissingData: its files are not there.
            GraphError: they hold no graph.
        """
        one = next(one for one in self.graphs if one.key == key)
        return knowledge_graph(one.name, self.data.root, **one.options)

    def _family(self, model: ModelConfig) -> Family:
        return family_named(model.family or model.name, {"dimension": self.dimension} | model.options)

    def _training(self, one: GraphConfig, model: ModelConfig) -> KgeTraining:
        settings: Mapping[str, Any] = to_dict(self.training) | one.training | model.training
        return from_dict(KgeTraining, settings, where=f"The training of {model.name!r} on {one.key!r}")
