"""Train triples of networks, align them by every method, and measure how each one connects them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from permjax.action import permute
from permjax.data.dataset import Dataset
from permjax.experiments.lmc_report import Alignment, Triple, report
from permjax.experiments.networks import (
    NetworksConfig,
    joined,
    labelled_batches,
    load_data,
    resolved,
    scorer,
    train_networks,
)
from permjax.experiments.registry import Experiment
from permjax.lmc.barrier import Barrier, barrier, interpolate, l2_reduction_percent
from permjax.lmc.landscape import plane
from permjax.lmc.singular import GAMMAS, analyse, spectra
from permjax.match.activations import ActivationMatching, activation_matching
from permjax.match.frank_wolfe import FrankWolfe, frank_wolfe
from permjax.match.many import cycle_error, pairwise_maps, pairwise_matching
from permjax.match.ste import SteMatching, ste_matching
from permjax.match.universe import UniverseMatching, universe_matching
from permjax.match.weights import WeightMatching, weight_matching
from permjax.merge.average import average
from permjax.nets.base import Net
from permjax.nets.linen import batch_statistics
from permjax.nets.mlp import MLPConfig
from permjax.nets.registry import build
from permjax.nets.resnet import ResNetConfig
from permjax.nets.vgg import VGGConfig
from permjax.nets.vit import ViTConfig
from permjax.plan import Plan
from permjax.report import Outcome
from permjax.steps import Result
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.trace import trace_spec
from permjax.train import cross_entropy

Method = Literal[
    "none", "weight_matching", "activation_matching", "ste_permutation", "ste_weights", "frank_wolfe", "universe"
]
METHODS: tuple[Method, ...] = Method.__args__
_PAIRS = tuple(combinations(range(3), 2))
_SHOWN = ("none", "weight_matching", "ste_permutation")  # in the contour figures


@dataclass(frozen=True)
class LMCConfig(NetworksConfig):
    """An experiment on linear mode connectivity of three networks.

    Attributes:
        variants: networks to try one after the other in place of `model`.
        methods: what to compare; weight matching is always measured pair by pair too.
        triples: number of disjoint triples of networks; results are means over triples.
        weights: hyper-parameters of weight matching.
        activations: hyper-parameters of activation matching.
        ste_permutation: hyper-parameters of straight-through matching with matrices as latents.
        ste_weights: the same with weights as latents.
        frank_wolfe: hyper-parameters of Frank-Wolfe matching.
        universe: hyper-parameters of cycle-consistent matching.
        ste_batch: training examples at a time in straight-through matching, which sees all of them.
        gammas: thresholds of the R metric; 0 and 0.3 among them.
        plane_points: points along each side of the planes through three networks; 0 for none.
        plane_examples: test examples on which the planes are measured.
    """

    experiment: ClassVar[str] = "lmc"
    variants: tuple[MLPConfig | VGGConfig | ResNetConfig | ViTConfig, ...] = ()
    methods: tuple[Method, ...] = METHODS
    triples: int = 1
    weights: WeightMatching = WeightMatching()
    activations: ActivationMatching = ActivationMatching()
    ste_permutation: SteMatching = SteMatching("permutation", together=False)
    ste_weights: SteMatching = SteMatching("weights", together=False)
    frank_wolfe: FrankWolfe = FrankWolfe()
    universe: UniverseMatching = UniverseMatching()
    ste_batch: int = 250
    gammas: tuple[float, ...] = GAMMAS
    plane_points: int = 15
    plane_examples: int = 1000

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.triples < 1 or self.plane_points < 0 or self.plane_points == 1:
            raise ValueError("triples must be at least 1, and plane_points 0 or at least 2.")
        if not {0.0, 0.3} <= set(self.gammas):
            raise ValueError(f"gammas must hold 0 and 0.3, which are reported by name, not only {list(self.gammas)}.")
        latents = (self.ste_permutation.latent, self.ste_weights.latent)
        if latents != ("permutation", "weights"):
            raise ValueError(f"ste_permutation and ste_weights are called by their latents, which are {latents}.")


class _Setting(NamedTuple):
    """What all triples share."""

    config: LMCConfig
    net: Net
    data: Dataset
    spec: PermutationSpec
    metrics: Callable
    loss: Callable


def run(config: LMCConfig, out: Path, progress: Any) -> Outcome:
    """Run the experiment, for every network among the variants.

    Args:
        config: what to do.
        out: folder of the run; training keeps its state in `out/state`, so that an interrupted run goes on.
        progress: told about training and triples.

    Returns:
        Metrics, tables, figures, spec, and the models of the first triple; of several variants the metrics end in
        their label.
    """
    if not config.variants:
        return _run_one(config, out, progress)
    labels = _labels(config.variants)
    variants = {n: replace(config, model=m, variants=()) for n, m in zip(labels, config.variants, strict=True)}
    return joined({label: _run_one(one, out / "state" / label, progress) for label, one in variants.items()})


def _labels(models: Sequence[Any]) -> list[str]:
    """Return a name for each network: its type, its width, and its place in the list where those are not enough."""
    found = [_label(model) for model in models]
    return [label if found.count(label) == 1 else f"{label}_{i}" for i, label in enumerate(found)]


def _label(model: Any) -> str:
    width = getattr(model, "width", None)
    return model.model_type if width is None else f"{model.model_type}_width{width}"


def _run_one(config: LMCConfig, out: Path, progress: Any) -> Outcome:
    config = replace(config, normalisation=resolved(config.normalisation, config.model))
    net = build(config.model)
    data = load_data(config.data, net)
    models = train_networks(config, net, data, 3 * config.triples, out, progress)
    spec = trace_spec(net.apply, models[0], jnp.asarray(data.x_test[:2]))
    setting = _Setting(config, net, data, spec, scorer(config, net, data), _loss(config, net))
    progress.start("methods", config.triples * len(config.methods))
    found = [_measure(setting, models[3 * i : 3 * i + 3], i, progress) for i in range(config.triples)]
    progress.done()
    return report(config, data.name, spec, found)


def _loss(config: LMCConfig, net: Net) -> Callable:
    """Return the loss of a batch; running statistics are those of the batch where they are re-estimated at all."""

    def loss(params: Any, batch: tuple) -> jax.Array:
        x, y = batch
        if config.normalisation == "statistics":
            params = batch_statistics(net, params, x)
        return cross_entropy(net.apply(params, x), y)

    return loss


# -- one triple ----------------------------------------------------------------------------------------------------


def _measure(setting: _Setting, models: list[Any], number: int, progress: Any) -> Triple:
    config, spec = setting.config, setting.spec
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    found, seconds = {}, {}
    for method in config.methods:
        start = time.perf_counter()
        found[method] = _align(setting, models, method, key)
        seconds[method] = time.perf_counter() - start
        progress.step(1, method=method)
    named = {f"{m} {i}": result.models[i] for m, result in found.items() for i in (1, 2)}
    compared = analyse(spec, models[0], named, gammas=config.gammas)
    alignments = {
        method: Alignment(
            barriers={(i, j): _line(setting, trio[i], trio[j]) for i, j in _PAIRS},
            r=np.mean([compared[f"{method} {i}"].r.total for i in (1, 2)], axis=0),
            l2_reduction=float(np.mean([l2_reduction_percent(spec, models[0], models[i], trio[i]) for i in (1, 2)])),
            mean3=_at(setting, average(spec, trio).models[0]),
            cycle_error=_cycle_error(spec, found[method].plan),
            seconds=seconds[method],
            converged=bool(np.all(getattr(found[method].info, "converged", True))),
            plane=_plane(setting, trio) if number == 0 and method in _SHOWN and config.plane_points else None,
        )
        for method, trio in ((method, result.models) for method, result in found.items())
    }
    lines, error = _pairwise(setting, models, key)
    kept = _kept(setting, list(found.values())[-1].models) if number == 0 else {}
    return Triple(alignments, lines, error, [spectra(spec, model) for model in models], kept)


def _align(setting: _Setting, models: list[Any], method: Method, key: jax.Array) -> Result:
    config, spec, data = setting.config, setting.spec, setting.data
    match method:
        case "none":
            return Result(tuple(models), None, None)
        case "weight_matching":
            return weight_matching(spec, models, key=key, **vars(config.weights))
        case "activation_matching":
            batches = [x for x, _ in labelled_batches(config, data)]
            return activation_matching(spec, models, apply=setting.net.apply, data=batches, **vars(config.activations))
        case "ste_permutation" | "ste_weights":
            whole = replace(config, batch_size=config.ste_batch, match_examples=len(data.x_train))
            batches = labelled_batches(whole, data)
            hyper = vars(getattr(config, method))
            return ste_matching(spec, models, loss=setting.loss, data=batches, key=key, **hyper)
        case "frank_wolfe":
            return frank_wolfe(spec, models, key=key, **vars(config.frank_wolfe))
        case "universe":
            return universe_matching(spec, models, key=key, **vars(config.universe))


def _pairwise(setting: _Setting, models: list[Any], key: jax.Array) -> tuple[dict, float]:
    """Return the barriers of pairs that weight matching aligns one by one, and how far that is from consistent."""
    spec, hyper = setting.spec, vars(setting.config.weights)
    found = pairwise_matching(spec, models, partial(weight_matching, key=key, **hyper))
    lines = {(i, j): _line(setting, models[i], permute(spec, found[i, j], models[j])) for i, j in _PAIRS}
    return lines, cycle_error(spec, found)


def _cycle_error(spec: PermutationSpec, plan: Plan | None) -> float:
    """Return how far the orders between pairs that follow from a plan are from consistent."""
    return 0.0 if plan is None else cycle_error(spec, pairwise_maps(spec, plan))


def _kept(setting: _Setting, trio: tuple) -> dict[str, Any]:
    """The networks to save, and their mean."""
    return dict(zip(("a", "b_aligned", "c_aligned"), trio, strict=True)) | {
        "merged": average(setting.spec, trio).models[0]
    }


def _line(setting: _Setting, a: Any, b: Any) -> Barrier:
    x, y = setting.data.x_test, setting.data.y_test
    return barrier(setting.metrics, a, b, (x, y), points=setting.config.points, batch_size=setting.config.batch_size)


def _at(setting: _Setting, model: Any) -> dict[str, float]:
    test = (setting.data.x_test, setting.data.y_test)
    found = interpolate(setting.metrics, model, model, test, points=2, batch_size=setting.config.batch_size)
    return {name: float(values[0]) for name, values in found.items()}


def _plane(setting: _Setting, trio: tuple) -> Any:
    config, some = setting.config, slice(setting.config.plane_examples)
    test = (setting.data.x_test[some], setting.data.y_test[some])
    return plane(setting.metrics, trio, test, points=config.plane_points, batch_size=config.batch_size)


EXPERIMENT = Experiment(LMCConfig, run)
