"""Trained models of knowledge graphs in a file: tables, labels, settings, and the triples that are known."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import jax
import numpy as np

from permjax.config import ConfigError, from_dict
from permjax.io.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from permjax.io.lazy import StrPath
from permjax.kge.base import Family, Params
from permjax.kge.models import FAMILIES
from permjax.kge.triples import SPLITS, Graph, Rule
from permjax.tree import check_finite, nearest

_HEADER = "permjax_kge"
"""The one entry of the header, so that the same model gives the same bytes."""
_LABELS = ("entities", "relations")


class KgeModelError(ValueError):
    """A file that holds no model of a knowledge graph, or a family that does not exist; says what to do."""


@dataclass(frozen=True)
class KgeModel:
    """A trained model, and the graph that it is of.

    Attributes:
        family: what the rows of the tables stand for.
        params: the tables, with a row for every entity, and two for every relation: of the relation and of its inverse.
        graph: labels, and the triples by which known answers are told from new ones.
        gamma: the constant of the scores.
        about: JSON values on how it was trained.
    """

    family: Family
    params: Params
    graph: Graph
    gamma: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict)


def family_named(name: str, settings: Mapping[str, Any]) -> Family:
    """A family by its name, with some of its hyper-parameters.

    Raises:
        KgeModelError: there is no such family, or it has no such hyper-parameter; names the nearest.

    Example:
        >>> family_named("nfe_2", {"dimension": 64, "mode": "exact"})
        Nfe2(dimension=64, mode='exact', base='normal')
    """
    if name not in FAMILIES:
        raise KgeModelError(f"There is no family {name!r}{nearest(name, FAMILIES)}; known are {', '.join(FAMILIES)}.")
    known = [one.name for one in fields(FAMILIES[name])]
    if unknown := [key for key in settings if key not in known]:
        message = f"The family {name!r} has no setting {unknown[0]!r}{nearest(unknown[0], known)}; known are "
        raise KgeModelError(f"{message}{', '.join(known)}.")
    try:
        return from_dict(FAMILIES[name], settings, where=f"The family {name!r}")
    except ConfigError as error:
        raise KgeModelError(str(error)) from None


def family_name(family: Family) -> str:
    """The name of a family; of two names for one class the one that is no special case of another."""
    return [name for name, cls in FAMILIES.items() if cls is type(family)][-1]


def save_kge(path: StrPath, model: KgeModel) -> None:
    """Write a model as safetensors, atomically; the same model gives the same bytes.

    Args:
        path: a folder, for its `model.safetensors`, or such a file.
        model: what to write.

    Raises:
        ValueError: a table has a number that is not finite.
        CheckpointError: the path is no place for a model, or the disk refuses; what was there is intact.
    """
    check_finite(model.params, "the model to be saved")
    graph = model.graph
    tensors = {
        **{
            f"{table}/{part}": np.asarray(values)
            for table, parts in jax.device_get(model.params).items()
            for part, values in parts.items()
        },
        **graph.splits,
        **{labels: _encoded(getattr(graph, labels)) for labels in _LABELS},
    }
    about = {
        "family": {"name": family_name(model.family), **asdict(model.family)},
        "graph": {"name": graph.name, "rules": graph.rules, "notes": graph.notes},
        "gamma": float(model.gamma),
        "about": dict(model.about),
    }
    save_checkpoint(path, tensors, metadata={_HEADER: json.dumps(about, sort_keys=True)})


def load_kge(path: StrPath) -> KgeModel:
    """Read a model that `save_kge` wrote.

    Args:
        path: the folder or the file.

    Raises:
        KgeModelError: it holds something else, or its tables do not fit its labels; names the file and the table.
        CheckpointError: there is none, or it cannot be read.
    """
    file = open_checkpoint(path)
    about = _about(file)
    settings = dict(about["family"])
    family = family_named(settings.pop("name"), settings)
    labels = {name: _decoded(file, name) for name in _LABELS}
    counts = {"entity": len(labels["entities"]), "relation": 2 * len(labels["relations"])}
    shapes = {"entity": family.entity_shapes(), "relation": family.relation_shapes()}
    params = {
        table: {part: _table(file, f"{table}/{part}", (counts[table], *shape)) for part, shape in parts.items()}
        for table, parts in shapes.items()
    }
    check_finite(params, str(file.path))
    return KgeModel(family, params, _graph(file, labels, about["graph"]), about["gamma"], about["about"])


def renamed(graph: Graph, like: Graph) -> Graph:
    """The triples of a graph in the ids of another one, which has its names.

    Raises:
        GraphError: a name is not one of `like` (says the nearest).
    """
    entities = np.array([like.entity(name) for name in graph.entities], np.int32)
    relations = np.array([like.relation(name) for name in graph.relations], np.int32)
    splits = {
        split: np.stack([entities[head], relations[relation], entities[tail]], axis=1)
        for split, (head, relation, tail) in ((split, triples.T) for split, triples in graph.splits.items())
    }
    return replace(like, name=graph.name, **splits, rules=(), notes=graph.notes)


def _about(file: Checkpoint) -> dict[str, Any]:
    try:
        return json.loads(file.metadata[_HEADER])
    except (KeyError, ValueError):
        message = f"{file.path} is no model of a knowledge graph: its header does not say of which family; give "
        raise KgeModelError(message + "the folder `model` of a run of `permjax kge train`.") from None


def _tensor(file: Checkpoint, name: str) -> np.ndarray:
    if name not in file:
        raise KgeModelError(f"{file.path} lacks the tensor {name!r}, which a model of a knowledge graph has.")
    return file[name].read()


def _table(file: Checkpoint, name: str, shape: tuple[int, ...]) -> Any:
    values = _tensor(file, name)
    if values.shape != shape:
        message = f"The table {name!r} in {file.path} has shape {values.shape}, but {shape} fits the labels and the "
        raise KgeModelError(message + "family; write the model again.")
    return jax.numpy.asarray(values)


def _graph(file: Checkpoint, labels: Mapping[str, tuple[str, ...]], about: Mapping[str, Any]) -> Graph:
    triples = {split: _tensor(file, split) for split in SPLITS}
    rules = tuple(Rule(kind, tuple(relations)) for kind, relations in about["rules"])
    names = labels["entities"], labels["relations"]
    return Graph(about["name"], *names, **triples, rules=rules, notes=tuple(about["notes"]))


def _encoded(labels: Sequence[str]) -> np.ndarray:
    """Labels as bytes of JSON, which a header would be too small for."""
    return np.frombuffer(json.dumps(list(labels), ensure_ascii=False).encode(), np.uint8)


def _decoded(file: Checkpoint, name: str) -> tuple[str, ...]:
    try:
        return tuple(json.loads(_tensor(file, name).tobytes()))
    except (ValueError, TypeError) as error:
        raise KgeModelError(f"The labels {name!r} in {file.path} cannot be read: {error}") from None
