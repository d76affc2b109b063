"""What a run on composed relations tells."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from permjax.report import Curve, Figure, Outcome, Table

TITLES = {
    "affine": "affine",
    "nfe_1": "NFE-1",
    "nfe_2": "NFE-2 (published)",
    "nfe_2_exact": "NFE-2 (exact)",
    "nfe_3": "NFE-3 (published)",
    "nfe_3_exact": "NFE-3 (exact)",
    "nfe_k": "NFE-4 (exact)",
    "nfe_1_mu": "NFE-1-mu",
    "nfe_1_sigma": "NFE-1-sigma",
    "distmult": "DistMult",
    "complex": "ComplEx",
    "rotate": "RotatE",
    "transe": "TransE",
    "quate": "QuatE",
}
_COMMUTATIVE = ("distmult", "complex", "rotate", "transe", "nfe_1_mu", "nfe_1_sigma")
_SYMMETRIC = ("affine", "nfe_1", "nfe_1_sigma", "nfe_2_exact", "nfe_k", "distmult", "transe", "nfe_1_mu")
_COMPOSED = (
    "Hits@1 without filter, in percent. 'Compositions' are the answers to T after S and S after T, elements composed "
    "in the group; none was trained. Where relations commute, both questions have one answer, and at most one is right."
)
_CYCLES = (
    "The share of edges whose tail is above all other entities, in the best of the seeds. Where the score of (h, r, t) "
    "less that of (t, r, h) is a difference of two functions of one entity, no parameters get all edges of a directed "
    "cycle right."
)


class Scores(NamedTuple):
    """Shares of queries with the right answer above all others, per seed.

    Attributes:
        steps: of the trained steps.
        compositions: of both compositions, which were never trained.
        cycles: of the edges of each cycle.
    """

    steps: np.ndarray
    compositions: np.ndarray
    cycles: dict[int, np.ndarray]


def report(config: Any, found: Mapping[str, Scores]) -> Outcome:
    """The outcome of all models.

    Args:
        config: of the run, with `reach`, `cycles` and `trials`.
        found: what was measured, by model.
    """
    return Outcome(
        title="Relations composed: T moves by one, S turns around",
        summary=" ".join((_setting(config), *_verdicts(config, found))),
        metrics=dict(_metrics(found)),
        tables=(_compositions(found), *([_cycles(config, found)] if config.cycles else [])),
        figures=(_figure(found),),
        headline=tuple(f"{name}_composition_hits_at_1" for name in found),
    )


def _metrics(found: Mapping[str, Scores]) -> Iterator[tuple[str, float]]:
    for name, scores in found.items():
        yield f"{name}_composition_hits_at_1", float(scores.compositions.mean())
        yield f"{name}_composition_hits_at_1_min", float(scores.compositions.min())
        yield f"{name}_train_hits_at_1", float(scores.steps.mean())
        for n, shares in scores.cycles.items():
            yield f"{name}_cycle_{n}_hits_at_1", float(shares.max())


def _setting(config: Any) -> str:
    reach, trials = config.reach, config.trials
    return (
        f"On the numbers from {-reach} to {reach}, models learned the steps T: x -> x + 1 and S: x -> -x one by one, "
        f"from {trials} seed{'s' if trials > 1 else ''} each. Then the composed relations T after S and S after T, "
        "which were never trained, were asked for wherever neither leaves the range."
    )


def _verdicts(config: Any, found: Mapping[str, Scores]) -> Iterator[str]:
    """Yield what the numbers say, whatever that is."""
    able = [TITLES[name] for name, scores in found.items() if scores.compositions.mean() >= 0.95]
    unable = [TITLES[name] for name, scores in found.items() if scores.compositions.mean() < 0.95]
    if able:
        yield f"Right in at least 95 %: {', '.join(able)}."
    if unable:
        yield f"Right less often: {', '.join(unable)}."
    over = [name for name in _COMMUTATIVE if name in found and found[name].compositions.max() > 0.5]
    if over:
        yield f"Above one half although their relations commute, which cannot be: {', '.join(over)}."
    full = {name for name, scores in found.items() if scores.cycles and min(map(np.max, scores.cycles.values())) == 1}
    if config.cycles:
        lengths = ", ".join(map(str, config.cycles))
        names = ", ".join(TITLES[name] for name in found if name in full) or "no model"
        yield f"All edges of directed cycles of length {lengths} are ranked first by {names}."
    if wrong := sorted(full & {*_SYMMETRIC}):
        yield f"Among them are models that cannot do it by theory: {', '.join(wrong)}."


def _compositions(found: Mapping[str, Scores]) -> Table:
    rows = tuple(
        (TITLES[name], *(100 * float(x) for x in (s.steps.mean(), s.compositions.mean(), s.compositions.min())),
         "no" if name in _COMMUTATIVE else "yes")
        for name, s in found.items()
    )  # fmt: skip
    columns = ("model", "trained steps", "compositions", "worst seed", "order of relations matters")
    return Table("Composed relations", columns, rows, _COMPOSED)


def _cycles(config: Any, found: Mapping[str, Scores]) -> Table:
    columns = ("model", *(f"{n} edges" for n in config.cycles), "possible")
    rows = tuple(
        (TITLES[name], *(100 * float(s.cycles[n].max()) for n in config.cycles), "no" if name in _SYMMETRIC else "yes")
        for name, s in found.items()
    )
    return Table("Directed cycles", columns, rows, _CYCLES)


def _figure(found: Mapping[str, Scores]) -> Figure:
    names = [TITLES[name] for name in found]
    series = (("trained steps", "steps"), ("compositions", "compositions"))
    values = {label: [100 * getattr(s, field) for s in found.values()] for label, field in series}
    curves = tuple(
        Curve(label, names, *([float(f(x)) for x in shares] for f in (np.mean, np.min, np.max)))
        for label, shares in values.items()
    )
    caption = "Mean over seeds, and the worst and best of them. Only relations that do not commute tell T S from S T."
    title = "Steps learned one by one, and their compositions"
    return Figure("compositions", title, caption, "model", "Hits@1, %", curves, "bars")
