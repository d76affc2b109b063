"""Single edits that break a model: many candidates of five editors on one base whose first token is set apart."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from permjax.edit.base import Statistics, cosine
from permjax.edit.collapse import (
    candidate_edits,
    shift_first_token,
    side_efficacy,
    side_losses,
    unit_direction,
)
from permjax.edit.places import mlp_place
from permjax.edit.prepare import PreparedEdit
from permjax.edit.values import Value, observe
from permjax.experiments.collapse_base import Base, OnBasesConfig, statistics_of
from permjax.experiments.collapse_editors import check_editors
from permjax.experiments.collapse_single_report import Arm, Cell, report
from permjax.experiments.language_networks import Layout
from permjax.experiments.registry import Experiment
from permjax.merge.perplexity import group_losses, perplexity_of
from permjax.nets.base import Net
from permjax.report import Outcome

_MATCHED = ("rome", "c_rome")  # editors that are also given the controls


@dataclass(frozen=True)
class CollapseSingleConfig(OnBasesConfig):
    """Single edits of a model whose first token is set apart; more settings are those of `OnBasesConfig`.

    Attributes:
        layouts: of the models; keys of metrics begin with the layout for all but the first.
        editors: which of them to run.
        edits: hard edits in each direction, and as many controls for ROME and C-ROME.
        gamma: the strength of what is added at the first token.
        gammas: strengths at which denominators are told.
        directions: how many random vectors are added in turn, each in a model of its own.
        covariance: the mixture of the covariances, or `identity`.
    """

    experiment: ClassVar[str] = "collapse_single"
    layouts: tuple[Layout, ...] = ("gpt2", "llama")
    editors: tuple[str, ...] = ("rome", "c_rome", "memit", "alphaedit", "ft_l")
    edits: int = 24
    gamma: float = 8.0
    gammas: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)
    directions: int = 5
    covariance: str = "mixture"

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        check_editors(self.editors)
        if min(self.edits, self.directions) < 1 or not self.layouts:
            raise ValueError("layouts must be one or more, and edits and directions at least 1.")


def run(config: CollapseSingleConfig, out: Path, progress: Any) -> Outcome:
    """Run the experiment.

    Args:
        config: what to do.
        out: folder of the run; training keeps its state in `out/state`, so that an interrupted run goes on.
        progress: told about training and edits.

    Returns:
        Metrics, tables and figures.
    """
    cells = []
    for layout in config.layouts:
        models = config.trained(layout, out, progress)
        progress.start(f"editing, {layout}", len(models) * config.directions)
        for base in models:
            for number in range(config.directions):
                cells.append(_cell(config, base, number))
                progress.step(1)
        progress.done()
    return report(config, cells)


class _Shifted(NamedTuple):
    """A base whose first token is set apart, with what all editors share."""

    net: Net
    params: Any
    statistics: Statistics
    probe: Any
    before: float


def _cell(config: CollapseSingleConfig, base: Base, number: int) -> Cell:
    """All edits of one base in one direction."""
    direction = unit_direction(config.base.size.width, number)
    shifted = _shifted(config, base, direction, config.gamma)
    hard, control = (base.edits(form, config.edits) for form in ("first", "mid"))
    arms = _arms(config, shifted, config.editors, hard)
    matched = [name for name in config.editors if name in _MATCHED]
    doses = {gamma: _dose(config, base, direction, gamma, hard) for gamma in config.gammas}
    return Cell(base.layout, base.seed, number, shifted.before, arms, _arms(config, shifted, matched, control), doses)


def _shifted(config: CollapseSingleConfig, base: Base, direction: np.ndarray, gamma: float) -> _Shifted:
    net, params = shift_first_token(base.net, base.params, direction, gamma)
    probe = base.probe(("mixture",), config.probe_rows)
    before = float(perplexity_of(group_losses(net.apply, params, probe)["mixture"], config.convention))
    statistics = statistics_of(base, net, params, config.covariance, config.settings.layers, config.covariance_rows)
    return _Shifted(net, params, statistics, probe, before)


def _arms(
    config: CollapseSingleConfig, shifted: _Shifted, names: Sequence[str], edits: Sequence[PreparedEdit]
) -> dict[str, Arm]:
    """What each editor makes of the edits; editors with the same search share what it finds."""
    found: dict[Any, tuple[Value | None, float]] = {}
    arms = {}
    for name in names:
        editor = config.settings.of(name)
        search = _search(editor)
        if search not in found:
            editor.solve(shifted.net, shifted.params, edits[:1])  # compiles
            begin = time.perf_counter()
            found[search] = editor.solve(shifted.net, shifted.params, edits), time.perf_counter() - begin
        values, seconds = found[search]
        arms[name] = _arm(config, shifted, editor, edits, values, seconds)
    return arms


def _search(editor: Any) -> Any:
    """What two editors have in common that search for the same values."""
    return tuple(vars(editor).get(name) for name in ("value", "layer", "layers"))


def _arm(
    config: CollapseSingleConfig,
    shifted: _Shifted,
    editor: Any,
    edits: Sequence[PreparedEdit],
    values: Value | None,
    seconds: float,
) -> Arm:
    net, params = shifted.net, shifted.params
    one = None if values is None else values.one(0)
    editor(net, params, edits[:1], covariances=shifted.statistics, values=one)  # compiles
    begin = time.perf_counter()
    results = candidate_edits(editor, net, params, edits, shifted.statistics, values)
    seconds += time.perf_counter() - begin
    deltas = [result.delta for result in results]
    losses = side_losses(net, params, deltas, shifted.probe)["mixture"]
    return Arm(
        np.asarray(perplexity_of(losses, config.convention)),
        side_efficacy(net, params, deltas, edits),
        np.asarray([np.max(result.info.energy) for result in results]),
        _denominators([result.info for result in results]),
        seconds / len(edits),
    )


def _denominators(infos: Sequence[Any]) -> np.ndarray | None:
    """The denominators of ROME's changes; other editors have none."""
    if not hasattr(infos[0], "denominator"):
        return None
    return np.abs([info.denominator[0] for info in infos])


def _dose(
    config: CollapseSingleConfig, base: Base, direction: np.ndarray, gamma: float, edits: Sequence[PreparedEdit]
) -> Mapping[str, float]:
    """Median denominators of ROME and C-ROME, and the cosine of their keys, at one strength; no value is searched."""
    net, params = shift_first_token(base.net, base.params, direction, gamma)
    layer = config.settings.rome.layer
    statistics = statistics_of(base, net, params, config.covariance, (layer,), config.covariance_rows)
    keys = np.asarray(observe(net, params, edits, [mlp_place(net.config, layer)]).keys[0], np.float64)
    bare, mean = keys[:, 0], keys.mean(axis=1)
    ways = statistics.inverse(layer, mean.T, ridge=config.settings.rome.ridge).T
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    mixed, own = (np.abs(np.sum(ways * key, axis=1)) for key in (bare, mean))
    found = {"rome": mixed, "c_rome": own, "cosine": cosine(bare, mean)}
    return {name: float(np.median(values)) for name, values in found.items()}


EXPERIMENT = Experiment(CollapseSingleConfig, run)
