"""What a run on streams of edits tells: perplexity and answers by the number of edits, and what a guard saves."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from permjax.experiments.collapse_editors import TITLES
from permjax.report import Curve, Figure, Outcome, Table

_BROKEN = 3.0  # times the perplexity of the base
_KINDS = ("bare", "prefixed", "free")


class Stream(NamedTuple):
    """Hard or normal edits, with covariances of some kind."""

    form: str
    covariance: str


class Point(NamedTuple):
    """A model after some edits.

    Attributes:
        perplexity: of the mixture.
        ratio: the same as a multiple of that of the base.
        retained: the mean over tasks of the score as a share of that of the base.
        efficacy: of all edits so far in this model: `bare`, `prefixed` and `free`.
    """

    perplexity: float
    ratio: float
    retained: float
    efficacy: Mapping[str, float]


class Run(NamedTuple):
    """One editor on one stream in one model: what was measured, by the number of edits, and seconds per edit."""

    stream: Stream
    editor: str
    seed: int
    points: Mapping[int, Point]
    seconds: float


class Guard(NamedTuple):
    """The guarded stream in one model.

    Attributes:
        covariance: their kind.
        seed: of the model.
        point: the model after it; efficacy is of all edits, refused ones included.
        ways: the editor that was accepted for each edit, or None.
        safe: how many edits the limits were learnt from.
        false_refusals: the share of other safe edits that they refuse.
    """

    covariance: str
    seed: int
    point: Point
    ways: tuple[str | None, ...]
    safe: int
    false_refusals: float

    @property
    def share(self) -> float:
        """The share of edits that were accepted."""
        return sum(way is not None for way in self.ways) / len(self.ways)


class _Matched(NamedTuple):
    """The first checkpoint without guard at which as many edits hold as with it, and its ratio of perplexity."""

    count: int
    ratio: float


def report(config: Any, runs: Sequence[Run], guards: Sequence[Guard]) -> Outcome:
    """The outcome of all streams.

    Args:
        config: of the run.
        runs: of all models, streams and editors.
        guards: of each model.
    """
    streams = list(dict.fromkeys(run.stream for run in runs))
    last = config.checkpoints[-1]
    return Outcome(
        title=f"{last} edits one after the other: {len(config.editors)} editors, without and with a guard",
        summary=" ".join((_setting(config), *_verdicts(config, runs, guards))),
        metrics=dict(_metrics(config, runs)) | dict(_guarded(config, runs, guards)),
        tables=(
            *(_table(config, runs, stream) for stream in streams),
            *(_guard_table(config, runs, some) for some in _by_kind(guards)),
        ),
        figures=tuple(_figure(runs, stream) for stream in streams),
        headline=(f"editors_above_3x_at_{last}", "guarded_ppl_ratio", "unguarded_ppl_ratio", "guarded_accepted_share"),
    )


def _of(runs: Sequence[Run], stream: Stream) -> dict[str, list[Run]]:
    """The runs of a stream by editor."""
    names = dict.fromkeys(run.editor for run in runs if run.stream == stream)
    return {name: [run for run in runs if run.stream == stream and run.editor == name] for name in names}


def _mean(some: Sequence[Run], count: int, what: str) -> float:
    return float(np.mean([getattr(run.points[count], what) for run in some]))


def _efficacy(some: Sequence[Run], count: int, kind: str) -> float:
    return float(np.mean([run.points[count].efficacy[kind] for run in some]))


# metrics


def _metrics(config: Any, runs: Sequence[Run]) -> Iterator[tuple[str, float | int]]:
    last = config.checkpoints[-1]
    for stream in dict.fromkeys(run.stream for run in runs):
        names = _of(runs, stream)
        parts = [part for part, first in zip(stream, _plain(config), strict=True) if part != first]
        prefix = "".join(f"{part}_" for part in parts)
        for name, some in names.items():
            for count in config.checkpoints:
                yield f"{prefix}{name}_ppl_at_{count}", _mean(some, count, "perplexity")
                yield f"{prefix}{name}_retained_at_{count}", _mean(some, count, "retained")
            for kind in _KINDS:
                yield f"{prefix}{name}_efficacy_{kind}", _efficacy(some, last, kind)
        above = sum(not _mean(some, last, "ratio") <= _BROKEN for some in names.values())
        yield f"{prefix}editors_above_3x_at_{last}", above
    yield "seconds_per_edit", float(np.mean([run.seconds for run in runs]))


def _plain(config: Any) -> Stream:
    """The stream whose keys have no prefix."""
    return Stream(config.streams[0], config.covariances[0])


def _guarded(config: Any, runs: Sequence[Run], guards: Sequence[Guard]) -> Iterator[tuple[str, float | int]]:
    """Yield the numbers of all guarded streams; keys name the covariances, but for the first of them."""
    for number, some in enumerate(_by_kind(guards)):
        prefix = f"{some[0].covariance}_" if number else ""
        yield from ((prefix + key, value) for key, value in _guarded_stream(config, runs, some).items())


def _guarded_stream(config: Any, runs: Sequence[Run], guards: Sequence[Guard]) -> dict[str, float]:
    """The numbers of guarded streams with one kind of covariances."""
    last, free = config.checkpoints[-1], _unguarded(config, runs, guards)
    matched = [_matched(run, guard) for run, guard in zip(free, guards, strict=True)]
    return {
        "guarded_ppl_ratio": float(np.max([one.point.ratio for one in guards])),
        "guarded_ppl_ratio_mean": float(np.mean([one.point.ratio for one in guards])),
        "unguarded_ppl_ratio": _mean(free, last, "ratio"),
        "guarded_accepted_share": float(np.mean([one.share for one in guards])),
        "guarded_efficacy": float(np.mean([one.point.efficacy["bare"] for one in guards])),
        "guarded_efficacy_prefixed": float(np.mean([one.point.efficacy["prefixed"] for one in guards])),
        "guarded_retained": float(np.mean([one.point.retained for one in guards])),
        "guard_false_refusal": float(np.mean([one.false_refusals for one in guards])),
        "guard_safe_edits": float(np.mean([one.safe for one in guards])),
        "unguarded_ppl_ratio_at_matched_efficacy": float(np.mean([one.ratio for one in matched])),
        "unguarded_edits_at_matched_efficacy": float(np.mean([one.count for one in matched])),
    }


def _by_kind(guards: Sequence[Guard]) -> list[list[Guard]]:
    """The guarded streams of each kind of covariances."""
    kinds = dict.fromkeys(one.covariance for one in guards)
    return [[one for one in guards if one.covariance == kind] for kind in kinds]


def _unguarded(config: Any, runs: Sequence[Run], guards: Sequence[Guard]) -> list[Run]:
    """The runs that guarded ones are compared with, one for each model."""
    return _of(runs, Stream("hard", guards[0].covariance))[config.guard.ways[0]]


def _matched(run: Run, guard: Guard) -> _Matched:
    wanted = guard.point.efficacy["bare"] * len(guard.ways)
    holding = {count: point.efficacy["bare"] * count for count, point in run.points.items()}
    best = max(holding, key=lambda count: holding[count])
    count = next((count for count, number in holding.items() if number >= wanted), best)
    return _Matched(count, run.points[count].ratio)


# words


def _setting(config: Any) -> str:
    return (
        f"Streams of {config.edits} edits in each of {config.seeds} model{'s' if config.seeds > 1 else ''}. Hard edits "
        "have a subject of one token at the start of the prompt, normal ones have it in the middle. Perplexity is of "
        "held-out rows of the mixture; retained is the mean over tasks of the score as a share of the base's, on facts "
        "of people that no edit is about, and sums."
    )


def _verdicts(config: Any, runs: Sequence[Run], guards: Sequence[Guard]) -> Iterator[str]:
    """Yield what the numbers say, whatever that is."""
    last = config.checkpoints[-1]
    for stream in dict.fromkeys(run.stream for run in runs):
        ratios = {TITLES[name]: _mean(some, last, "ratio") for name, some in _of(runs, stream).items()}
        above = [f"{name} ({ratio:.3g}x)" for name, ratio in ratios.items() if not ratio <= _BROKEN]
        below = [f"{name} ({ratio:.3g}x)" for name, ratio in ratios.items() if ratio <= _BROKEN]
        told = [f"above three times the base: {', '.join(above)}"] * bool(above)
        told += [f"below: {', '.join(below)}"] * bool(below)
        yield f"After {last} {stream.form} edits, covariances from {stream.covariance}: {'; '.join(told)}."
    if {"rome", "c_rome"} <= {*config.editors}:
        yield from (_contrast(config, runs, Stream(form, config.covariances[0])) for form in config.streams)
    yield from (_guard_verdict(config, runs, some) for some in _by_kind(guards))


def _contrast(config: Any, runs: Sequence[Run], stream: Stream) -> str:
    """How fast ROME and C-ROME lose what the base knew."""
    some = _of(runs, stream)
    kept = [
        f"{_mean(some['rome'], count, 'retained'):.2f} / {_mean(some['c_rome'], count, 'retained'):.2f} after {count}"
        for count in config.checkpoints
    ]
    return f"Share retained by ROME / C-ROME, {stream.form} edits, {stream.covariance}: {', '.join(kept)}."


def _guard_verdict(config: Any, runs: Sequence[Run], guards: Sequence[Guard]) -> str:
    found = _guarded_stream(config, runs, guards)
    return (
        f"Under guard, covariances from {guards[0].covariance}, perplexity stays within "
        f"{found['guarded_ppl_ratio']:.3g} times the base's, without it grows to "
        f"{found['unguarded_ppl_ratio']:.3g} times; {100 * found['guarded_accepted_share']:.0f} % of edits are "
        f"accepted and {100 * found['guard_false_refusal']:.0f} % of other safe edits refused. At the end "
        f"{100 * found['guarded_efficacy']:.0f} % of all target tokens are right; without guard as many edits hold "
        f"after {found['unguarded_edits_at_matched_efficacy']:.0f} edits, at "
        f"{found['unguarded_ppl_ratio_at_matched_efficacy']:.3g} times the base's perplexity."
    )


# tables and figures


def _table(config: Any, runs: Sequence[Run], stream: Stream) -> Table:
    rows = []
    for name, some in _of(runs, stream).items():
        cells = [_cell(some, count) for count in config.checkpoints]
        last = [100 * _efficacy(some, config.checkpoints[-1], kind) for kind in _KINDS]
        rows.append((TITLES[name], *cells, *last))
    heads = (*(f"after {count}" for count in config.checkpoints), *(f"{kind} [%]" for kind in _KINDS))
    caption = (
        "Perplexity as a multiple of the base's / share of the tasks that is retained. Then how many target tokens of "
        "all edits are right in the last model: after the bare prompt, behind prefixes, and whole answers by itself."
    )
    return Table(f"{stream.form} edits, covariances from {stream.covariance}", ("editor", *heads), tuple(rows), caption)


def _cell(some: Sequence[Run], count: int) -> str:
    return f"{_mean(some, count, 'ratio'):.3g} / {_mean(some, count, 'retained'):.2f}"


def _guard_table(config: Any, runs: Sequence[Run], guards: Sequence[Guard]) -> Table:
    last, rows = config.checkpoints[-1], []
    for run, guard in zip(_unguarded(config, runs, guards), guards, strict=True):
        taken = ", ".join(f"{TITLES[way]} {guard.ways.count(way)}" for way in config.guard.ways)
        shares = (100 * guard.share, 100 * guard.point.efficacy["bare"], 100 * guard.false_refusals)
        ratios = (guard.point.ratio, run.points[last].ratio, _matched(run, guard).ratio)
        rows.append((guard.seed, *ratios, guard.point.retained, *shares, taken))
    columns = ("base", "guarded", "unguarded", "at matched efficacy", "retained")
    caption = (
        "Perplexities as multiples of the base's; 'at matched efficacy' is that without guard when as many edits hold "
        "as with it. Limits were learnt from other, safe edits; refused are safe edits that were neither."
    )
    heads = (*columns, "accepted [%]", "efficacy [%]", "safe but refused [%]", "taken")
    return Table(f"The hard stream under guard, covariances from {guards[0].covariance}", heads, tuple(rows), caption)


def _figure(runs: Sequence[Run], stream: Stream) -> Figure:
    curves = []
    for name, some in _of(runs, stream).items():
        counts = sorted(some[0].points)
        values = np.log10([[run.points[count].ratio for count in counts] for run in some])
        shown = np.isfinite(values).all(axis=0)
        curves.append(Curve(TITLES[name], np.asarray(counts)[shown], *(f(values, axis=0)[shown] for f in _ENDS)))
    caption = "Mean over models; bands from the lowest to the highest. 0 is the base, 0.48 three times it."
    title = f"{stream.form} edits, covariances from {stream.covariance}"
    name = f"{stream.form}_{stream.covariance}"
    return Figure(name, title, caption, "edits", "log10 of the perplexity ratio", tuple(curves))


_ENDS = (np.mean, np.min, np.max)
