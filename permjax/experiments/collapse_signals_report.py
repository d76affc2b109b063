"""What a run on signals tells: how well each tells broken models, over all edits and within one kind of covariances."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from permjax.edit.signals import auc, roc, spearman
from permjax.report import Curve, Figure, Outcome, Table

SIGNALS = {
    "mixture_ppl": "perplexity, mixture",
    "mixture_kl": "KL to the base, mixture",
    "text_ppl": "perplexity, text alone",
    "energy": "energy of the change",
    "norm": "norm of the change",
    "inverse_denominator": "1 / denominator",
}


class Sweep(NamedTuple):
    """Single edits of one model by one editor with one kind of covariances.

    Attributes:
        seed: of the model.
        covariance: of which kind.
        editor: by which.
        signals: one number for each edit, by `SIGNALS`; perplexities are multiples of the base's.
        retained: the mean over tasks of the score as a share of the base's, after each edit.
        kept: the same by task.
    """

    seed: int
    covariance: str
    editor: str
    signals: Mapping[str, np.ndarray]
    retained: np.ndarray
    kept: Mapping[str, np.ndarray]


def report(config: Any, sweeps: Sequence[Sweep]) -> Outcome:
    """The outcome of all sweeps.

    Args:
        config: of the run.
        sweeps: of all models, editors and covariances.
    """
    return Outcome(
        title=f"What tells a broken model: {len(SIGNALS)} signals of single edits",
        summary=" ".join((_setting(config, sweeps), *_verdicts(config, sweeps))),
        metrics=dict(_metrics(config, sweeps)),
        tables=(_areas(config, sweeps), _tasks(sweeps)),
        figures=_figures(config, sweeps),
        headline=("auc_energy_pooled", "auc_mixture_ppl_pooled", "auc_text_ppl_pooled", "auc_norm_pooled"),
    )


def _signal(sweeps: Sequence[Sweep], key: str) -> np.ndarray:
    return np.concatenate([one.signals[key] for one in sweeps])


def _broken(config: Any, sweeps: Sequence[Sweep]) -> np.ndarray:
    return np.concatenate([one.retained for one in sweeps]) < config.keeps


def _together(config: Any, sweeps: Sequence[Sweep], key: str) -> float:
    """The area over all models, whatever their base."""
    return auc(_signal(sweeps, key), _broken(config, sweeps))


def _by_base(sweeps: Sequence[Sweep]) -> list[list[Sweep]]:
    return [[one for one in sweeps if one.seed == seed] for seed in dict.fromkeys(one.seed for one in sweeps)]


def _area(config: Any, sweeps: Sequence[Sweep], key: str) -> float:
    """The mean over bases of the area over the models of each; a base with all models broken, or none, is left out."""
    areas = [_together(config, some, key) for some in _by_base(sweeps)]
    known = [area for area in areas if np.isfinite(area)]
    return float(np.mean(known)) if known else float("nan")


def _within(config: Any, sweeps: Sequence[Sweep], key: str) -> dict[str, float]:
    """The area for each kind of covariances alone; NaN where all models are broken or none."""
    return {kind: _area(config, [one for one in sweeps if one.covariance == kind], key) for kind in config.covariances}


def _worst(config: Any, sweeps: Sequence[Sweep], key: str) -> float:
    areas = [area for area in _within(config, sweeps, key).values() if np.isfinite(area)]
    return min(areas, default=float("nan"))


def _correlation(sweeps: Sequence[Sweep], key: str, task: str | None = None) -> float:
    """The mean over bases of the rank correlation over the models of a base."""
    return float(np.mean([_correlation_together(some, key, task) for some in _by_base(sweeps)]))


def _correlation_together(sweeps: Sequence[Sweep], key: str, task: str | None = None) -> float:
    kept = [one.retained if task is None else one.kept[task] for one in sweeps]
    return spearman(_signal(sweeps, key), np.concatenate(kept))


def _metrics(config: Any, sweeps: Sequence[Sweep]) -> Iterator[tuple[str, float | int]]:
    yield "spearman_ppl_task_mixture", _correlation(sweeps, "mixture_ppl")
    yield "spearman_ppl_task_text", _correlation(sweeps, "text_ppl")
    yield "spearman_ppl_task_mixture_over_bases", _correlation_together(sweeps, "mixture_ppl")
    for key in SIGNALS:
        yield f"auc_{key}_pooled", _area(config, sweeps, key)
        yield f"auc_{key}_over_bases", _together(config, sweeps, key)
        yield f"auc_{key}_within_min", _worst(config, sweeps, key)
        yield from ((f"auc_{key}_within_{kind}", area) for kind, area in _within(config, sweeps, key).items())
    yield "edited_models", len(_broken(config, sweeps))
    yield "broken_share", float(np.mean(_broken(config, sweeps)))
    for kind in config.covariances:
        some = [one for one in sweeps if one.covariance == kind]
        yield f"broken_share_{kind}", float(np.mean(_broken(config, some)))


# words


def _setting(config: Any, sweeps: Sequence[Sweep]) -> str:
    count = len(_broken(config, sweeps))
    return (
        f"{count:,} models with one edit each: {2 * config.edits} edits, half of them hard, in each of {config.seeds} "
        f"bases with covariances from {', '.join(config.covariances)}. A model is broken if it retains less than "
        f"{100 * config.keeps:.0f} % of the tasks: facts about other people, and sums. The mixture is made by the "
        "generator that also makes the tasks, so that its perplexity is an upper bound for what perplexity can tell, "
        "and the text, which covers none of them, a lower one. Models of one base are not independent."
    )


def _verdicts(config: Any, sweeps: Sequence[Sweep]) -> Iterator[str]:
    """Yield what the numbers say, whatever that is."""
    yield f"{100 * np.mean(_broken(config, sweeps)):.0f} % of the models are broken."
    for key, title in SIGNALS.items():
        pooled, worst = _area(config, sweeps, key), _worst(config, sweeps, key)
        turned = ", the wrong way round" if pooled < 0.5 else ""
        yield f"Area under the curve of {title}: {pooled:.2f} over all{turned}, at worst {worst:.2f} within one kind."
    mixture, text = (_correlation(sweeps, key) for key in ("mixture_ppl", "text_ppl"))
    yield f"Rank correlation of perplexity with what is retained: {mixture:.2f} on the mixture, {text:.2f} on text."


# tables and figures


def _areas(config: Any, sweeps: Sequence[Sweep]) -> Table:
    rows = [
        (
            title,
            _together(config, sweeps, key),
            _area(config, sweeps, key),
            *_within(config, sweeps, key).values(),
            _correlation(sweeps, key),
        )
        for key, title in SIGNALS.items()
    ]
    heads = ("signal", "all bases", "one base", *config.covariances, "rank correlation")
    caption = (
        "Areas under the curve for models that retain too little: of all models of all bases together, of all those of "
        "one base, and of those with one kind of covariances; the latter are means over bases, as is the correlation "
        "with the share that is retained. Perplexities are multiples of the base's. Energy and norm need no forward "
        "pass."
    )
    return Table("Signals", heads, tuple(rows), caption)


def _tasks(sweeps: Sequence[Sweep]) -> Table:
    tasks = [*sweeps[0].kept]
    rows = tuple((SIGNALS[key], *(_correlation(sweeps, key, task) for task in tasks)) for key in SIGNALS)
    heads = ("signal", *(task.replace("_", " ") for task in tasks))
    return Table("Rank correlations with the share of each task that is retained", heads, rows)


def _figures(config: Any, sweeps: Sequence[Sweep]) -> tuple[Figure, ...]:
    broken = _broken(config, sweeps)
    if broken.all() or not broken.any():
        return ()
    curves = []
    for key, title in SIGNALS.items():
        found = roc(_signal(sweeps, key), broken)
        curves.append(Curve(title, 100 * found.false_alarms, 100 * found.found))
    caption = "Shares of sound and of broken models above a threshold that falls; the diagonal is chance."
    title = "What tells a broken model"
    return (Figure("roc", title, caption, "false alarms [%]", "broken models found [%]", tuple(curves)),)
