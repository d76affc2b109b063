"""What a run on carried edits tells: what is left of them in the other model, and how well the two were matched."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from permjax.edit.collapse import Efficacy
from permjax.experiments.collapse_editors import TITLES
from permjax.experiments.edit_transport_ways import WAYS, Way
from permjax.report import Curve, Figure, Outcome, Table

KINDS = {
    "planted": "the same model with its units in random order",
    "related": "the model trained further, its units in random order",
    "independent": "a model from another seed",
}
"""Kinds of pairs, by what the second model is."""

_ARMS = {"own": "in the first model", "native": "made in the second", **WAYS}


class Arm(NamedTuple):
    """What some edits do in a model, each by itself; first the hard ones, then as many controls.

    Attributes:
        efficacy: of each.
        gain: by how much each makes its target likelier after the bare prompt, in nats per token.
        ratio: perplexity after each as a multiple of that before.
        energy: of each change, with the keys of the model it is in.
        grip: `v k` of each, of the change `u v^T` and the mean key k in the model it is in.
        cosine: between u and that of the edit made in the model itself.
    """

    efficacy: Efficacy
    gain: np.ndarray
    ratio: np.ndarray
    energy: np.ndarray
    grip: np.ndarray
    cosine: np.ndarray


class Pair(NamedTuple):
    """Edits of one model in another.

    Attributes:
        kind: of the pair; one of `KINDS`.
        seed: of the first model.
        arms: editor -> `own` (in the first model), `native` (made in the second), and every way of carrying.
        untouched: how the second model fares without any edit.
        ways: how the edits were carried.
    """

    kind: str
    seed: int
    arms: Mapping[str, Mapping[str, Arm]]
    untouched: Efficacy
    ways: Mapping[str, Way]


def report(config: Any, pairs: Sequence[Pair]) -> Outcome:
    """The outcome of all pairs.

    Args:
        config: of the run.
        pairs: of all kinds.
    """
    kinds = {kind: [pair for pair in pairs if pair.kind == kind] for kind in KINDS}
    first = config.editors[0]
    return Outcome(
        title=f"Edits carried from model to model: {' and '.join(TITLES[name] for name in config.editors)}",
        summary=" ".join((_setting(config), *(_verdict(config, some) for some in kinds.values()))),
        metrics={key: value for some in kinds.values() for key, value in _metrics(config, some)},
        tables=(*(_carried(config, some) for some in kinds.values()), _matchings(kinds)),
        figures=(_figure(config, kinds),),
        headline=tuple(f"{first}_{kind}_matched_efficacy_bare" for kind in KINDS),
    )


# numbers


def _share(arms: Sequence[Arm], kind: str, form: slice = slice(None)) -> float:
    return float(np.mean([getattr(arm.efficacy, kind)[form] for arm in arms]))


def _median(arms: Sequence[Arm], name: str) -> float:
    """The median over the edits of all pairs; what is not a number counts as infinite."""
    values = np.concatenate([getattr(arm, name) for arm in arms])
    return float(np.median(np.where(np.isnan(values), np.inf, values)))


def _reach(pairs: Sequence[Pair], editor: str, way: str) -> float:
    """How much of a change the key of the second model meets: the median of `v k` there, relative to the first."""
    every = [pair.arms[editor] for pair in pairs]
    return float(np.median(np.concatenate([arms[way].grip / arms["own"].grip for arms in every])))


def _mean(pairs: Sequence[Pair], way: str, name: str) -> float:
    return float(np.mean([getattr(pair.ways[way], name) for pair in pairs]))


def _of(pairs: Sequence[Pair], editor: str, way: str) -> list[Arm]:
    return [pair.arms[editor][way] for pair in pairs]


def _metrics(config: Any, pairs: Sequence[Pair]) -> Iterator[tuple[str, float]]:
    kind = pairs[0].kind
    for editor in config.editors:
        for way in _ARMS:
            start, arms = f"{editor}_{kind}_{way}", _of(pairs, editor, way)
            yield from ((f"{start}_efficacy_{asked}", _share(arms, asked)) for asked in Efficacy._fields)
            yield f"{start}_gain", _median(arms, "gain")
            yield f"{start}_ppl_ratio", _median(arms, "ratio")
            yield f"{start}_energy", _median(arms, "energy")
            yield f"{start}_reach", _reach(pairs, editor, way)
            yield f"{start}_cosine", _median(arms, "cosine")
    for asked in Efficacy._fields:
        yield f"{kind}_untouched_efficacy_{asked}", _untouched(pairs, asked)
    for way in WAYS:
        yield f"{kind}_{way}_distance", _mean(pairs, way, "distance")
        yield f"{kind}_{way}_barrier", _mean(pairs, way, "barrier")
        if np.isfinite(found := _mean(pairs, way, "found")):
            yield f"{kind}_{way}_found", found


def _untouched(pairs: Sequence[Pair], asked: str) -> float:
    return float(np.mean([getattr(pair.untouched, asked) for pair in pairs]))


# words


def _setting(config: Any) -> str:
    return (
        f"{config.edits} hard edits, whose subject is one token at the start of the prompt, and as many controls are "
        f"made one by one in {config.seeds} trained model{'s' if config.seeds > 1 else ''} ({config.layout}), "
        "carried to the units of another one, and measured there. Right is the share of a target's words, each with "
        "those before it given, so that some are right without any edit."
    )


def _verdict(config: Any, pairs: Sequence[Pair]) -> str:
    """What the numbers of one kind of pair say, whatever that is."""
    lines = [f"{pairs[0].kind.capitalize()} ({KINDS[pairs[0].kind]}):", _nearness(pairs)]
    return " ".join((*lines, *(_of_editor(pairs, editor) for editor in config.editors)))


def _nearness(pairs: Sequence[Pair]) -> str:
    near, far = ([_mean(pairs, way, name) for name in ("distance", "barrier")] for way in ("matched", "identity"))
    found = _mean(pairs, "matched", "found")
    known = f" and {100 * found:.1f} % of all units are found" if np.isfinite(found) else ""
    return (
        f"matching brings the weights from {far[0]:.2f} to {near[0]:.2f} of their length apart and the barrier from "
        f"{far[1]:.2f} to {near[1]:.2f} nats{known}."
    )


def _of_editor(pairs: Sequence[Pair], editor: str) -> str:
    right = {way: f"{100 * _share(_of(pairs, editor, way), 'bare'):.0f} %" for way in _ARMS}
    return (
        f"{TITLES[editor]}: {right['own']} right in the first model, {right['native']} made in the second, "
        f"{right['matched']} carried by matched weights, {right['random']} on random units, "
        f"{100 * _untouched(pairs, 'bare'):.0f} % without any edit."
    )


# tables and figure


def _carried(config: Any, pairs: Sequence[Pair]) -> Table:
    rows = [(TITLES[editor], *_row(config, pairs, editor, way)) for editor in config.editors for way in _ARMS]
    heads = ("editor", "edit", "bare, hard [%]", "bare, controls [%]", "prefixed [%]", "free [%]")
    more = ("gain [nats]", "ratio", "energy", "reach", "cosine")
    none = [f"{100 * _untouched(pairs, asked):.0f} % {asked}" for asked in Efficacy._fields]
    caption = (
        f"Without any edit: {', '.join(none)}. Medians over all edits follow. Gain: how much likelier a target "
        "becomes, per token; any damage makes it likelier where the model was sure of another answer, so compare with "
        "random units. Ratio: perplexity after an edit, relative to that before. Energy: how much the change moves "
        "outputs. Reach: how much of it the key in the second model meets. Cosine: with the value that is written by "
        "the edit made in the model itself."
    )
    return Table(f"{pairs[0].kind.capitalize()}: {KINDS[pairs[0].kind]}", (*heads, *more), tuple(rows), caption)


def _row(config: Any, pairs: Sequence[Pair], editor: str, way: str) -> tuple:
    arms = _of(pairs, editor, way)
    forms = [100 * _share(arms, "bare", form) for form in (slice(config.edits), slice(config.edits, None))]
    others = [100 * _share(arms, asked) for asked in ("prefixed", "free")]
    medians = [_median(arms, name) for name in ("gain", "ratio", "energy")]
    return (_ARMS[way], *forms, *others, *medians, _reach(pairs, editor, way), _median(arms, "cosine"))


def _matchings(kinds: Mapping[str, Sequence[Pair]]) -> Table:
    rows = tuple(
        (kind, title, *(_mean(pairs, way, name) for name in ("distance", "barrier")), 100 * _mean(pairs, way, "found"))
        for kind, pairs in kinds.items()
        for way, title in WAYS.items()
    )
    caption = (
        "Distance of the weights after the second model was carried back, relative to the length of the first's; "
        "barrier in the middle between the two, in nats. Where the stream is turned, norms are folded before."
    )
    return Table("Matchings", ("pair", "way", "distance", "barrier", "units found [%]"), rows, caption)


def _figure(config: Any, kinds: Mapping[str, Sequence[Pair]]) -> Figure:
    editor = config.editors[0]
    curves = []
    for kind, pairs in kinds.items():
        values = [100 * _share(_of(pairs, editor, way), "bare") for way in _ARMS]
        curves.append(Curve(kind, [*_ARMS.values(), "no edit"], [*values, 100 * _untouched(pairs, "bare")]))
    caption = "Target tokens that are right after the bare prompt, in the mean over all edits."
    title = f"{TITLES[editor]} edits carried to another model"
    return Figure("carried", title, caption, "", "right [%]", tuple(curves), kind="bars")
