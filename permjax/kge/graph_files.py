"""Knowledge graphs in files: folders of label triples, folders of ids, and one NumPy archive."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from permjax.data.images import read_npz, require
from permjax.files import atomic_path
from permjax.kge.triples import SPLITS, Graph, GraphError, Rule

_ARRAYS = ("name", "entities", "relations", *SPLITS, "rules", "notes")


def load_graph(path: str | Path, name: str | None = None) -> Graph:
    """A graph from a folder or an archive.

    A folder has either the label triples `train.txt`, `valid.txt` and `test.txt` (head, relation and tail, parted by
    tabs; ids are given in alphabetical order), or `entity2id.txt` and `relation2id.txt` (name, id) with
    `train2id.txt`, `valid2id.txt` and `test2id.txt` (ids of head, relation, tail). Where such a file starts with the
    number of its lines, as OpenKE writes it, its columns are head, tail, relation. An archive is one of `save_graph`.

    Repeated train triples are dropped; repeated valid and test triples and entities that train does not have are kept,
    as published numbers count them. `notes` says so.

    Args:
        path: the folder, or the `.npz` file.
        name: what to call the graph; the name of the folder or file by default.

    Raises:
        MissingData: a file is not there.
        GraphError: a line is malformed or an id out of range (with file and line), a split is empty, or a relation of
            valid or test is not in train.
    """
    path = require(Path(path), "a knowledge graph, as a folder of triples or an npz archive", "the option `path`")
    if path.is_file():
        return _from_archive(path, name)
    if (path / "train2id.txt").exists() or (path / "entity2id.txt").exists():
        return _from_ids(path, name or path.name)
    return _from_labels(path, name or path.name)


def save_graph(graph: Graph, path: str | Path) -> None:
    """Write a graph as one NumPy archive, which `load_graph` reads back as it was."""
    rules = ["\t".join((rule.kind, *rule.relations)) for rule in graph.rules]
    names = {"name": graph.name, "entities": graph.entities, "relations": graph.relations}
    texts = {**names, "rules": rules, "notes": graph.notes}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **{key: np.array(text, np.str_) for key, text in texts.items()}, **graph.splits)  # pyright: ignore


def _from_archive(path: Path, name: str | None) -> Graph:
    try:
        arrays = read_npz(path, _ARRAYS)
    except ValueError as error:
        raise GraphError(str(error)) from None
    rows = [tuple(str(text).split("\t")) for text in arrays["rules"]]
    return Graph(
        name or str(arrays["name"]),
        tuple(map(str, arrays["entities"])),
        tuple(map(str, arrays["relations"])),
        **{split: arrays[split] for split in SPLITS},
        rules=tuple(Rule(kind, tuple(relations)) for kind, *relations in rows),
        notes=tuple(map(str, arrays["notes"])),
    )


def _from_labels(folder: Path, name: str) -> Graph:
    files = [require(folder / f"{split}.txt", f"the {split} triples as lines of labels") for split in SPLITS]
    labels = [[_labels(*line) for line in _lines(file)] for file in files]
    everything = [triple for split in labels for triple in split]
    entities = sorted({label for head, _, tail in everything for label in (head, tail)})
    relations = sorted({relation for _, relation, _ in everything})
    ids, kinds = ({label: i for i, label in enumerate(names)} for names in (entities, relations))
    triples = [[(ids[head], kinds[relation], ids[tail]) for head, relation, tail in split] for split in labels]
    return _graph(name, entities, relations, triples)


def _from_ids(folder: Path, name: str) -> Graph:
    entities, relations = (_names(folder / f"{what}2id.txt") for what in ("entity", "relation"))
    limits = {"head": len(entities), "relation": len(relations), "tail": len(entities)}
    return _graph(name, entities, relations, [_ids(folder / f"{split}2id.txt", limits) for split in SPLITS])


def _graph(name: str, entities: list[str], relations: list[str], splits: list[list[tuple[int, ...]]]) -> Graph:
    train, valid, test = (np.array(triples, np.int32).reshape(-1, 3) for triples in splits)
    kept = np.sort(np.unique(train, axis=0, return_index=True)[1])
    dropped = len(train) - len(kept)
    notes = (f"{dropped} repeated train triples were dropped.",) if dropped else ()
    graph = Graph(name, tuple(entities), tuple(relations), train[kept], valid, test, notes=notes)
    return replace(graph, notes=notes + _found(graph))


def _found(graph: Graph) -> tuple[str, ...]:
    """What a user should know of a graph whose splits are used as they are."""
    notes = []
    for split in SPLITS[1:]:
        triples = graph.splits[split]
        if repeated := len(triples) - len(np.unique(triples, axis=0)):
            notes.append(f"{repeated} {split} triples are repetitions; they are kept and count each time.")
        if unseen := int(np.isin(triples[:, [0, 2]], graph.unseen).any(axis=1).sum()):
            notes.append(f"{unseen} {split} triples have entities that train does not have; they are kept.")
    if len(graph.unseen):
        example = graph.entities[graph.unseen[0]]
        notes.append(f"{len(graph.unseen)} of {graph.size} entities are not in train, such as {example!r}.")
    return tuple(notes)


# lines


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Where each line that is not blank stands, and what it says."""
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        message = f"{file} is no text in UTF-8 ({error.reason} at byte {error.start}); convert it first."
        raise GraphError(message) from None
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield f"{file}, line {number}", line.rstrip("\r")


