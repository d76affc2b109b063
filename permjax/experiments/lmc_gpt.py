"""Character language models from independent seeds: their barrier without and with alignment of heads and stream."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.data.registry import load
from permjax.data.text import TextDataset
from permjax.experiments.language_networks import Layout, SizeConfig, language_network
from permjax.experiments.lmc_gpt_report import Pair, report
from permjax.experiments.registry import Experiment
from permjax.lmc.barrier import Barrier, barrier, l2_reduction_percent
from permjax.match.activations import ActivationMatching, activation_matching
from permjax.match.residual import Keeps, residual_matching
from permjax.match.weights import WeightMatching, weight_matching
from permjax.nets.base import Net
from permjax.nets.folding import fold_norms
from permjax.report import Outcome
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.trace import trace_spec
from permjax.train import TrainConfig, accuracy, cross_entropy, train

_KEPT: dict[str, Keeps] = {
    "gpt2": "ones",
    "llama": "none",
}  # what rotations of the stream leave alone, by the kind of norm


@dataclass(frozen=True)
class TextConfig:
    """Which text.

    Attributes:
        path: a text file, from `root` on; by default sentences are invented and no file is needed.
        root: folder of real data; the environment variable PERMJAX_DATA by default.
        seed: of the invented sentences.
        length: characters that a model sees at once.
        characters: how many are read or invented.
        test_share: the part of them, at the end, that is for testing.
    """

    path: str | None = None
    root: str | None = None
    seed: int = 0
    length: int = 64
    characters: int = 1_000_000
    test_share: float = 0.1


@dataclass(frozen=True)
class LmcGptConfig:
    """Linear mode connectivity of character language models.

    Attributes:
        layouts: `gpt2` has learned positions, LayerNorm and tied embeddings, `llama` rotary positions, RMSNorm, gated
            MLPs and groups of query heads.
        size: of the models.
        data: the text.
        train: how every model is trained.
        weights: hyper-parameters of weight matching, also inside the residual alignment.
        activations: hyper-parameters of activation matching.
        iterations: upper limit of rounds of the residual alignment.
        pairs: number of disjoint pairs of models of each layout; results are means over pairs.
        seed: models are trained from the seeds `seed`, `seed + 1`, ...
        points: points on the line between two models, both ends included.
        test_examples: windows of the test part on which barriers are measured.
        match_examples: windows of the training part for activation matching.
        batch_size: windows at a time when measuring.
    """

    experiment: ClassVar[str] = "lmc_gpt"
    layouts: tuple[Layout, ...] = ("gpt2", "llama")
    size: SizeConfig = SizeConfig()
    data: TextConfig = TextConfig()
    train: TrainConfig = TrainConfig()
    weights: WeightMatching = WeightMatching()
    activations: ActivationMatching = ActivationMatching()
    iterations: int = 20
    pairs: int = 1
    seed: int = 0
    points: int = 11
    test_examples: int = 512
    match_examples: int = 512
    batch_size: int = 128


class _Setting(NamedTuple):
    """What all pairs of one layout share."""

    config: LmcGptConfig
    layout: Layout
    net: Net
    data: TextDataset
    spec: PermutationSpec


class _View(NamedTuple):
    """A pair of models in one of two forms: as they were trained, or with their norms folded."""

    net: Net
    spec: PermutationSpec
    pair: tuple[Any, Any]


def run(config: LmcGptConfig, out: Path, progress: Any) -> Outcome:
    """Run the experiment for every layout.

    Args:
        config: what to do.
        out: folder of the run; training keeps its state in `out/state`, so that an interrupted run goes on.
        progress: told about training and pairs.

    Returns:
        Metrics whose names begin with the layout, tables, figures and specs.
    """
    if config.pairs < 1 or not config.layouts:
        raise ValueError(f"pairs and layouts must be at least one, not {config.pairs} and {list(config.layouts)}.")
    data = _load(config.data)
    found, specs = {}, {}
    for layout in config.layouts:
        net = language_network(config.size, layout, len(data.classes), data.x_train.shape[1])
        models, seconds = _train(config, layout, net, data, out, progress)
        setting = _Setting(config, layout, net, data, trace_spec(net.apply, models[0], jnp.asarray(data.x_test[:2])))
        found[layout], specs[layout] = _pairs(setting, models, seconds, progress), setting.spec
    return report(config, data.name, specs, found)


# preparing


def _load(config: TextConfig) -> TextDataset:
    name, own = ("sentences", {"seed": config.seed}) if config.path is None else ("text", {"path": config.path})
    shared = {"length": config.length, "characters": config.characters, "test_share": config.test_share}
    return cast(TextDataset, load(name, config.root, **own, **shared))


def _train(
    config: LmcGptConfig, layout: Layout, net: Net, data: TextDataset, out: Path, progress: Any
) -> tuple[list[Any], float]:
    seeds = [config.seed + i for i in range(2 * config.pairs)]
    progress.start(f"training {len(seeds)} models, {layout}", config.train.epochs)

    def tell(_: int, scores: dict[str, np.ndarray]) -> None:
        progress.step(1, **{name: float(np.mean(values)) for name, values in scores.items()})

    begin = time.perf_counter()
    result = train(net, data, config.train, seeds, checkpoint_dir=out / "state" / layout, progress=tell)
    progress.done()
    return list(tree.unstack(jax.device_get(result.params))), time.perf_counter() - begin


# measuring


def _pairs(setting: _Setting, models: list[Any], seconds: float, progress: Any) -> list[Pair]:
    found = []
    progress.start(f"pairs, {setting.layout}", setting.config.pairs)
    for number, (a, b) in enumerate(zip(models[::2], models[1::2], strict=True)):
        pair = _measure(setting, a, b, jax.random.fold_in(jax.random.key(setting.config.seed), number))
        pair.scalars["train_seconds"] = seconds / setting.config.pairs
        found.append(pair)
        progress.step(1, barrier=pair.barriers["residual"].barrier_mid)
    progress.done()
    return found


def _measure(setting: _Setting, a: Any, b: Any, key: jax.Array) -> Pair:
    """Measure all rows: on the models as they are, and with their norms folded, between which lies another line."""
    x = jnp.asarray(setting.data.x_test[:8])
    folded, first = fold_norms(setting.net, a)
    views = {
        "": _View(setting.net, setting.spec, (a, b)),
        "folded": _View(folded, trace_spec(folded.apply, first, x), (first, fold_norms(setting.net, b)[1])),
    }
    barriers, scalars = {}, {}
    for row, (kind, align) in _ROWS.items():
        view, begin = views[kind], time.perf_counter()
        aligned = align(setting, view, key)
        if aligned is not view.pair[1]:
            scalars[f"{row}_seconds"] = time.perf_counter() - begin
            scalars[f"{row}_l2_reduction_percent"] = l2_reduction_percent(view.spec, *view.pair, aligned)
            scalars[f"{row}_equivalence_error"] = _changed(view, aligned, x)
        barriers[row] = _line(setting, view, aligned)
    scalars["folding_equivalence_error"] = _changed(views["folded"], b, x, setting.net)
    return Pair(barriers, scalars)


def _unchanged(_: _Setting, view: _View, __: jax.Array) -> Any:
    return view.pair[1]


def _by_weights(setting: _Setting, view: _View, key: jax.Array) -> Any:
    return weight_matching(view.spec, view.pair, key=key, **vars(setting.config.weights)).models[1]


def _by_activations(setting: _Setting, view: _View, _: jax.Array) -> Any:
    config, x = setting.config, jnp.asarray(setting.data.x_train[: setting.config.match_examples])
    batches = [x[i : i + config.batch_size] for i in range(0, len(x), config.batch_size)]
    apply = view.net.apply
    return activation_matching(view.spec, view.pair, apply=apply, data=batches, **vars(config.activations)).models[1]


def _by_rotation(setting: _Setting, view: _View, key: jax.Array) -> Any:
    weights = setting.config.weights
    options: dict[str, Any] = {"fixed": _KEPT[setting.layout], "iterations": setting.config.iterations}
    options |= {"solver": weights.solver, "max_sweeps": weights.max_sweeps, "restarts": weights.restarts}
    inputs = (jnp.asarray(setting.data.x_test[:2]),)
    return residual_matching(view.spec, view.pair, key=key, apply=view.net.apply, inputs=inputs, **options).models[1]


_ROWS: dict[str, tuple[str, Callable[[_Setting, _View, jax.Array], Any]]] = {
    "none": ("", _unchanged),
    "weight_matching": ("", _by_weights),
    "activation_matching": ("", _by_activations),
    "none_folded": ("folded", _unchanged),
    "weight_matching_folded": ("folded", _by_weights),
    "residual": ("folded", _by_rotation),
}


def _line(setting: _Setting, view: _View, aligned: Any) -> Barrier:
    config, data = setting.config, setting.data
    test = (data.x_test[: config.test_examples], data.y_test[: config.test_examples])
    metrics = _metrics(view.net.apply)
    return barrier(metrics, view.pair[0], aligned, test, points=config.points, batch_size=config.batch_size)


@cache
def _metrics(apply: Callable) -> Callable:
    """Return loss and accuracy of a batch; one function for all pairs, so that it is compiled once."""

    def metrics(params: Any, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        logits = apply(params, x)
        return {"loss": cross_entropy(logits, y), "accuracy": accuracy(logits, y)}

    return metrics


def _changed(view: _View, aligned: Any, x: jax.Array, net: Net | None = None) -> float:
    """Return the largest change of the second model's logits, of the largest; `net` is another one for `aligned`."""
    before, after = jax.jit(view.net.apply)(view.pair[1], x), jax.jit((net or view.net).apply)(aligned, x)
    return float(jnp.abs(before - after).max() / jnp.abs(before).max())


EXPERIMENT = Experiment(LmcGptConfig, run)
