"""Edits of any checkpoint: each by itself on a side path, and some in a row, without a guard and with one."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from permjax.edit.apply import edit_sequence
from permjax.edit.collapse import Efficacy, candidate_edits, side_efficacy, side_losses
from permjax.edit.delta import Delta, apply_delta
from permjax.edit.evaluate import evaluate
from permjax.edit.values import Value
from permjax.experiments.edit_hf_config import EditHfConfig
from permjax.experiments.edit_hf_files import Cases, Job, opened
from permjax.experiments.edit_hf_report import Arm, Found, Stream, report
from permjax.experiments.registry import Experiment
from permjax.files import atomic_path
from permjax.merge.guard_limits import Limits
from permjax.merge.guarded import Watch, guarded_apply
from permjax.merge.perplexity import group_losses, joined, perplexity_of
from permjax.report import Outcome

_KINDS = Efficacy._fields
_TOGETHER = 16  # edits whose changes are in memory together


def run(config: EditHfConfig, out: Path, progress: Any) -> Outcome:
    """Run the experiment.

    Args:
        config: what to do.
        out: folder of the run; `out/state` keeps the single edits of each editor, so that an interrupted run goes on.
        progress: told about edits.

    Returns:
        Metrics, tables and figures.

    Raises:
        ValueError: files that do not fit; names them.
    """
    job = opened(config)
    arms = {}
    for kind, cases in job.cases.items():
        progress.start(f"single edits, {kind}", len(cases.requests) * len(config.editors))
        arms[kind] = _arms(config, job, cases, out / "state" / kind, progress)
        progress.done()
    streams, guarded = {}, None
    first = next(iter(job.cases.values())).first(config.sequence)
    if config.sequence:
        progress.start("edits in a row", len(first.requests) * (len(config.editors) + 1))
        streams = {name: _stream(config, job, first, _written(job, first, name), progress) for name in config.editors}
        guarded = _stream(config, job, first, _guarded(config, job, first), progress)
        progress.done()
    counts = {kind: len(cases.requests) for kind, cases in job.cases.items()}
    found = Found(job.source, counts, job.skipped, _perplexity(config, job, job.files.params), arms, streams, guarded)
    return report(config, found)


def _perplexity(config: EditHfConfig, job: Job, params: Any) -> float:
    losses = joined([*group_losses(job.files.net.apply, params, job.probe).values()])
    return float(perplexity_of(losses, config.convention))


# each by itself


def _arms(config: EditHfConfig, job: Job, cases: Cases, folder: Path, progress: Any) -> dict[str, Arm]:
    """What every editor makes of the edits; editors with the same search share what it finds."""
    known: dict[Any, tuple[Value | None, float]] = {}
    arms = {}
    for name in config.editors:
        path = folder / f"{name}.npz"
        if not path.is_file():
            _keep(path, _arm(config, job, cases, name, known, progress))
        with np.load(path) as kept:
            arms[name] = Arm(**kept)
    return arms


def _keep(path: Path, arm: Arm) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arm._asdict())


def _arm(config: EditHfConfig, job: Job, cases: Cases, name: str, known: dict[Any, Any], progress: Any) -> Arm:
    """What one editor makes of the edits, some at a time, so that not all changes are in memory together."""
    parts = []
    for rows in np.array_split(np.arange(len(cases.requests)), -(-len(cases.requests) // _TOGETHER)):
        parts.append(_piece(config, job, cases, name, rows.tolist(), known))
        progress.step(len(rows))
    return Arm(*map(np.concatenate, zip(*parts, strict=True)))


def _piece(
    config: EditHfConfig, job: Job, cases: Cases, name: str, rows: Sequence[int], known: dict[Any, Any]
) -> tuple[np.ndarray, ...]:
    """The fields of an `Arm` for some edits."""
    net, params, editor = job.files.net, job.files.params, job.editors[name]
    edits = [cases.written[name][row] for row in rows]
    search = (*(vars(editor).get(part) for part in ("value", "layer", "layers")), *rows)
    begin = perf_counter()
    if search not in known:
        known[search] = editor.solve(net, params, edits, chunk=config.chunk), perf_counter() - begin
        begin = perf_counter()
    values, seconds = known[search]
    results = candidate_edits(editor, net, params, edits, job.statistics, values)
    seconds += perf_counter() - begin
    infos, deltas = [result.info for result in results], [result.delta for result in results]
    return (
        _perplexities(config, job, deltas),
        *side_efficacy(net, params, deltas, [cases.asked[row] for row in rows], chunk=config.chunk),
        np.asarray([np.max(info.energy) for info in infos]),
        *(_told(infos, what) for what in ("denominator", "cosine")),
        np.full(len(rows), seconds / len(rows)),
    )


def _perplexities(config: EditHfConfig, job: Job, deltas: Sequence[Delta]) -> np.ndarray:
    losses = side_losses(job.files.net, job.files.params, deltas, job.probe, chunk=config.chunk)
    return np.asarray(perplexity_of(joined([*losses.values()]), config.convention))


def _told(infos: Sequence[Any], what: str) -> np.ndarray:
    """What ROME tells of a single edit; other editors do not."""
    return np.asarray([abs(float(getattr(info, what)[0])) if hasattr(info, what) else np.nan for info in infos])


# one after the other


def _stream(
    config: EditHfConfig, job: Job, cases: Cases, models: Iterator[tuple[Any, str | None]], progress: Any
) -> Stream:
    """A model after each edit of a row, measured at the checkpoints."""
    points, ways, params = {}, [], job.files.params
    for count, (changed, way) in enumerate(models, 1):
        params = changed
        ways.append(way)
        if count in config.checkpoints or count == len(cases.requests):
            points[count] = _perplexity(config, job, params)
        progress.step(1)
    scores = evaluate(job.files.net, params, cases.asked[: len(ways)])
    return Stream(points, {kind: float(np.mean(getattr(scores, kind))) for kind in _KINDS}, tuple(ways))


def _written(job: Job, cases: Cases, name: str) -> Iterator[tuple[Any, str | None]]:
    edits = cases.written[name]
    for step in edit_sequence(job.editors[name], job.files.net, job.files.params, edits, covariances=job.statistics):
        yield step.params, name


def _guarded(config: EditHfConfig, job: Job, cases: Cases) -> Iterator[tuple[Any, str | None]]:
    """The model after each edit, by the first editor that the guard accepts, if any."""
    each, total = Limits(perplexity=config.guard_each), Limits(perplexity=config.guard_limit)
    watch = Watch(job.files.net.apply, job.guard, each=each, total=total)
    params = job.files.params
    for row in range(len(cases.requests)):
        ways = {name: partial(_changed, job, cases, name, row) for name in config.editors}
        done = guarded_apply(watch, params, ways, base=job.files.params)
        params = done.params
        yield params, done.accepted


def _changed(job: Job, cases: Cases, name: str, row: int, params: Any) -> dict[str, Any]:
    edit = [cases.written[name][row]]
    return apply_delta(params, job.editors[name](job.files.net, params, edit, covariances=job.statistics).delta)


EXPERIMENT = Experiment(EditHfConfig, run)
