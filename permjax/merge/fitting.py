"""Solving one layer: from its statistics to the leaves that hold it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from math import prod
from operator import add
from typing import Any, NamedTuple

import numpy as np

from permjax.merge.contraction import Piece
from permjax.merge.gram import Gram
from permjax.merge.layer import Layer
from permjax.merge.ridge import Blocks, choose_ridge, default_ridge, residual, solve


class LayerFit(NamedTuple):
    """How one layer was fitted.

    Attributes:
        leaf: its name.
        before: mean squared error of the weights that were there, over the variance of the targets.
        after: the same of the fitted ones, on the same samples.
        ridge: weight of the prior, relative to the mean square of the inputs.
        rows: number of equations.
        unknowns: number of unknowns of one output.
        rank_deficient: whether the inputs left the solution open, so that the nearest to the prior was taken.
    """

    leaf: str
    before: float
    after: float
    ridge: float
    rows: int
    unknowns: int
    rank_deficient: bool


def fitted(
    layer: Layer, grams: tuple[Gram, ...], held: tuple[Gram, ...], named: Mapping[str, Any], ridge: float | int | str
) -> tuple[LayerFit, dict[str, Any]]:
    """Fit one layer and return how that went, and the leaves that hold it now.

    Args:
        layer: which.
        grams: its statistics: one for all models, or one for each model's own inputs and results.
        held: those of samples held back, for the choice of the ridge; empty if it is given.
        named: wide leaves; what they hold is the prior.
        ridge: a number, `"auto"` or `"held_back"`.
    """
    prior, errors, ridges = layer.matrix(named), np.zeros(3), []
    matrix, lacking = np.zeros_like(prior), False
    for part in _parts(layer, grams, held):
        weight = _ridge(part, prior, ridge, sum(int(g.samples) for g in grams))
        fit = solve(part.gram, prior, ridge=weight, blocks=part.blocks)
        matrix += fit.weights
        lacking |= fit.rank_deficient
        ridges.append(weight)
        errors += _errors(part, prior, fit.weights)
    before, after = errors[:2] / errors[2] if errors[2] else errors[:2]
    rows, unknowns = sum(int(g.rows) for g in grams), prior.shape[-2]
    return LayerFit(layer.leaf, float(before), float(after), max(ridges), rows, unknowns, lacking), layer.stored(
        matrix, dict(named)
    )


class _Part(NamedTuple):
    """Outputs that are fitted with the same statistics."""

    gram: Gram
    held: Gram | None
    blocks: Blocks | None
    outputs: Any


def _parts(layer: Layer, grams: tuple[Gram, ...], held: tuple[Gram, ...]) -> Iterator[_Part]:
    """Yield the parts of a layer: one, or with statistics of every model by itself one for each set of owners."""
    if len(grams) == 1:
        yield _Part(grams[0], held[0] if held else None, layer.blocks, slice(None))
        return
    everything = (np.arange(grams[0].cross.shape[-2]), np.arange(grams[0].cross.shape[-1]))
    for piece, (columns, outputs) in zip(layer.contraction.pieces, layer.blocks or [everything], strict=False):
        mine, back = (
            [g for g, o in zip(gs, piece.owners, strict=False) if o] for gs in (_own(layer, grams), _own(layer, held))
        )
        others = np.setdiff1d(np.arange(grams[0].cross.shape[-1]), outputs)
        times = _times(layer, piece)
        yield _Part(
            _scaled(reduce(add, mine), times),
            _scaled(reduce(add, back), times) if back else None,
            [(columns, outputs), (np.zeros(0, int), others)],
            outputs,
        )


def _own(layer: Layer, grams: tuple[Gram, ...]) -> list[Gram]:
    """Return the statistics of every model, where groups of features have their own without those it has no part in."""
    c = layer.contraction
    if not grams or grams[0].cross.ndim == 2:
        return list(grams)
    return [_masked(gram, has.astype(float)) for gram, has in zip(grams, c.wide.owners(c.batch_axis), strict=True)]


def _masked(gram: Gram, has: np.ndarray) -> Gram:
    inputs, cross, targets = (np.asarray(a) for a in (gram.inputs, gram.cross, gram.targets))
    return replace(
        gram, inputs=inputs * has[:, None, None], cross=cross * has[:, None, None], targets=targets * has[:, None]
    )


def _times(layer: Layer, piece: Piece) -> np.ndarray:
    """Return how much larger than in one model's rows an input has to be, for outputs that several models share.

    In the merged network all models' own inputs add up to such an output, which is the mean of theirs.
    """
    c = layer.contraction
    sharing = c.wide.owners(c.in_axis)[np.asarray(piece.owners)].sum(0)
    each = np.where(sharing > 0, sum(piece.owners) / np.maximum(sharing, 1), 1.0)
    taps = prod(c.window.shape) if c.window else 1
    return np.append(np.tile(each, taps), 1.0) if layer.constant else np.tile(each, taps)


def _scaled(gram: Gram, times: np.ndarray) -> Gram:
    """Return the statistics of the same rows with inputs so much larger."""
    inputs, cross = np.asarray(gram.inputs), np.asarray(gram.cross)
    return replace(gram, inputs=inputs * times * times[:, None], cross=cross * times[:, None])


def _ridge(part: _Part, prior: np.ndarray, ridge: float | int | str, samples: int) -> float:
    if ridge == "auto":
        return default_ridge(samples)
    if ridge == "held_back":
        if part.held is None:
            raise ValueError("ridge 'held_back' chooses by batches held back; give two batches of data or more.")
        return choose_ridge(part.gram, part.held, prior, blocks=part.blocks)
    if isinstance(ridge, str):
        raise ValueError(f"ridge is {ridge!r}; give a number, 'auto' or 'held_back'.")
    return float(ridge)


def _errors(part: _Part, prior: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the squared errors of prior and solution, and the variance of the targets, each summed over outputs."""
    gram, rows = part.gram, int(part.gram.rows)
    mean = np.asarray(gram.cross)[..., -1, :] / rows if gram.bias else 0.0
    spread = np.maximum(np.asarray(gram.targets) / rows - mean**2, 0)
    each = (residual(gram, prior), residual(gram, weights), spread)
    return np.asarray([values[..., part.outputs].sum() for values in each])