def _labels(where: str, line: str) -> tuple[str, str, str]:
    labels = [label.strip() for label in line.split("\t")]
    if len(labels) != 3 or not all(labels):
        raise GraphError(f"{where}: {line!r} must be head, relation and tail, parted by tabs.")
    head, relation, tail = labels
    return head, relation, tail


def _counted(file: Path) -> tuple[bool, list[tuple[str, str]]]:
    """Whether a file starts with the number of its lines, and the other lines."""
    lines = list(_lines(require(file, "a part of a graph written with ids")))
    if not lines or not lines[0][1].strip().isdecimal():
        return False, lines
    where, count = lines[0]
    if int(count) != len(lines) - 1:
        raise GraphError(f"{where}: the file says that it has {count.strip()} lines, but {len(lines) - 1} follow.")
    return True, lines[1:]


def _names(file: Path) -> list[str]:
    """Names in the order of their ids, which must be 0, 1, 2, ... in any order."""
    _, lines = _counted(file)
    found: dict[int, str] = {}
    for where, line in lines:
        name, *number = line.rsplit(maxsplit=1)
        if len(number) != 1 or not number[0].isdecimal():
            raise GraphError(f"{where}: {line!r} must be a name and its id, parted by a tab.")
        if int(number[0]) in found or int(number[0]) >= len(lines):
            wanted = f"the {len(lines)} names there must have the ids 0..{len(lines) - 1}, each once"
            raise GraphError(f"{where}: the id {number[0]} is out of range or taken; {wanted}.")
        found[int(number[0])] = name.strip()
    return [found[i] for i in range(len(lines))]


def _ids(file: Path, limits: Mapping[str, int]) -> list[tuple[int, ...]]:
    counted, lines = _counted(file)
    columns = ("head", "tail", "relation") if counted else ("head", "relation", "tail")
    triples = []
    for where, line in lines:
        fields = line.split()
        if len(fields) != 3 or not all(field.isdecimal() for field in fields):
            raise GraphError(f"{where}: {line!r} must be three ids, those of {', '.join(columns)}.")
        triple: dict[str, int] = dict(zip(columns, map(int, fields), strict=True))
        for what, limit in limits.items():
            if triple[what] >= limit:
                raise GraphError(f"{where}: the {what} id {triple[what]} is out of range; ids are 0..{limit - 1}.")
        triples.append(tuple(triple[what] for what in limits))
    return triples
