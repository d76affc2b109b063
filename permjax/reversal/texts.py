"""Re-ordered copies of the texts in lines of JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from permjax.reversal.host import draw_order, generator, unit_order
from permjax.reversal.reorder import ORDERS, THIRDS, order_edges
from permjax.reversal.segment import check_units
from permjax.reversal.segmenters import segmenter

_FINAL = re.compile(r"[.!?…。！？]+[\"'”’»)\]]*\s*$")


@dataclass(frozen=True)
class PermuteOptions:
    """What to make of each line.

    Attributes:
        copies: re-orderings of each text, besides the text itself.
        probs: of the original, the reversed and a random order.
        segmenter: what cuts texts, by its name in `SEGMENTERS`.
        text: the field of the text.
        example: the field of a name or number for each text, on which its orders depend; the line by default.
        tags: three strings for the orders, of which the right one is put before each text.
        keep_end: whether punctuation at the end of a text stays there.
        keep_original: whether the text itself comes before its copies.
        seed: of all orders.
    """

    copies: int = 1
    probs: tuple[float, float, float] = THIRDS
    segmenter: str = "rules"
    text: str = "text"
    example: str | None = None
    tags: tuple[str, str, str] | None = None
    keep_end: bool = False
    keep_original: bool = True
    seed: int = 0


def check_options(options: PermuteOptions) -> None:
    """Refuse what cannot be done, before any text is read.

    Raises:
        ValueError: probabilities that are none, no such segmenter, or no copy at all.
    """
    order_edges(options.probs)
    segmenter(options.segmenter)
    if options.copies < 0 or (options.copies == 0 and not options.keep_original):
        raise ValueError(f"{options.copies} copies of each text are not possible; give 1 or more.")


def permute_text(text: str, options: PermuteOptions, example: int, copy: int) -> tuple[str, str]:
    """A text in an order of its own, and the name of that order.

    Where words are parted by spaces, the first unit is given one, and the text loses that at its new beginning.
    """
    return _permuted(_cut(text, options), options, example, copy)


def _cut(text: str, options: PermuteOptions) -> tuple[tuple[str, ...], str]:
    """The units of a text, and what stays at its end."""
    found = _FINAL.search(text) if options.keep_end else None
    body, end = (text, "") if found is None else (text[: found.start()], text[found.start() :])
    return check_units(body, segmenter(options.segmenter)(body)), end


def _permuted(cut: tuple[tuple[str, ...], str], options: PermuteOptions, example: int, copy: int) -> tuple[str, str]:
    units, end = cut
    rng = generator(options.seed, copy, example)
    order = draw_order(rng, options.probs)
    spaced = bool(units) and not units[0][0].isspace() and any(unit[0].isspace() for unit in units[1:])
    even = (f" {units[0]}", *units[1:]) if spaced else units
    moved = "".join(even[u] for u in unit_order(rng, len(units), order))
    return (moved[1:] if spaced and moved[0] == " " else moved) + end, ORDERS[order]


def _example(record: Mapping[str, Any], options: PermuteOptions, line: int) -> int:
    """The number of an example: of its name, or of its line."""
    if options.example is None:
        return line
    if options.example not in record:
        message = f"Line {line + 1} has no field {options.example!r}, which is to name its example; "
        raise ValueError(message + "give each line one, or leave it out to use the number of the line.")
    name = json.dumps(record[options.example], sort_keys=True).encode()
    return int.from_bytes(blake2b(name, digest_size=8).digest())


def _made(record: Mapping[str, Any], options: PermuteOptions, line: int) -> tuple[list[dict[str, Any]], int]:
    """What is written for one text, and the number of its units."""
    text, example = record[options.text], _example(record, options, line)
    cut = _cut(text, options)
    found = [(text, ORDERS[0])] if options.keep_original else []
    found += [_permuted(cut, options, example, copy) for copy in range(options.copies)]
    tags: dict[str, str] = dict(zip(ORDERS, options.tags or ("", "", ""), strict=True))
    return [{**record, options.text: tags[order] + moved, "order": order} for moved, order in found], len(cut[0])


class Lines(NamedTuple):
    """What is written for some lines, and what it holds."""

    content: bytes
    texts: int
    lines: int
    units: int
    orders: dict[str, int]
    read: int


def permute_lines(first: int, lines: Sequence[bytes], options: PermuteOptions) -> Lines:
    """Each text and its re-ordered copies, in lines of JSON; empty lines vanish.

    Args:
        first: the number of the first line in its file.
        lines: one JSON object each; all its fields are kept, and `order` is added.
        options: what to make of each.

    Raises:
        ValueError: a line is no object with a text, or names no example.
    """
    out: list[dict[str, Any]] = []
    units = texts = 0
    for line, content in enumerate(lines, first):
        if content.strip():
            made, count = _made(_record(content, options, line), options, line)
            out += made
            units, texts = units + count, texts + 1
    written = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in out).encode(errors="surrogatepass")
    orders = [record["order"] for record in out]
    counts = {name: orders.count(name) for name in ORDERS}
    return Lines(written, texts, len(out), units, counts, sum(map(len, lines)))


def _record(content: bytes, options: PermuteOptions, line: int) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except ValueError as error:
        raise ValueError(f"Line {line + 1} is no JSON ({error}); there must be one object in each line.") from None
    if not isinstance(record, dict) or not isinstance(record.get(options.text), str):
        message = f"Line {line + 1} has no text in a field {options.text!r}; name the right one with `--text`."
        raise ValueError(message)
    return record
