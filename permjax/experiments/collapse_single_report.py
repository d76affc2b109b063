"""What a run on single edits tells: how many break the model, whether they took, and why ROME's do."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from permjax.edit.collapse import Efficacy
from permjax.experiments.collapse_editors import TITLES
from permjax.report import Curve, Figure, Outcome, Table

_BROKEN = 1000.0  # the perplexity from which on Yang et al. (2024) call a model collapsed
_ENDS = (np.median, np.min, np.max)
_MANY = 8  # one in so many edits above twice the base is many: 3 of 24


class Arm(NamedTuple):
    """What one editor made of some edits, each by itself.

    Attributes:
        perplexity: after each.
        efficacy: of each.
        energy: of each change; of several layers the largest.
        denominator: `|k v|` of each, for ROME and C-ROME.
        seconds: for each, without compiling.
    """

    perplexity: np.ndarray
    efficacy: Efficacy
    energy: np.ndarray
    denominator: np.ndarray | None
    seconds: float


class Cell(NamedTuple):
    """All edits of one model in one direction.

    Attributes:
        layout: of the model.
        seed: of the model.
        direction: the number of the vector that is added at the first token.
        before: perplexity of the model without an edit.
        hard: editor -> what it made of hard edits.
        control: the same of their controls, with the subject in the middle.
        doses: strength -> median denominators and cosine of keys.
    """

    layout: str
    seed: int
    direction: int
    before: float
    hard: Mapping[str, Arm]
    control: Mapping[str, Arm]
    doses: Mapping[float, Mapping[str, float]]

    def ratios(self, name: str, *, control: bool = False) -> np.ndarray:
        """Perplexities as multiples of that before; what is not a number counts as infinite."""
        values = (self.control if control else self.hard)[name].perplexity / self.before
        return np.where(np.isnan(values), np.inf, values)


def report(config: Any, cells: Sequence[Cell]) -> Outcome:
    """The outcome of all cells.

    Args:
        config: of the run.
        cells: in order, those of a layout together.
    """
    layouts = {layout: [cell for cell in cells if cell.layout == layout] for layout in config.layouts}
    first = layouts[config.layouts[0]]
    metrics: dict[str, float | int] = {}
    for number, (layout, some) in enumerate(layouts.items()):
        metrics |= {(f"{layout}_{key}" if number else key): value for key, value in _metrics(config, some)}
    return Outcome(
        title=f"Single edits with the first token set apart: {len(config.editors)} editors",
        summary=" ".join((_setting(config), *(line for some in layouts.values() for line in _verdicts(config, some)))),
        metrics=metrics,
        tables=tuple(table for some in layouts.values() for table in (_editors(config, some), _directions(some))),
        figures=(_distribution(config, first), *([_denominators(layouts)] if config.gammas else [])),
        headline=tuple(f"{name}_share_above_2x" for name in config.editors),
    )


# metrics


def _metrics(config: Any, cells: Sequence[Cell]) -> Iterator[tuple[str, float | int]]:
    for name in config.editors:
        yield from ((f"{name}_{key}", value) for key, value in _of_editor(name, cells))
    for gamma in config.gammas:
        for key in ("rome", "c_rome", "cosine"):
            what = "keys_cosine" if key == "cosine" else f"{key}_denominator"
            yield f"{what}_at_gamma_{gamma:g}", float(np.median([cell.doses[gamma][key] for cell in cells]))
    yield "base_ppl", float(np.mean([cell.before for cell in cells]))
    yield "seconds_per_edit", float(np.mean([arm.seconds for cell in cells for arm in cell.hard.values()]))
    yield "edits", sum(len(arm.perplexity) for cell in cells for arm in cell.hard.values())


def _of_editor(name: str, cells: Sequence[Cell]) -> Iterator[tuple[str, float | int]]:
    ratios = [cell.ratios(name) for cell in cells]
    every = np.concatenate(ratios)
    perplexities = np.concatenate([ratio * cell.before for ratio, cell in zip(ratios, cells, strict=True)])
    yield "share_above_2x", float(np.mean(every > 2))
    yield "share_above_1000", float(np.mean(perplexities > _BROKEN))
    yield "share_above_1_1x", float(np.mean(every > 1.1))
    yield "ratio_median", float(np.median(every))
    yield "ratio_max", float(np.max(every))
    yield "directions_with_many_above_2x", sum(bool(np.sum(ratio > 2) * _MANY >= len(ratio)) for ratio in ratios)
    for kind in Efficacy._fields:
        yield f"efficacy_{kind}", _efficacy(cells, name, kind)
    if name in cells[0].control:
        yield "control_share_above_2x", _control_share(cells, name)
        yield "control_ratio_max", float(np.max([cell.ratios(name, control=True) for cell in cells]))
    yield "seconds_per_edit", float(np.mean([cell.hard[name].seconds for cell in cells]))


def _efficacy(cells: Sequence[Cell], name: str, kind: str) -> float:
    return float(np.mean([getattr(cell.hard[name].efficacy, kind) for cell in cells]))


def _share(cells: Sequence[Cell], name: str, limit: float) -> float:
    return float(np.mean([cell.ratios(name) > limit for cell in cells]))


def _control_share(cells: Sequence[Cell], name: str) -> float:
    return float(np.mean([cell.ratios(name, control=True) > 2 for cell in cells]))


# words


def _setting(config: Any) -> str:
    cells = config.seeds * config.directions
    return (
        f"{config.edits} hard edits, whose subject is one token at the start of the prompt, in each of {cells} models "
        f"per layout: {config.directions} random vectors of length {config.gamma:g} were added at the first token of "
        f"{config.seeds} trained base{'s' if config.seeds > 1 else ''}. This sets the first token apart by force; "
        f"large models learn it. Covariances are from {config.covariance}, collected with the vector in place. "
        "Perplexity is of held-out rows of the mixture. The vector itself harms the base, so its answers are not told."
    )


def _verdicts(config: Any, cells: Sequence[Cell]) -> Iterator[str]:
    """Yield what the numbers say, whatever that is."""
    ratios = {TITLES[name]: np.concatenate([cell.ratios(name) for cell in cells]) for name in config.editors}
    above = ", ".join(f"{title} {np.sum(every > 2)}" for title, every in ratios.items())
    worst = ", ".join(f"{title} {_times(float(np.max(every)))}" for title, every in ratios.items())
    count = len(next(iter(ratios.values())))
    yield f"Layout {cells[0].layout}: of {count} edits each, above twice the base perplexity: {above}. Worst: {worst}."
    if {"rome", "c_rome"} <= {*config.editors}:
        yield _contrast(cells)


def _times(ratio: float) -> str:
    """A ratio in words."""
    return f"{ratio:,.0f} times" if ratio >= 100 else f"{ratio:.3g} times"


def _contrast(cells: Sequence[Cell]) -> str:
    """ROME against C-ROME, hard edits against controls."""
    shares = [_efficacy(cells, name, "prefixed") for name in ("rome", "c_rome")]
    counts = "fair" if shares[1] >= 0.75 * shares[0] else "not fair"
    above = [100 * _share(cells, name, 2.0) for name in ("rome", "c_rome")]
    control = [100 * _control_share(cells, name) for name in ("rome", "c_rome")]
    return (
        f"Above twice the base: ROME {above[0]:.0f} % of hard edits and {control[0]:.0f} % of controls, C-ROME "
        f"{above[1]:.0f} % and {control[1]:.0f} %. With prefixes ROME is right in {100 * shares[0]:.0f} % and C-ROME "
        f"in {100 * shares[1]:.0f} %, so that the comparison is {counts} (C-ROME at least three quarters)."
    )


# tables


def _editors(config: Any, cells: Sequence[Cell]) -> Table:
    rows = []
    for name in config.editors:
        every = np.concatenate([cell.ratios(name) for cell in cells])
        efficacies = (100 * _efficacy(cells, name, kind) for kind in Efficacy._fields)
        above = [100 * _share(cells, name, limit) for limit in (1.1, 2.0)]
        ratios = (_times(float(f(every))).split()[0] for f in (np.median, np.max))
        rows.append((TITLES[name], *ratios, *above, *efficacies))
    columns = ("editor", "median ratio", "largest ratio", "above 1.1x [%]", "above 2x [%]")
    caption = (
        "Perplexity after one edit as a multiple of that before. Efficacy: target tokens right after the bare prompt, "
        "the same behind prefixes, and the whole target written freely after the bare prompt."
    )
    heads = ("bare [%]", "prefixed [%]", "free [%]")
    return Table(f"Hard edits, {cells[0].layout}", (*columns, *heads), tuple(rows), caption)


def _directions(cells: Sequence[Cell]) -> Table:
    """How many edits of each direction are above twice the base."""
    names = [*cells[0].hard]
    rows = tuple(
        (cell.seed, cell.direction, cell.before, *(int(np.sum(cell.ratios(name) > 2)) for name in names))
        for cell in cells
    )
    columns = ("base", "direction", "perplexity before", *(TITLES[name] for name in names))
    title = f"Edits above twice the base perplexity, {cells[0].layout}"
    return Table(title, columns, rows, f"Of {len(cells[0].hard[names[0]].perplexity)} in each row.")


# figures


def _distribution(config: Any, cells: Sequence[Cell]) -> Figure:
    """All perplexities in order, on a logarithmic scale."""
    curves = []
    for name in config.editors:
        values = np.sort(np.concatenate([cell.ratios(name) for cell in cells]))
        share = 100 * (np.arange(len(values)) + 0.5) / len(values)
        finite = np.isfinite(values)
        curves.append(Curve(TITLES[name], share[finite], np.log10(values[finite])))
    caption = "Every hard edit of all directions, from the most harmless to the worst; 0 is the base, 0.3 twice it."
    title = f"Perplexity after single edits, {cells[0].layout}"
    return Figure("distribution", title, caption, "edits [%]", "log10 of the ratio to the base", tuple(curves))


def _denominators(layouts: Mapping[str, Sequence[Cell]]) -> Figure:
    """How the denominator falls with the strength of the knob."""
    curves = []
    for layout, cells in layouts.items():
        doses = sorted(cells[0].doses)
        for name in ("rome", "c_rome"):
            values = np.log10([[cell.doses[dose][name] for dose in doses] for cell in cells])
            curves.append(Curve(f"{TITLES[name]}, {layout}", doses, *(f(values, axis=0) for f in _ENDS)))
    caption = "Median over edits; bands reach over the directions. The change of ROME is inverse to it."
    title = "The denominator falls with the first token's distance"
    return Figure("denominators", title, caption, "strength", "log10 of the median denominator", tuple(curves))
