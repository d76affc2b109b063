"""Documents of many lengths in rows of one: first fit, on the host."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def first_fit(lengths: Iterable[int], capacity: int) -> list[list[int]]:
    """The documents of each row: each goes into the first row that has room, in the order given.

    Args:
        lengths: tokens of each document.
        capacity: tokens of a row.

    Raises:
        ValueError: a document is longer than a row, or empty.

    Example:
        >>> first_fit([5, 4, 3, 2], 8)
        [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for document, length in enumerate(lengths):
        if not 0 < length <= capacity:
            message = f"Document {document} has {length} tokens, but a row has room for 1 to {capacity}; "
            raise ValueError(message + "cut it (after it was segmented), or make the rows longer.")
        row = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(document)
        room[row] -= length
    return rows


def pack(
    documents: Sequence[Mapping[str, Any]],
    length: int,
    *,
    pad_id: int = 0,
    rows: int | None = None,
    packed: bool = True,
) -> dict[str, np.ndarray]:
    """A batch as `permjax.reversal.layout` has it.

    Args:
        documents: each with `tokens` [n], where wanted `unit_ids` [n] and other arrays by token under the same names
            in all of them, and its number as `example_id`; the number in the list by default.
        length: tokens of a row.
        pad_id: the token of padding; other arrays are padded with 0, unit and document ids with -1.
        rows: how many rows there shall be; the last ones may be empty. As many as are needed by default.
        packed: whether several documents may share a row.

    Returns:
        `tokens`, `doc_ids`, `unit_ids` [rows, length], `example_ids` [rows, most documents], and the other arrays.

    Raises:
        ValueError: a document does not fit a row, or the documents do not fit the rows; or an array of a document has
            not one entry for each token.
    """
    sizes = [len(document["tokens"]) for document in documents]
    places = first_fit(sizes, length)
    if not packed:
        places = [[document] for document in range(len(documents))]
    if rows is not None and len(places) > rows:
        raise ValueError(f"The documents need {len(places)} rows of {length} tokens, but there are {rows}; give more.")
    shape = (len(places) if rows is None else rows, length)
    batch = {name: _laid(documents, places, name, shape, pad_id) for name in _names(documents, sizes)}
    batch["doc_ids"] = np.full(shape, -1, np.int32)
    batch["example_ids"] = np.zeros((shape[0], max(map(len, places), default=1)), np.int32)
    for row, members in enumerate(places):
        ids = np.repeat(np.arange(len(members)), [sizes[document] for document in members])
        batch["doc_ids"][row, : len(ids)] = ids
        examples = [documents[document].get("example_id", document) for document in members]
        batch["example_ids"][row, : len(members)] = examples
    return batch


def _names(documents: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> list[str]:
    """The arrays by token, which every document must have."""
    names = [name for name in (documents[0] if documents else {}) if name != "example_id"]
    for number, (document, size) in enumerate(zip(documents, sizes, strict=True)):
        for name in names:
            if name not in document or len(document[name]) != size:
                found = len(document[name]) if name in document else 0
                raise ValueError(f"Document {number} has {size} tokens, but {found} of {name!r}; give one by token.")
    return names


def _laid(
    documents: Sequence[Mapping[str, Any]], places: list[list[int]], name: str, shape: tuple[int, int], pad_id: int
) -> np.ndarray:
    """One array of all documents in their rows; unit ids go on from document to document."""
    parts = [np.asarray(document[name]) for document in documents]
    integer = name in ("tokens", "unit_ids")
    fill = {"tokens": pad_id, "unit_ids": -1}.get(name, 0)
    laid = np.full((*shape, *parts[0].shape[1:]), fill, np.int32 if integer else parts[0].dtype)
    for row, members in enumerate(places):
        rows = [parts[document] for document in members]
        values = np.concatenate(_counted_on(rows) if name == "unit_ids" else rows)
        laid[row, : len(values)] = values
    return laid


def _counted_on(parts: list[np.ndarray]) -> list[np.ndarray]:
    begin = np.cumsum([0, *(part.max() + 1 for part in parts)])
    return [np.where(part < 0, -1, part + first) for part, first in zip(parts, begin[:-1], strict=True)]
