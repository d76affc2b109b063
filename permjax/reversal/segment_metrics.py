"""How good units are: against reference units, against names and phrases that should stay whole, and how fast."""

import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from permjax.reversal.segment import Segmenter, SegmentError, check_units

Units = Sequence[str]
Span = tuple[int, int]


class SegmentScores(NamedTuple):
    """Units against reference units, over all texts together; shares lie between 0 and 1."""

    boundary_precision: float
    boundary_recall: float
    boundary_f1: float
    span_f1: float
    words_per_unit: float


class SegmenterCheck(NamedTuple):
    """The share of texts that a segmenter tiles exactly, and words cut per second of processor time."""

    lossless: float
    words_per_second: float


def boundaries(units: Units) -> list[int]:
    """The character positions between units."""
    return list(accumulate(map(len, units)))[:-1]


def spans(units: Units) -> list[Span]:
    """The first and past-the-end character of each unit."""
    ends = list(accumulate(map(len, units)))
    return list(zip([0, *ends], ends, strict=False))


def compare(units: Iterable[Units], reference: Iterable[Units]) -> SegmentScores:
    """Boundary precision, recall and F1, and the F1 of units that agree at both ends.

    Args:
        units: the units of each text.
        reference: those they should be, of the same texts in the same order.

    Raises:
        SegmentError: two lists of units are not of the same text.

    Example:
        >>> compare([("a b", " c")], [("a b", " c")]).boundary_f1
        1.0
    """
    cuts, pieces, words = _Agreement(), _Agreement(), 0
    for found, wanted in zip(units, reference, strict=True):
        text = "".join(found)
        if text != "".join(wanted):
            raise SegmentError(f"Units of {text[:60]!r} are compared with those of {''.join(wanted)[:60]!r}.")
        cuts.add(set(boundaries(found)), set(boundaries(wanted)))
        pieces.add(set(spans(found)), set(spans(wanted)))
        words += len(text.split())
    return SegmentScores(*cuts.scores(), pieces.scores()[-1], words / max(pieces.found, 1))


class _Agreement:
    """Counts of what is found, wanted and both."""

    def __init__(self) -> None:
        self.both = self.found = self.wanted = 0

    def add(self, found: set, wanted: set) -> None:
        self.both += len(found & wanted)
        self.found += len(found)
        self.wanted += len(wanted)

    def scores(self) -> tuple[float, float, float]:
        """Precision, recall and F1; nothing found is precise, nothing wanted is all found."""
        precision = self.both / self.found if self.found else 1.0
        recall = self.both / self.wanted if self.wanted else 1.0
        return precision, recall, 2 * self.both / max(self.found + self.wanted, 1) if self.found + self.wanted else 1.0


def unsplit_rate(units: Iterable[Units], wholes: Iterable[Iterable[Span]]) -> float:
    """The share of character spans (of names, or noun phrases) with no boundary inside; 1 if there is no span.

    Args:
        units: the units of each text.
        wholes: per text the first and past-the-end character of what should stay whole.
    """
    whole = total = 0
    for found, kept in zip(units, wholes, strict=True):
        cuts = boundaries(found)
        for start, end in kept:
            whole += bisect_right(cuts, start) == bisect_left(cuts, end)
            total += 1
    return whole / total if total else 1.0


def name_spans(text: str, names: Iterable[str]) -> list[Span]:
    """Where names occur in a text, each wherever it does."""
    found = []
    for name in names:
        start = text.find(name)
        while name and start >= 0:
            found.append((start, start + len(name)))
            start = text.find(name, start + 1)
    return sorted(found)


def check_segmenter(segmenter: Segmenter, texts: Sequence[str]) -> SegmenterCheck:
    """Cut all texts, with the processor time it takes, and count those whose units tile them."""
    start = time.process_time()
    cut = [segmenter(text) for text in texts]
    seconds = time.process_time() - start
    lossless = sum(_tiles(text, units) for text, units in zip(texts, cut, strict=True))
    words = sum(len(text.split()) for text in texts)
    return SegmenterCheck(lossless / len(texts) if texts else 1.0, words / max(seconds, 1e-9))


def _tiles(text: str, units: Units) -> bool:
    try:
        check_units(text, units)
    except SegmentError:
        return False
    return True
