"""What a run on the edits of a checkpoint tells: which edits break it, why, and what a guard makes of a row of them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from permjax.edit.collapse import Efficacy
from permjax.edit.signals import spearman
from permjax.experiments.collapse_editors import TITLES
from permjax.report import Curve, Figure, Outcome, Table

_BROKEN = 1000.0  # the perplexity from which on Yang et al. (2024) call a model collapsed
_ROWS = 200  # of a table
_NAMES = {"hard": "hard edits", "control": "controls", "given": "edits"}


class Arm(NamedTuple):
    """What one editor made of some edits, each by itself.

    Attributes:
        perplexity: after each.
        bare: efficacy of each; see `Efficacy`.
        prefixed: the same.
        free: the same.
        energy: of each change; of several layers the largest.
        denominator: `|k v|` of each, for ROME and C-ROME; else not a number.
        cosine: between the key of the bare prompt and the mean over rows, likewise.
        seconds: for each, compilation included.
    """

    perplexity: np.ndarray
    bare: np.ndarray
    prefixed: np.ndarray
    free: np.ndarray
    energy: np.ndarray
    denominator: np.ndarray
    cosine: np.ndarray
    seconds: np.ndarray


class Stream(NamedTuple):
    """A model that is edited again and again.

    Attributes:
        points: number of edits -> perplexity.
        efficacy: of all edits in the last model, by kind.
        ways: the editor of each edit; None where it was refused.
    """

    points: Mapping[int, float]
    efficacy: Mapping[str, float]
    ways: tuple[str | None, ...]


class Found(NamedTuple):
    """All that was found.

    Attributes:
        source: what second moments were collected from.
        counts: kind -> number of edits.
        skipped: a sentence on each record that was left out.
        before: perplexity of the model.
        arms: kind -> editor -> single edits.
        streams: editor -> edits of the first kind in a row; none where there was no sequence.
        guarded: the same under guard, by several editors.
    """

    source: str
    counts: Mapping[str, int]
    skipped: tuple[str, ...]
    before: float
    arms: Mapping[str, Mapping[str, Arm]]
    streams: Mapping[str, Stream]
    guarded: Stream | None

    def ratios(self, kind: str, name: str) -> np.ndarray:
        """Perplexities as multiples of that before; what is not a number counts as infinite."""
        return _ratio(self.arms[kind][name].perplexity, self.before)


def _ratio(perplexity: Any, before: float) -> np.ndarray:
    values = np.asarray(perplexity, np.float64) / before
    return np.where(np.isnan(values), np.inf, values)


def report(config: Any, found: Found) -> Outcome:
    """The outcome of a run.

    Args:
        config: of the run.
        found: what it found.
    """
    streams = (_streams(found),) if found.streams else ()
    left_out = Table("Records that were left out", ("record",), tuple((one,) for one in found.skipped[:_ROWS]))
    return Outcome(
        title=f"Edits of {Path(config.checkpoint).name}: {len(config.editors)} editors",
        summary=" ".join((_setting(config, found), *_verdicts(config, found))),
        metrics=dict(_metrics(config, found)),
        tables=(_singles(found), *streams, *([left_out] if found.skipped else [])),
        figures=(_distribution(found), *([_rows(found)] if found.streams else [])),
        headline=tuple(f"{name}_share_above_2x" for name in config.editors),
    )


# metrics


def _metrics(config: Any, found: Found) -> Iterator[tuple[str, float | int]]:
    yield "base_ppl", found.before
    for number, (kind, arms) in enumerate(found.arms.items()):
        for name, arm in arms.items():
            prefix = f"{name}_{kind}" if number else name
            yield from ((f"{prefix}_{key}", value) for key, value in _of_arm(arm, found.ratios(kind, name)))
    for name, stream in found.streams.items():
        yield from ((f"{name}_ppl_at_{count}", value) for count, value in stream.points.items())
    if found.guarded is not None:
        yield from _of_guard(found, next(iter(found.streams.values())), found.guarded)
    every = [arm.seconds for arms in found.arms.values() for arm in arms.values()]
    yield "seconds_per_edit", float(np.median(np.concatenate(every)))
    yield from ((f"edits_{kind}", count) for kind, count in found.counts.items())
    if config.skip_bad:
        yield "skipped", len(found.skipped)


def _of_arm(arm: Arm, ratios: np.ndarray) -> Iterator[tuple[str, float]]:
    yield "share_above_2x", float(np.mean(ratios > 2))
    yield "share_above_1000", float(np.mean(~(arm.perplexity <= _BROKEN)))
    yield "ratio_median", float(np.median(ratios))
    yield "ratio_max", float(np.max(ratios))
    yield from ((f"efficacy_{kind}", float(np.mean(getattr(arm, kind)))) for kind in Efficacy._fields)
    yield "energy_median", float(np.median(arm.energy))
    if np.isfinite(arm.denominator).all():
        yield "denominator_median", float(np.median(arm.denominator))
        yield "keys_cosine_median", float(np.median(arm.cosine))
        if np.isfinite(value := spearman(arm.denominator, ratios)):
            yield "spearman_denominator_ppl", value


def _of_guard(found: Found, free: Stream, guarded: Stream) -> Iterator[tuple[str, float]]:
    for name, stream in (("unguarded", free), ("guarded", guarded)):
        yield f"{name}_ppl_ratio", float(_ratio(stream.points[max(stream.points)], found.before))
        yield f"{name}_efficacy", stream.efficacy["bare"]
        yield f"{name}_efficacy_prefixed", stream.efficacy["prefixed"]
    yield "guarded_accepted_share", _accepted(guarded)


def _accepted(stream: Stream) -> float:
    return float(np.mean([way is not None for way in stream.ways]))


# words


def _setting(config: Any, found: Found) -> str:
    counts = " and ".join(f"{count} {_NAMES[kind]}" for kind, count in found.counts.items())
    whence = "made from templates" if config.edits is None else f"of {Path(config.edits).name}"
    probe = ", ".join(Path(path).name for path in config.probe) or "text that the model wrote itself"
    left = f" {len(found.skipped)} records of the file are no edits and were left out." if found.skipped else ""
    return (
        f"{counts} {whence}, each by itself on a side path of {config.checkpoint}; second moments: "
        f"{found.source}.{left} Perplexity is of {probe} ({config.convention}), {found.before:.4g} before any edit."
    )


def _verdicts(config: Any, found: Found) -> Iterator[str]:
    """Yield what the numbers say, whatever that is."""
    for name in config.editors:
        told = []
        for kind in found.arms:
            ratios = found.ratios(kind, name)
            told.append(f"{np.sum(ratios > 2)} of {len(ratios)} {_NAMES[kind]} (worst {np.max(ratios):.3g} times)")
        yield f"{TITLES[name]}: above twice the perplexity {', '.join(told)}."
    if found.guarded is not None:
        first, free = next(iter(found.streams.items()))
        ratios = [_ratio(one.points[max(one.points)], found.before) for one in (free, found.guarded)]
        yield (
            f"After {len(found.guarded.ways)} edits in a row the perplexity is {ratios[0]:.3g} times that before by "
            f"{TITLES[first]}, and {ratios[1]:.3g} times under a guard that accepted "
            f"{100 * _accepted(found.guarded):.0f} % of them ({_by_editor(found.guarded)})."
        )


def _by_editor(stream: Stream) -> str:
    counts = Counter(TITLES[way] for way in stream.ways if way is not None)
    return ", ".join(f"{count} by {title}" for title, count in counts.items()) or "none"


# tables


def _singles(found: Found) -> Table:
    rows = []
    for kind, arms in found.arms.items():
        for name, arm in arms.items():
            ratios = found.ratios(kind, name)
            efficacies = (100 * float(np.mean(getattr(arm, key))) for key in Efficacy._fields)
            numbers = f"{np.median(ratios):.3g}", f"{np.max(ratios):.3g}", 100 * float(np.mean(ratios > 2))
            keys = (_cell(np.median(arm.denominator)), _cell(np.median(arm.cosine)))
            rows.append((_NAMES[kind], TITLES[name], *numbers, *efficacies, *keys))
    columns = ("edits", "editor", "median ratio", "largest ratio", "above 2x [%]")
    efficacy = ("bare [%]", "prefixed [%]", "free [%]")
    caption = (
        "Perplexity after one edit as a multiple of that before. Efficacy: target tokens right after the bare prompt, "
        "the same behind prefixes, and the whole target written freely. Medians of the denominator of the change, to "
        "which its size is inverse, and of the cosine between the bare key and the mean one."
    )
    return Table("Single edits", (*columns, *efficacy, "denominator", "cosine of keys"), tuple(rows), caption)


def _streams(found: Found) -> Table:
    every = _every(found)
    counts = [*next(iter(every.values())).points]
    rows = tuple(
        (
            name,
            *(f"{_ratio(stream.points[count], found.before):.3g}" for count in counts),
            *(100 * stream.efficacy[kind] for kind in Efficacy._fields),
            100 * _accepted(stream),
        )
        for name, stream in every.items()
    )
    heads = (*(f"after {count}" for count in counts), "bare [%]", "prefixed [%]", "free [%]", "accepted [%]")
    caption = "Perplexity as a multiple of that before any edit; efficacy of all edits, refused ones too, at the end."
    return Table("Edits in a row", ("editor", *heads), rows, caption)


def _every(found: Found) -> dict[str, Stream]:
    return {TITLES[name]: one for name, one in found.streams.items()} | (
        {"guarded": found.guarded} if found.guarded else {}
    )


def _cell(number: Any) -> float | str:
    return float(number) if np.isfinite(number) else "–"


# figures


def _distribution(found: Found) -> Figure:
    """All perplexities in order, on a logarithmic scale."""
    curves = []
    for kind, arms in found.arms.items():
        for name in arms:
            values = np.sort(found.ratios(kind, name))
            share = 100 * (np.arange(len(values)) + 0.5) / len(values)
            finite = np.isfinite(values)
            curves.append(Curve(f"{TITLES[name]}, {kind}", share[finite], np.log10(values[finite])))
    caption = "Every edit by itself, from the most harmless to the worst; 0 is the model before, 0.3 twice it."
    title, ylabel = "Perplexity after single edits", "log10 of the ratio"
    return Figure("distribution", title, caption, "edits [%]", ylabel, tuple(curves))


def _rows(found: Found) -> Figure:
    """Perplexity by the number of edits."""
    curves = []
    for name, stream in _every(found).items():
        counts, values = [0, *stream.points], [1.0, *_ratio([*stream.points.values()], found.before)]
        finite = np.isfinite(values)
        curves.append(Curve(name, np.asarray(counts)[finite], np.log10(np.asarray(values)[finite])))
    caption = "Edits one after the other; under guard each is made by the first editor that is accepted, or not at all."
    title, ylabel = "Perplexity after edits in a row", "log10 of the ratio"
    return Figure("sequence", title, caption, "edits", ylabel, tuple(curves))
