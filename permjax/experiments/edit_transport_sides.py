"""One model of a pair: edits that are made in it, and what edits do there, wherever they come from."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from permjax.edit.base import Statistics, cosine
from permjax.edit.collapse import Efficacy, candidate_edits, side_efficacy, side_losses, stacked_deltas
from permjax.edit.delta import Delta, scale, side_path
from permjax.edit.prepare import PreparedEdit
from permjax.edit.values import target_nll
from permjax.experiments.collapse_base import Base, statistics_of
from permjax.experiments.edit_transport_report import Arm
from permjax.merge.perplexity import Probe, group_losses, perplexity_of
from permjax.nets.base import Net
from permjax.nets.language import widen


class Shared(NamedTuple):
    """What all models have in common: the configuration, the edits, and held-out text to measure perplexity on."""

    config: Any
    edits: Sequence[PreparedEdit]
    probe: Probe


class Side(NamedTuple):
    """One model with the edits that were made in it.

    Attributes:
        base: the model.
        statistics: of its keys.
        perplexity: before any edit.
        untouched: which targets are right before any edit.
        nll: `-log P` of the targets before any edit.
        keys: layer -> the mean key of every edit's rows.
        deltas: editor -> a change for every edit.
    """

    base: Base
    statistics: Statistics
    perplexity: float
    untouched: Efficacy
    nll: Float[np.ndarray, " edits"]
    keys: Mapping[int, Float[np.ndarray, "edits m"]]
    deltas: Mapping[str, Sequence[Delta]]


def side_of(shared: Shared, base: Base) -> Side:
    """Make all edits in one model, each by itself."""
    config, net, params = shared.config, base.net, base.params
    statistics = statistics_of(base, net, params, config.covariance, config.settings.layers, config.covariance_rows)
    losses = group_losses(net.apply, params, shared.probe)["mixture"]
    keys, deltas, values = {}, {}, {}
    for name in config.editors:
        editor = config.settings.of(name)
        search = (editor.layer, editor.value)
        if search not in values:
            values[search] = editor.solve(net, params, shared.edits)
        keys[editor.layer] = np.asarray(values[search].keys, np.float64).mean(axis=1)
        results = candidate_edits(editor, net, params, shared.edits, statistics, values[search])
        deltas[name] = [result.delta for result in results]
    nothing = [scale(delta, 0) for delta in deltas[config.editors[0]]]
    untouched = side_efficacy(net, params, nothing, shared.edits)
    perplexity = float(perplexity_of(losses, config.convention))
    return Side(base, statistics, perplexity, untouched, _nll(shared, base, nothing), keys, deltas)


def arm_of(shared: Shared, side: Side, name: str, deltas: Sequence[Delta]) -> Arm:
    """What changes do in a model.

    Args:
        shared: edits and text.
        side: the model.
        name: of the editor that made the changes, here or in another model.
        deltas: a change for every edit.
    """
    config, net, params = shared.config, side.base.net, side.base.params
    layer = config.settings.of(name).layer
    losses = side_losses(net, params, deltas, shared.probe)["mixture"]
    return Arm(
        side_efficacy(net, params, deltas, shared.edits),
        side.nll - _nll(shared, side.base, deltas),
        np.asarray(perplexity_of(losses, config.convention)) / side.perplexity,
        np.asarray([side.statistics.energy(layer, change) for delta in deltas for change in delta.values()]),
        np.sum(_factors(deltas, "v") * side.keys[layer], axis=1),
        cosine(_factors(deltas, "u"), _factors(side.deltas[name], "u")),
    )


def _factors(deltas: Sequence[Delta], part: str) -> Float[np.ndarray, "edits n"]:
    """One of the two vectors of every change of rank one."""
    return np.stack([np.asarray(getattr(change, part))[:, 0] for delta in deltas for change in delta.values()])


def _nll(shared: Shared, base: Base, deltas: Sequence[Delta]) -> Float[np.ndarray, " edits"]:
    """`-log P` of every target after its bare prompt, the mean over its tokens, each in the model with its own edit."""
    tokens, targets = (np.stack([getattr(edit, part)[:1] for edit in shared.edits]) for part in ("tokens", "targets"))
    return np.asarray(_asked(base.net)(base.params, stacked_deltas(deltas), tokens, targets), np.float64)


@cache
def _asked(net: Net) -> Callable[..., Array]:
    """Return what asks each edited model for its own target; one function for a network, compiled once."""

    def ask(params: Any, deltas: Any, tokens: Array, targets: Array) -> Array:
        def one(asked: tuple[Any, Array, Array]) -> Array:
            delta, tokens, targets = asked
            logits = net.apply(params, tokens, hook=side_path(net, delta))
            return target_nll(widen(logits), targets)[0]

        return jax.lax.map(one, (deltas, tokens, targets))

    return jax.jit(ask)
