"""Trained models for other programs: NumPy archives and tables of text."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from permjax.files import atomic_path
from permjax.kge.model_files import KgeModel
from permjax.kge.serve import index_keys, index_queries

SUFFIXES = (".npz", ".tsv")


def export(model: KgeModel, path: str | Path) -> None:
    """Write what entities and relations mean, and the vectors by which an index of inner products serves the model.

    A `.npz` archive has the names `entities` [E] and `relations` [2 R], the inverses after the relations; the arrays
    `entity_<part>` and `relation_<part>`, laws and maps as they act (absolute values and such are taken); `index_keys`
    [E, w]; and the distinct questions of the test split, `question_heads`, `question_relations`, with their vectors
    `index_queries` and constants `question_scores`: `index_queries @ index_keys.T + question_scores[:, None]` are the
    scores. A `.tsv` file has lines of text: what it is (`entity`, `relation` or `key`), its name, the part, numbers.

    Args:
        model: a trained model.
        path: what to write, by its ending.

    Raises:
        ValueError: the path has another ending.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} has no ending that is known; write {' or '.join(f'*{one}' for one in SUFFIXES)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if path.suffix == ".npz":
            with temporary.open("wb") as file:
                np.savez_compressed(file, **_archive(model))
        else:
            _write_lines(temporary, model)


def _archive(model: KgeModel) -> dict[str, Any]:
    asked = np.unique(model.graph.both_ways("test")[:, :2], axis=0)
    vectors, constants = index_queries(model, asked[:, 0], asked[:, 1])
    parts = {f"{table}_{part}": values for table, part, values in _parts(model)}
    names = {
        table: np.array(found, np.str_) for table, found in zip(("entities", "relations"), _names(model), strict=True)
    }
    questions = {"question_heads": asked[:, 0], "question_relations": asked[:, 1], "question_scores": constants}
    return {**names, **parts, "index_keys": index_keys(model), "index_queries": vectors, **questions}


def _write_lines(path: Path, model: KgeModel) -> None:
    names: dict[str, tuple[str, ...]] = dict(zip(("entity", "relation"), _names(model), strict=True))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        for table, part, values in _parts(model):
            for name, row in zip(names[table], values, strict=True):
                for label, numbers in _lines(part, row):
                    writer.writerow((table, name, label, *numbers))
        for name, row in zip(names["entity"], index_keys(model), strict=True):
            writer.writerow(("key", name, "vector", *_texts(row)))


def _lines(part: str, row: np.ndarray) -> Iterator[tuple[str, list[str]]]:
    """One line for each axis of coordinates that a part has."""
    for number, coordinates in enumerate(row.reshape(-1, row.shape[-1]), 1):
        yield part if row.ndim == 1 else f"{part}_{number}", _texts(coordinates)


def _texts(numbers: np.ndarray) -> list[str]:
    return [f"{number:.9g}" for number in numbers]


def _parts(model: KgeModel) -> Iterator[tuple[str, str, np.ndarray]]:
    family, params = model.family, model.params
    for table, found in (
        ("entity", family.entity(params["entity"])),
        ("relation", family.relation(params["relation"])),
    ):
        for part, values in found.items():
            yield table, part, np.asarray(values)


def _names(model: KgeModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of all entities, and of all rows of the table of relations."""
    graph = model.graph
    return graph.entities, tuple(graph.relation_name(row) for row in range(2 * len(graph.relations)))
