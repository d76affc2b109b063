"""What tells a broken model: signals of single edits against the answers that the edited model retains."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from permjax.edit.base import Statistics
from permjax.edit.collapse import (
    State,
    candidate_edits,
    retained,
    side_kl,
    side_losses,
    side_scores,
    state_of,
)
from permjax.edit.delta import Delta
from permjax.edit.prepare import PreparedEdit, Scored
from permjax.experiments.collapse_base import Base, OnBasesConfig, statistics_of
from permjax.experiments.collapse_editors import check_editors
from permjax.experiments.collapse_signals_report import SIGNALS, Sweep, report
from permjax.experiments.language_networks import Layout
from permjax.experiments.registry import Experiment
from permjax.merge.perplexity import Probe, perplexity_of
from permjax.report import Outcome

_EDITORS = ("rome", "c_rome")  # editors of one layer, whose changes have a denominator


@dataclass(frozen=True)
class CollapseSignalsConfig(OnBasesConfig):
    """Signals of single edits by ROME and C-ROME; more settings are those of `OnBasesConfig`.

    Attributes:
        layout: of the models.
        editors: `rome`, `c_rome` or both.
        edits: of each of both forms, hard and controls.
        covariances: mixtures of the covariances, or `identity`.
        keeps: a model is broken if it retains less than this share of the tasks.
    """

    experiment: ClassVar[str] = "collapse_signals"
    layout: Layout = "gpt2"
    editors: tuple[str, ...] = _EDITORS
    edits: int = 40
    covariances: tuple[str, ...] = ("mixture", "text", "identity")
    keeps: float = 0.9

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        check_editors(self.editors)
        if other := [name for name in self.editors if name not in _EDITORS]:
            raise ValueError(f"{other[0]!r} has no denominator; take editors of {', '.join(_EDITORS)}.")
        if not self.covariances or self.edits < 1 or not 0 < self.keeps < 1:
            raise ValueError("covariances and edits must be one or more, and keeps between 0 and 1.")


class _Measures(NamedTuple):
    """What is asked of the edited models of one base."""

    probe: Probe
    tasks: dict[str, Scored]
    before: State
    guard: Statistics


def run(config: CollapseSignalsConfig, out: Path, progress: Any) -> Outcome:
    """Run the experiment.

    Args:
        config: what to do.
        out: folder of the run; training keeps its state in `out/state`, so that an interrupted run goes on.
        progress: told about training and edits.

    Returns:
        Metrics, tables and figures.
    """
    models = config.trained(config.layout, out, progress)
    progress.start("editing", len(models) * len(config.covariances))
    sweeps = []
    for base in models:
        edits = [edit for form in ("first", "mid") for edit in base.edits(form, config.edits)]
        measures = _measures(config, base)
        for kind in config.covariances:
            sweeps += _sweeps(config, base, measures, kind, edits)
            progress.step(1)
    progress.done()
    return report(config, sweeps)


def _measures(config: CollapseSignalsConfig, base: Base) -> _Measures:
    probe = base.probe(("mixture", "text"), config.probe_rows)
    tasks = base.tasks(base.subjects(config.edits))
    before = state_of(base.net, base.params, probe, tasks, convention=config.convention)
    layers = (config.settings.rome.layer, config.settings.c_rome.layer)
    guard = statistics_of(base, base.net, base.params, "mixture", layers, config.covariance_rows, held_out=True)
    return _Measures(probe, tasks, before, guard)


def _sweeps(
    config: CollapseSignalsConfig, base: Base, measures: _Measures, kind: str, edits: Sequence[PreparedEdit]
) -> list[Sweep]:
    """All edits by every editor with one kind of covariances."""
    layers = config.settings.layers
    statistics = statistics_of(base, base.net, base.params, kind, layers, config.covariance_rows)
    found, values = [], {}
    for name in config.editors:
        editor: Any = config.settings.of(name)
        search = (editor.layer, editor.value)
        if search not in values:
            values[search] = editor.solve(base.net, base.params, edits)
        results = candidate_edits(editor, base.net, base.params, edits, statistics, values[search])
        deltas = [result.delta for result in results]
        scores = side_scores(base.net, base.params, deltas, measures.tasks)
        kept = {task: scores[task] / score for task, score in measures.before.tasks.items() if score > 0}
        signals = _signals(config, base, measures, editor.layer, deltas)
        signals["inverse_denominator"] = np.asarray([1 / abs(result.info.denominator[0]) for result in results])
        total = retained(scores, measures.before.tasks)
        found.append(Sweep(base.seed, kind, name, {key: signals[key] for key in SIGNALS}, total, kept))
    return found


def _signals(
    config: CollapseSignalsConfig, base: Base, measures: _Measures, layer: int, deltas: Sequence[Delta]
) -> dict[str, np.ndarray]:
    """What may tell that a model is broken; of all of them more is worse."""
    net, params = base.net, base.params
    losses = side_losses(net, params, deltas, measures.probe)
    changes = [change for delta in deltas for change in delta.values()]
    plain = Statistics.of(net, params, None)
    return {
        **{
            f"{name}_ppl": np.asarray(perplexity_of(losses[name], config.convention)) / measures.before.perplexity[name]
            for name in ("mixture", "text")
        },
        "mixture_kl": side_kl(net, params, deltas, {"mixture": measures.probe["mixture"]})["mixture"],
        "energy": np.asarray([measures.guard.energy(layer, change) for change in changes]),
        "norm": np.asarray([plain.energy(layer, change) for change in changes]),
    }


EXPERIMENT = Experiment(CollapseSignalsConfig, run)
