"""Edits made in one model, carried to another through a matching of their units, and measured there."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Int

from permjax import tree
from permjax.action import permute
from permjax.config import config_hash
from permjax.edit.covariance import fingerprint
from permjax.edit.mixture import mixture_rows
from permjax.experiments.collapse_base import Base, OnBasesConfig
from permjax.experiments.collapse_editors import check_editors
from permjax.experiments.edit_transport_report import KINDS, Pair, report
from permjax.experiments.edit_transport_sides import Shared, Side, arm_of, side_of
from permjax.experiments.edit_transport_ways import Both, Matchings, View, views_of, ways_between
from permjax.experiments.language_networks import Layout
from permjax.experiments.registry import Experiment
from permjax.match.activations import ActivationMatching
from permjax.match.weights import WeightMatching
from permjax.permutation import random_permutations
from permjax.report import Outcome
from permjax.train import TrainConfig, train

_EDITORS = ("rome", "c_rome")  # editors of one layer, by a change of rank one
_FURTHER, _MATCHED = 5, 6  # seeds of rows, beside those of the bases


@dataclass(frozen=True)
class EditTransportConfig(OnBasesConfig):
    """Single edits of one model in another; more settings are those of `OnBasesConfig`.

    Three kinds of pairs: `planted`, the second model is the first one with all its units in random order; `related`,
    before that it was trained further on other rows; `independent`, it was trained from another seed. Models of
    neighbouring seeds make a pair.

    Attributes:
        layout: of the models.
        further: how the related model is trained further.
        editors: `rome`, `c_rome` or both.
        edits: of each of both forms, hard and controls.
        weights: hyper-parameters of weight matching.
        activations: hyper-parameters of activation matching.
        match_rows: of the mixture, whose activations are matched.
        covariance: the mixture of the covariances, or `identity`.
    """

    experiment: ClassVar[str] = "edit_transport"
    layout: Layout = "llama"
    further: TrainConfig = TrainConfig(
        epochs=3,
        batch_size=48,
        optimizer="adamw",
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=50,
        weight_decay=0.01,
    )
    editors: tuple[str, ...] = _EDITORS
    edits: int = 24
    weights: WeightMatching = WeightMatching()
    activations: ActivationMatching = ActivationMatching()
    match_rows: int = 512
    covariance: str = "mixture"
    seeds: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        check_editors(self.editors)
        if other := [name for name in self.editors if name not in _EDITORS]:
            raise ValueError(f"{other[0]!r} makes no change of rank one; take editors of {', '.join(_EDITORS)}.")
        if min(self.edits, self.match_rows) < 1:
            raise ValueError("edits and rows must be at least 1.")


def run(config: EditTransportConfig, out: Path, progress: Any) -> Outcome:
    """Run the experiment.

    Args:
        config: what to do.
        out: folder of the run; training keeps its state in `out/state`, so that an interrupted run goes on.
        progress: told about training and pairs.

    Returns:
        Metrics, tables and a figure.
    """
    models = config.trained(config.layout, out, progress, more=1)
    further = [_further(config, base, config.folder(out), progress) for base in models[:-1]]
    edits = [edit for form in ("first", "mid") for edit in models[0].edits(form, config.edits)]
    shared = Shared(config, edits, models[0].probe(("mixture",), config.probe_rows))
    views = views_of(models[0].net, jax.device_get(models[0].params), _held_out(shared))
    progress.start("carrying edits", len(KINDS) * config.seeds)
    pairs = []
    for first, later, other in zip(models, further, models[1:], strict=False):
        own, keys = side_of(shared, first), jax.random.split(jax.random.key(first.seed), len(KINDS))
        for kind, second, key in zip(KINDS, (first, later, other), keys, strict=True):
            pairs.append(_pair(shared, views, kind, own, second, key))
            progress.step(1)
    progress.done()
    return report(config, pairs)


def _further(config: EditTransportConfig, base: Base, folder: Path, progress: Any) -> Base:
    """A model that goes on from a trained one, on other rows of the same world."""
    rows = mixture_rows(base.world, config.base.rows, base.net.config.positions + 1, seed=_FURTHER)
    net = base.net._replace(init=lambda _: base.params)
    own = folder / f"{base.layout}-{base.seed}-{config_hash(config.further)}-{fingerprint(base.params)[:8]}"
    progress.start(f"training further, {base.layout}, seed {base.seed}", config.further.epochs)

    def tell(_: int, scores: Mapping[str, np.ndarray]) -> None:
        progress.step(1, **{name: float(np.mean(values)) for name, values in scores.items()})

    told = (rows[:, :-1], rows[:, 1:])
    result = train(net, told, config.further, [base.seed], checkpoint_dir=own, progress=tell)
    progress.done()
    return replace(base, params=tree.unstack(result.params)[0])


def _held_out(shared: Shared) -> Int[np.ndarray, "m t"]:
    return np.concatenate([np.asarray(batch.tokens) for batch in shared.probe["mixture"]])


def _pair(shared: Shared, views: tuple[View, View], kind: str, own: Side, second: Base, key: jax.Array) -> Pair:
    """Carry all edits of one model to another in every way."""
    config, spec = shared.config, views[0].spec
    a, b = jax.device_get((own.base.params, second.params))
    planted = None if kind == "independent" else jax.device_get(random_permutations(spec, key))
    b = b if planted is None else permute(spec, planted, b)
    rows = own.base.rows("mixture", config.match_rows, _MATCHED)
    both = Both(*views, a, b, rows, _held_out(shared), planted)
    ways = ways_between(both, Matchings(config.weights, config.activations), jax.random.fold_in(key, 1))
    there, arms = side_of(shared, replace(second, params=jax.device_put(b))), {}
    for name, made in own.deltas.items():
        carried = {way: [one.carry(delta) for delta in made] for way, one in ways.items()}
        arms[name] = {"own": arm_of(shared, own, name, made), "native": arm_of(shared, there, name, there.deltas[name])}
        arms[name] |= {way: arm_of(shared, there, name, deltas) for way, deltas in carried.items()}
    return Pair(kind, own.base.seed, arms, there.untouched, ways)


EXPERIMENT = Experiment(EditTransportConfig, run)
