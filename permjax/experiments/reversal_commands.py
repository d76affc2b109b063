"""The commands on texts whose units are re-ordered, as the command line sees them."""

import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeAlias, Union

from tyro.conf import FlagCreatePairsOff, Positional, arg, subcommand

from permjax.experiments.progress import Progress
from permjax.report import Outcome, Table
from permjax.reversal.offline import Written, permute_file
from permjax.reversal.segmenters import segmenter
from permjax.reversal.texts import PermuteOptions

_FEW = 20  # texts


@dataclass(frozen=True, kw_only=True)
class ReversalPermute(PermuteOptions):
    """What to permute, and where to.

    Attributes:
        source: a file with a JSON object in each line.
        target: the file to write: each object with its text as it is, and with re-ordered copies of it.
        copies: re-ordered copies of each text.
        probs: of the original, the reversed and a random order.
        segmenter: what cuts texts: rules, rules_phrases, rules_small, words, ngram2 ... ngram5, random or whole.
        text: the field of the text.
        example: the field that names each text, on which alone its orders depend; the number of its line by default.
        tags: three strings for the orders, of which the right one is put before each text.
        keep_end: leave punctuation at the end of a text where it is.
        keep_original: write the text itself before its copies.
        seed: of all orders.
        processes: how many work at a time; as many as there are cores by default.
        force: overwrite the file, or begin an unfinished one anew.
        progress: show a progress bar.
    """

    source: Annotated[str, Positional, arg(metavar="IN.jsonl")]
    target: Annotated[str, Positional, arg(metavar="OUT.jsonl")]
    keep_end: FlagCreatePairsOff[bool] = False
    processes: int | None = None
    force: FlagCreatePairsOff[bool] = False
    progress: bool = True


@dataclass(frozen=True)
class ReversalSegment:
    """What to cut.

    Attributes:
        source: a text file, of which the first lines are shown with their units.
        segmenter: what cuts texts: rules, rules_phrases, rules_small, words, ngram2 ... ngram5, random or whole.
    """

    source: Annotated[str, Positional, arg(metavar="TEXT")]
    segmenter: str = "rules"


Reversal: TypeAlias = Union[  # noqa: UP007
    Annotated[
        ReversalPermute, subcommand("permute", description="Write texts, and copies with their units re-ordered.")
    ],
    Annotated[ReversalSegment, subcommand("segment", description="Show how the first lines of a text are cut.")],
]
"""All commands on texts."""


def run(given: Any, command: str) -> tuple[Outcome, None]:  # noqa: ARG001
    """Run a command; what it found is told."""
    return (_segment(given) if isinstance(given, ReversalSegment) else _permute(given)), None


def _permute(given: ReversalPermute) -> Outcome:
    options = PermuteOptions(**{field.name: getattr(given, field.name) for field in fields(PermuteOptions)})
    processes = given.processes or os.cpu_count() or 1
    begin = time.perf_counter()
    with Progress(visible=given.progress) as progress:
        path = Path(given.source)
        progress.start("permuting (bytes)", path.stat().st_size if path.is_file() else 0)
        written = permute_file(
            path, given.target, options, processes=processes, force=given.force, progress=progress.step
        )
    return _permuted_outcome(given.target, written, time.perf_counter() - begin)


def _permuted_outcome(target: str, written: Written, seconds: float) -> Outcome:
    mean = written.units / max(written.texts, 1)
    resumed = f", {written.resumed:,} of them by an earlier run" if written.resumed else ""
    summary = (
        f"{target} has {written.lines:,} lines of {written.texts:,} texts{resumed}, in {seconds:.1f} seconds. "
        f"A text has {mean:.2f} units on average; one of a single unit has only one order."
    )
    rows = tuple((name, count, count / max(written.lines, 1)) for name, count in written.orders.items())
    table = Table("Orders as they were drawn", ("order", "lines", "share"), rows)
    metrics = {"lines": written.lines, "texts": written.texts, "units_per_text": mean}
    return Outcome("Texts with their units re-ordered", summary, metrics, (table,))


def _segment(given: ReversalSegment) -> Outcome:
    cut = segmenter(given.segmenter)
    lines = [line for line in Path(given.source).read_text(encoding="utf-8").splitlines() if line.strip()]
    units = [cut(line) for line in lines[:_FEW]]
    mean = sum(map(len, units)) / max(len(units), 1)
    summary = "\n".join("|".join(found) for found in units)
    metrics = {"lines": len(units), "units_per_line": mean}
    return Outcome("Units", f"{summary}\n\n{mean:.2f} units in a line on average.", metrics)
