"""A stream of edits under guard: limits are learnt from safe edits of other subjects, on text of their own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from permjax.edit.apply import edit_independent
from permjax.edit.base import Editor, Statistics
from permjax.edit.collapse import State, retained, side_scores
from permjax.edit.covariance import collect_covariances
from permjax.edit.delta import apply_delta
from permjax.edit.places import mlp_place
from permjax.edit.prepare import PreparedEdit, Scored
from permjax.experiments.collapse_base import Base, batches
from permjax.experiments.collapse_editors import EditorsConfig
from permjax.merge.energy import InputMoment
from permjax.merge.guard import GuardReport, accepted, check_change
from permjax.merge.guard_limits import Limits, calibrate_limits
from permjax.merge.guarded import GuardedRun, Watch, guarded_sequence

_TEXT = 4  # the seed of the guard's rows
_GROUPS = ("text", "facts", "sums")


@dataclass(frozen=True)
class GuardConfig:
    """How the guard of a stream is made.

    Attributes:
        covariances: of the guarded streams: kinds of mixtures, or `identity`.
        ways: editors that are tried in turn for each edit.
        safe: the editor whose single edits the limits are learnt from.
        calibration: edits to learn from, and as many to count false refusals on; of those only the safe ones count.
        keeps: the share of all tasks that a model retains after a safe edit, at least.
        quantile: the share of safe edits that passes.
        slack: how many times that much passes; see `calibrate_limits`.
        total: the largest perplexity of a group after all edits, as a multiple of that of the base.
        rows: held-out rows of each group of sentences.
    """

    covariances: tuple[str, ...] = ("mixture", "identity")
    ways: tuple[str, ...] = ("rome", "c_rome", "memit")
    safe: str = "c_rome"
    calibration: int = 44
    keeps: float = 0.9
    quantile: float = 0.99
    slack: float = 1.5
    total: float = 1.5
    rows: int = 32


class GuardedStream(NamedTuple):
    """What became of a guarded stream.

    Attributes:
        params: after it.
        ways: editor that was accepted for each edit; None where all were refused.
        safe: how many edits the limits were learnt from.
        false_refusals: the share of other safe edits that they refuse.
    """

    params: Any
    ways: tuple[str | None, ...]
    safe: int
    false_refusals: float


class _Judge(NamedTuple):
    """What it takes to tell safe edits."""

    base: Base
    editor: Editor
    statistics: Statistics
    tasks: Mapping[str, Scored]
    state: State


def guarded_stream(
    config: GuardConfig,
    editors: EditorsConfig,
    base: Base,
    edits: Sequence[PreparedEdit],
    statistics: Statistics,
    tasks: Mapping[str, Scored],
    state: State,
) -> GuardedStream:
    """Make edits one after the other, each by the first editor that the guard accepts.

    Args:
        config: of the guard.
        editors: their hyper-parameters.
        base: the model.
        edits: the stream; the edits after it in the order of the world are those the limits are learnt from.
        statistics: of the base.
        tasks: that tell which edits are safe; the guard itself does not see them.
        state: of the base.
    """
    judge = _Judge(base, editors.of(config.safe), statistics, tasks, state)
    watch = _watch(base, config, editors.layers)
    learnt, other = (_safe_reports(judge, watch, config, len(edits) + number * config.calibration) for number in (0, 1))
    if not learnt:
        message = f"None of {config.calibration} single edits by {config.safe} keeps {config.keeps:g} of the tasks; "
        raise ValueError(message + "lower `guard.keeps`, or take another editor for `guard.safe`.")
    each = calibrate_limits(learnt, quantile=config.quantile, slack=config.slack)
    refused = [not bool(accepted(report, each)) for report in other]
    watch = replace(watch, each=each, total=Limits(perplexity=config.total))
    ways = {name: editors.of(name) for name in config.ways}
    run: GuardedRun = guarded_sequence(watch, base.params, (_attempts(base, ways, edit, statistics) for edit in edits))
    return GuardedStream(run.params, run.accepted, len(learnt), float(np.mean(refused)) if refused else float("nan"))


def _watch(base: Base, config: GuardConfig, layers: Sequence[int]) -> Watch:
    """What the guard looks at: its own rows of each kind, and moments over rows of the mixture."""
    rows = batches(base.rows("mixture", config.rows, _TEXT, held_out=True))
    moments = {}
    for layer, one in collect_covariances(base.net, base.params, rows, layers).items():
        place = mlp_place(base.net.config, layer)
        moments[place.weight] = InputMoment(one.matrix.astype(np.float32), (0 if place.orientation == "in_out" else 1,))
    return Watch(base.net.apply, base.probe(_GROUPS, config.rows, seed=_TEXT), moments)


def _safe_reports(judge: _Judge, watch: Watch, config: GuardConfig, start: int) -> list[GuardReport]:
    """Reports of single edits after which the model retains enough, half of them hard and half controls."""
    base, half = judge.base, config.calibration // 2
    edits = [edit for form, at in (("first", 0), ("mid", half)) for edit in base.edits(form, half, start=start + at)]
    deltas = edit_independent(judge.editor, base.net, base.params, edits, covariances=judge.statistics).deltas
    kept = retained(side_scores(base.net, base.params, deltas, judge.tasks), judge.state.tasks)
    return [
        check_change(watch.apply, base.params, apply_delta(base.params, delta), watch.probe, moments=watch.moments)
        for delta, share in zip(deltas, kept, strict=True)
        if share >= config.keeps
    ]


def _attempts(
    base: Base, ways: Mapping[str, Editor], edit: PreparedEdit, statistics: Statistics
) -> dict[str, Callable[[Any], Any]]:
    def change(editor: Editor, params: Any) -> Any:
        return apply_delta(params, editor(base.net, params, [edit], covariances=statistics).delta)

    return {name: partial(change, editor) for name, editor in ways.items()}
