"""Edits of a model in files, one after the other under guard: what is refused leaves the model as it was."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from permjax.edit.base import Cache, EditResult
from permjax.edit.delta import Delta, apply_delta, compose, save_delta
from permjax.edit.evaluate import Scores, evaluate
from permjax.experiments.edit_files import Job
from permjax.experiments.edit_options import EditOptions
from permjax.experiments.guard_files import as_stored
from permjax.experiments.progress import Progress
from permjax.io.checkpoint import save_checkpoint
from permjax.merge.guard import GuardReport
from permjax.merge.guard_limits import Limits
from permjax.merge.guarded import Attempt, Watch, guarded_apply

_ANY = Limits(perplexity=math.inf)


class Change(NamedTuple):
    """Edits that were written together, or refused.

    Attributes:
        first: the number of the first of them.
        attempts: the editors that were tried.
        result: of the editor that was accepted; None where all were refused.
        scores: of these edits in the model just after them.
        seconds: all this took, measuring left out.
    """

    first: int
    attempts: tuple[Attempt, ...]
    result: EditResult | None
    scores: Scores
    seconds: float

    @property
    def accepted(self) -> str | None:
        """The name of the editor whose change was taken, if any."""
        return next((one.name for one in self.attempts if one.accepted), None)


class Edited(NamedTuple):
    """A model after all edits that were accepted.

    Attributes:
        params: its weights, as they are stored but in float32.
        delta: the one change.
        changes: step by step.
        before: how all edits fare in the model as it was.
        after: how they fare in this one.
        report: what all edits together do, by the signs of the guard; without one, only whether weights are finite.
    """

    params: dict[str, Any]
    delta: Delta
    changes: tuple[Change, ...]
    before: Scores
    after: Scores
    report: GuardReport


def edit_under_guard(job: Job, options: EditOptions, progress: Progress) -> Edited:
    """Write the edits one after the other, each by the first editor whose change the guard accepts."""
    base, asked = job.files.params, job.edits.asked
    watch = _watch(job, options)
    before = _scores(job, base)
    params, deltas, changes = base, [], []
    caches: dict[str, Cache | None] = {}
    progress.start("editing", len(asked))
    for first in range(0, len(asked), options.batch):
        chosen = slice(first, first + options.batch)
        params, change = _step(job, watch, params, chosen, caches)
        if change.result is not None:
            deltas.append(change.result.delta)
        changes.append(change)
        progress.step(len(asked[chosen]), accepted=len(deltas))
    progress.done()
    report = watch.report(base, params, _ANY)
    return Edited(params, compose(*deltas), tuple(changes), before, _scores(job, params), report)


def _watch(job: Job, options: EditOptions) -> Watch:
    most = math.inf if options.guard_energy is None else options.guard_energy
    each, total = Limits(energy=most, perplexity=options.guard_each), Limits(perplexity=options.guard_limit)
    return Watch(job.files.net.apply, job.probe, job.moments, each=each, total=total)


def _scores(job: Job, params: Mapping[str, Any]) -> Scores:
    return evaluate(job.files.net, params, job.edits.asked, probes=job.edits.others, before=job.files.params)


def _step(job: Job, watch: Watch, params: Any, chosen: slice, caches: dict[str, Cache | None]) -> tuple[Any, Change]:
    """One step; what the editor that is taken remembers goes into its cache."""
    made: dict[str, EditResult] = {}
    ways = {name: partial(_written, job, name, chosen, caches.get(name), made) for name in job.editors}
    begin = perf_counter()
    done = guarded_apply(watch, params, ways, base=job.files.params)
    seconds = perf_counter() - begin
    result = None if done.accepted is None else made[done.accepted]
    if done.accepted is not None:
        caches[done.accepted] = made[done.accepted].cache
    scores = evaluate(job.files.net, done.params, job.edits.asked[chosen])
    return done.params, Change(chosen.start, done.attempts, result, scores, seconds)


def _written(
    job: Job, name: str, chosen: slice, cache: Cache | None, made: dict[str, EditResult], params: Any
) -> dict[str, Any]:
    """The parameters after the edits of one step by one editor, rounded as they will be in the file."""
    edits: Sequence[Any] = job.edits.written[name][chosen]
    made[name] = job.editors[name](job.files.net, params, edits, covariances=job.statistics, cache=cache)
    changed = apply_delta(params, made[name].delta)
    return changed | as_stored({leaf: changed[leaf] for leaf in made[name].delta}, job.files.checkpoint)


def save_edited(job: Job, edited: Edited, out: Path) -> None:
    """Write the model with the names, dtypes, configuration and tokenizer that it had, and the change beside it.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    leaves = {name: edited.params[name] for name in edited.delta}
    save_checkpoint(out, {**job.files.checkpoint, **leaves}, like=job.files.checkpoint)
    save_delta(out / "delta.safetensors", edited.delta)
