"""Many edits one after the other: when each editor breaks a model, on hard and normal streams, and under guard."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from permjax.edit.apply import edit_sequence
from permjax.edit.base import Editor, Statistics
from permjax.edit.collapse import State, state_of
from permjax.edit.evaluate import Scores, evaluate
from permjax.edit.prepare import PreparedEdit, Scored
from permjax.experiments.collapse_base import Base, OnBasesConfig, statistics_of
from permjax.experiments.collapse_editors import check_editors
from permjax.experiments.collapse_guard import GuardConfig, guarded_stream
from permjax.experiments.collapse_sequential_report import Guard, Point, Run, Stream, report
from permjax.experiments.language_networks import Layout
from permjax.experiments.registry import Experiment
from permjax.merge.perplexity import Convention, Probe
from permjax.report import Outcome

_FORMS: Mapping[str, Any] = {"hard": "first", "normal": "mid"}


@dataclass(frozen=True)
class CollapseSequentialConfig(OnBasesConfig):
    """Streams of edits; more settings are those of `OnBasesConfig`.

    Attributes:
        layout: of the models.
        editors: which of them to run.
        edits: of a stream.
        checkpoints: numbers of edits after which the model is measured; the last is that of the stream.
        streams: `hard` and `normal`: the same facts, with the subject at the start or in the middle.
        covariances: mixtures of the covariances, or `identity`, which AlphaEdit cannot use. Keys of metrics name the
            stream and the covariances, but for the first of each.
        guard: of the hard stream.
    """

    experiment: ClassVar[str] = "collapse_sequential"
    layout: Layout = "llama"
    editors: tuple[str, ...] = ("rome", "c_rome", "memit", "alphaedit", "ft_l")
    edits: int = 60
    checkpoints: tuple[int, ...] = (1, 10, 20, 30, 60)
    streams: tuple[Literal["hard", "normal"], ...] = ("hard", "normal")
    covariances: tuple[str, ...] = ("mixture", "identity")
    guard: GuardConfig = GuardConfig()

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        for names in (self.editors, self.guard.ways, (self.guard.safe,)):
            check_editors(names)
        points = self.checkpoints
        if not points or list(points) != sorted({*points}) or points[0] < 1 or points[-1] != self.edits:
            message = f"checkpoints {list(points)} must ascend from 1 or more to the number of edits, {self.edits}."
            raise ValueError(message)
        needed = self.edits + 2 * self.guard.calibration
        if needed > self.base.world.short_names:
            message = f"the stream and the guard need {needed} short names, but the world has "
            raise ValueError(f"{message}{self.base.world.short_names}.")
        if not self.streams or not self.covariances:
            raise ValueError("streams and covariances must be one or more.")
        guard = self.guard
        compared = "hard" in self.streams and guard.ways[0] in self.editors
        if not compared or not {*guard.covariances} <= {*self.covariances}:
            message = f"the guard is compared with hard edits by {guard.ways[0]} and covariances from "
            raise ValueError(f"{message}{', '.join(guard.covariances)}, which must be among those without a guard.")


class _Measures(NamedTuple):
    """What is asked of the models of one base, and what the base answers."""

    probe: Probe
    tasks: Mapping[str, Scored]
    convention: Convention
    before: State

    def point(self, base: Base, params: Any, edits: Sequence[PreparedEdit]) -> Point:
        """A model after edits."""
        state = state_of(base.net, params, self.probe, self.tasks, convention=self.convention)
        found: Scores = evaluate(base.net, params, edits)
        efficacy = {kind: float(np.mean(getattr(found, kind))) for kind in ("bare", "prefixed", "free")}
        ppl = state.perplexity["mixture"]
        return Point(ppl, ppl / self.before.perplexity["mixture"], state.retained(self.before), efficacy)


def run(config: CollapseSequentialConfig, out: Path, progress: Any) -> Outcome:
    """Run the experiment.

    Args:
        config: what to do.
        out: folder of the run; training keeps its state in `out/state`, so that an interrupted run goes on.
        progress: told about training and edits.

    Returns:
        Metrics, tables and figures.
    """
    models = config.trained(config.layout, out, progress)
    runs, guards = [], []
    for base in models:
        measures = _measures(config, base)
        for kind in config.covariances:
            statistics = statistics_of(
                base, base.net, base.params, kind, config.settings.layers, config.covariance_rows
            )
            runs += _runs(config, base, measures, kind, statistics, progress)
            if kind in config.guard.covariances:
                guards.append(_guard(config, base, measures, kind, statistics, progress))
    return report(config, runs, guards)


def _measures(config: CollapseSequentialConfig, base: Base) -> _Measures:
    probe = base.probe(("mixture",), config.probe_rows)
    tasks = base.tasks(base.subjects(config.edits + 2 * config.guard.calibration))
    before = state_of(base.net, base.params, probe, tasks, convention=config.convention)
    return _Measures(probe, tasks, config.convention, before)


def _runs(
    config: CollapseSequentialConfig, base: Base, measures: _Measures, kind: str, statistics: Statistics, progress: Any
) -> list[Run]:
    """Every editor on every stream with one kind of covariances."""
    found = []
    for stream in config.streams:
        edits = base.edits(_FORMS[stream], config.edits)
        for name in config.editors:
            if kind == "identity" and name == "alphaedit":
                continue
            progress.start(f"{name}, {stream} edits, {kind}, base {base.seed}", len(edits))
            editor = config.settings.of(name)
            points, seconds = _curve(config, base, measures, editor, edits, statistics, progress)
            found.append(Run(Stream(stream, kind), name, base.seed, points, seconds))
            progress.done()
    return found


def _curve(
    config: CollapseSequentialConfig,
    base: Base,
    measures: _Measures,
    editor: Editor,
    edits: Sequence[PreparedEdit],
    statistics: Statistics,
    progress: Any,
) -> tuple[dict[int, Point], float]:
    """The model at the checkpoints, and seconds per edit."""
    points, spent = {}, []
    begin = time.perf_counter()
    for step in edit_sequence(editor, base.net, base.params, edits, covariances=statistics):
        spent.append(time.perf_counter() - begin)
        if step.count in config.checkpoints:
            points[step.count] = measures.point(base, step.params, edits[: step.count])
            progress.step(0, ratio=f"{points[step.count].ratio:.3g}")
        progress.step(1)
        begin = time.perf_counter()
    return points, float(np.median(spent))


def _guard(
    config: CollapseSequentialConfig, base: Base, measures: _Measures, kind: str, statistics: Statistics, progress: Any
) -> Guard:
    """The hard stream under guard."""
    edits = base.edits("first", config.edits)
    progress.start(f"guarded edits, {kind}, base {base.seed}", 1)
    found = guarded_stream(config.guard, config.settings, base, edits, statistics, measures.tasks, measures.before)
    progress.done()
    return Guard(
        kind, base.seed, measures.point(base, found.params, edits), found.ways, found.safe, found.false_refusals
    )


EXPERIMENT = Experiment(CollapseSequentialConfig, run)
