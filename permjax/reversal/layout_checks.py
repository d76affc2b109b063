"""What a batch must be before its units may move; on the host, in NumPy."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped


def check_batch(batch: Mapping[str, Any], max_units: int, tag_ids: Sequence[int] | None = None) -> None:
    """Refuse a batch that cannot be permuted, or should not be.

    Args:
        batch: see `permjax.reversal.layout`.
        max_units: the most units in a row.
        tag_ids: three tokens that name the orders, where documents are tagged.

    Raises:
        ValueError: an array is missing or of another shape; a document or a unit is in pieces; a row has more units
            than `max_units`; or a document whose loss mask is that of an answer alone has its prompt and its answer in
            one stretch, so that the answer could come before its end.
    """
    missing = [name for name in ("tokens", "doc_ids", "unit_ids", "example_ids") if name not in batch]
    if missing:
        raise ValueError(
            f"The batch has no {missing[0]!r}; it needs 'tokens', 'doc_ids', 'unit_ids' and 'example_ids'."
        )
    shape = np.shape(batch["tokens"])
    for name in ("doc_ids", "unit_ids", "pinned", "loss_mask"):
        if name in batch and np.shape(batch[name]) != shape:
            raise ValueError(f"{name!r} has shape {np.shape(batch[name])}, but the tokens have {shape}.")
    if tag_ids is not None and (len(tag_ids) != 3 or len(set(tag_ids)) != 3):
        raise ValueError(f"The tags are {tuple(tag_ids)}; give three different tokens: original, reversed, random.")
    rows = {name: np.asarray(batch[name]).reshape(-1, shape[-1]) for name in batch if np.shape(batch[name]) == shape}
    _check_documents(rows["doc_ids"], np.asarray(batch["example_ids"]), shape)
    block = _blocks(rows, tag_ids)
    _check_units(rows["unit_ids"], block)
    _check_count(_begins(block) | (_begins(rows["unit_ids"]) & (block >= 0)), block, max_units)
    if "loss_mask" in rows:
        _check_answers(rows["loss_mask"].astype(bool), rows["doc_ids"], block)


def _check_documents(doc_ids: Int[np.ndarray, "rows t"], example_ids: np.ndarray, shape: tuple[int, ...]) -> None:
    if example_ids.shape != shape and example_ids.shape[:-1] != shape[:-1]:
        message = f"'example_ids' has shape {example_ids.shape} beside tokens {shape}; "
        raise ValueError(message + "give one number for each document of each row, or for each token.")
    starts = _begins(doc_ids) & (doc_ids >= 0)
    wrong = starts & (doc_ids != np.cumsum(starts, axis=-1) - 1)
    if wrong.any():
        message = (
            f"The documents of row {np.flatnonzero(wrong.any(axis=-1))[0]} are not numbered 0, 1, 2 ... one after "
        )
        raise ValueError(message + "the other; the tokens of a document must stand together.")
    most = int(doc_ids.max(initial=-1)) + 1
    if most > example_ids.shape[-1]:
        message = f"A row has {most} documents, but 'example_ids' names {example_ids.shape[-1]}; "
        raise ValueError(message + "name the example of every document.")


def _blocks(rows: Mapping[str, np.ndarray], tag_ids: Sequence[int] | None) -> Int[np.ndarray, "rows t"]:
    """The number of the stretch of one document between pinned tokens; -1 for pinned tokens and padding."""
    doc_ids = rows["doc_ids"]
    pinned = rows["pinned"] if "pinned" in rows else np.zeros(doc_ids.shape, bool)
    if tag_ids is not None:
        pinned = pinned | np.isin(rows["tokens"], tag_ids)
    free = (doc_ids >= 0) & ~pinned
    return np.where(free, np.cumsum(free & (_begins(free) | _begins(doc_ids)), axis=-1), -1)


def _check_units(unit_ids: Int[np.ndarray, "rows t"], block: Int[np.ndarray, "rows t"]) -> None:
    if (unit_ids[block >= 0] < 0).any():
        raise ValueError("Some tokens are in no unit; the units must tile each document, but for pinned tokens.")
    paired = np.where(block >= 0, block * (np.int64(unit_ids.max(initial=0)) + 1) + unit_ids, -1)
    row = _in_pieces(paired, _begins(paired) & (paired >= 0))
    if row is not None:
        raise ValueError(f"A unit of row {row} is in pieces; the tokens of a unit must stand together.")


def _check_count(begins: Bool[np.ndarray, "rows t"], block: Int[np.ndarray, "rows t"], max_units: int) -> None:
    counts = (begins & (block >= 0)).sum(axis=-1)
    over = int((counts > max_units).sum())
    if over:
        message = f"{over} of {len(counts)} rows have more than {max_units} units, up to {counts.max()}; "
        raise ValueError(message + "raise 'max_units', merge units, or pack fewer documents into a row.")


def _check_answers(mask: Bool[np.ndarray, "rows t"], doc_ids: np.ndarray, block: Int[np.ndarray, "rows t"]) -> None:
    """A stretch that begins without loss and ends with it, and changes only once, is a prompt and its answer."""
    changed = _begins(mask) & ~_begins(block) & (block >= 0)
    for row in np.flatnonzero(changed.any(axis=-1)):
        for number in np.unique(block[row, changed[row]]):
            own = np.flatnonzero(block[row] == number)
            if changed[row, own].sum() == 1 and not mask[row, own[0]]:
                message = (
                    f"Document {doc_ids[row, own[0]]} of row {row} has no loss on its first tokens and loss on the"
                )
                message += (
                    " others: an answer after its prompt. Units would cross the border and give the answer away; "
                )
                raise ValueError(message + "take the loss on all tokens, or pin the prompt.")


def _begins(values: Shaped[np.ndarray, "rows t"]) -> Bool[np.ndarray, "rows t"]:
    """Where a value is not the one before it."""
    return np.concatenate([np.ones((len(values), 1), bool), values[:, 1:] != values[:, :-1]], axis=1)


def _in_pieces(values: np.ndarray, starts: Bool[np.ndarray, "rows t"]) -> int | None:
    """The first row in which some value begins twice."""
    for row in range(len(values)):
        found = values[row, starts[row]]
        if len(np.unique(found)) != len(found):
            return row
    return None
