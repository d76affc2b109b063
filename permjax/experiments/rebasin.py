"""Train networks from independent seeds, align them by permutation, merge them, and measure their barrier."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.data import images
from permjax.data.dataset import Dataset
from permjax.data.registry import load
from permjax.experiments.rebasin_report import Pair, report
from permjax.experiments.registry import Experiment
from permjax.lmc.barrier import Barrier, barrier, calibrated_barrier, l2_reduction_percent, random_barrier
from permjax.match.activations import ActivationMatching, activation_matching
from permjax.match.weights import WeightMatching, weight_matching
from permjax.merge.average import average
from permjax.merge.repair import repair
from permjax.nets.base import Net, batch_statistics
from permjax.nets.mlp import MLPConfig
from permjax.nets.registry import build
from permjax.nets.resnet import ResNetConfig
from permjax.nets.vgg import VGGConfig
from permjax.nets.vit import ViTConfig
from permjax.report import Outcome
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.trace import trace_spec
from permjax.symmetry.verify import equivalence_error
from permjax.train import TrainConfig, accuracy, cross_entropy, train

Normalisation = Literal["none", "repair", "statistics", "auto"]


@dataclass(frozen=True)
class DataConfig:
    """Which data.

    Attributes:
        name: `digits`, `blobs`, `mnist10k`, `cifar10`, `npz` or `folder`.
        root: folder of real data; the environment variable PERMJAX_DATA by default.
        path: file or folder of `npz` and `folder`.
        seed: of the split, where the set has one.
        train_size: number of training examples, where the set can be cut.
        test_size: number of test examples, where the set can be cut.
    """

    name: str = "digits"
    root: str | None = None
    path: str | None = None
    seed: int | None = None
    train_size: int | None = None
    test_size: int | None = None


@dataclass(frozen=True)
class RebasinConfig:
    """A re-basin experiment.

    Attributes:
        model: the network, as its `config.json` would say: `model_type` and the fields of that type.
        widths: width multipliers to try one after the other in place of the model's own.
        norms: normalisation layers to try one after the other in place of the model's own.
        data: the data set.
        train: how every network is trained.
        weights: hyper-parameters of weight matching.
        activations: hyper-parameters of activation matching.
        pairs: number of disjoint pairs of networks; results are means over pairs.
        seed: networks are trained from the seeds `seed`, `seed + 1`, ...
        augment: random crops and flips of training images.
        points: points on the line between two networks, both ends included.
        batch_size: examples at a time when measuring.
        match_examples: training examples for activation matching and normalisation.
        normalisation: what is corrected in a merged network before it is measured: nothing, the mean and spread of
            every channel (REPAIR, for networks without BatchNorm), or the running statistics of BatchNorm; `auto` does
            the last for networks that have some.
        controls: also measure randomly permuted networks, and barriers at the best softmax temperature.
    """

    experiment: ClassVar[str] = "rebasin"
    model: MLPConfig | VGGConfig | ResNetConfig | ViTConfig = MLPConfig()
    widths: tuple[int, ...] = ()
    norms: tuple[str, ...] = ()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    weights: WeightMatching = WeightMatching()
    activations: ActivationMatching = ActivationMatching()
    pairs: int = 1
    seed: int = 0
    augment: bool = False
    points: int = 25
    batch_size: int = 1000
    match_examples: int = 2000
    normalisation: Normalisation = "none"
    controls: bool = True


class _Setting(NamedTuple):
    """What all pairs share."""

    config: RebasinConfig
    net: Net
    data: Dataset
    spec: PermutationSpec
    metrics: Callable
    batches: list


def run(config: RebasinConfig, out: Path, progress: Any) -> Outcome:
    """Run the experiment, for every width and normalisation layer that the config lists.

    Args:
        config: what to do.
        out: folder of the run; training keeps its state in `out/state`, so that an interrupted run goes on.
        progress: told about training and pairs.

    Returns:
        Metrics, tables, figures, spec, and the models of the first pair; of several variants the metrics end in their
        label.
    """
    variants = list(_variants(config))
    if len(variants) == 1:
        return _run_one(variants[0][1], out, progress)
    return _joined({label: _run_one(one, out / "state" / label, progress) for label, one in variants})


def _joined(found: dict[str, Outcome]) -> Outcome:
    """Return the outcomes of several variants as one."""
    first = next(iter(found.values()))
    tables = [t._replace(title=f"{t.title}, {label}") for label, o in found.items() for t in o.tables]
    figures = [(label, f) for label, o in found.items() for f in o.figures]
    return Outcome(
        title=first.title,
        summary=" ".join(f"{label}: {o.summary}" for label, o in found.items()),
        metrics={f"{k}_{label}": v for label, o in found.items() for k, v in o.metrics.items()},
        tables=tuple(tables),
        figures=tuple(f._replace(name=f"{f.name}_{label}", title=f"{f.title}, {label}") for label, f in figures),
        texts=first.texts,
        models={f"{stem}_{label}": leaves for label, o in found.items() for stem, leaves in o.models.items()},
    )


def _variants(config: RebasinConfig) -> Iterator[tuple[str, RebasinConfig]]:
    """Yield the configuration of every width and norm, with a label such as `width4_layer`."""
    for width in config.widths or (None,):
        for norm in config.norms or (None,):
            changes = {k: v for k, v in (("width", width), ("norm", norm)) if v is not None}
            if wrong := sorted(k for k in changes if not hasattr(config.model, k)):
                raise ValueError(f"a model of type {config.model.model_type} has no {wrong[0]} that could be varied.")
            model = replace(config.model, **changes)
            mode = config.normalisation
            if mode == "auto":
                mode = "statistics" if getattr(model, "norm", "none") == "batch" else "none"
            label = "_".join(f"width{v}" if k == "width" else str(v) for k, v in changes.items())
            yield label, replace(config, model=model, widths=(), norms=(), normalisation=mode)


def _run_one(config: RebasinConfig, out: Path, progress: Any) -> Outcome:
    data = _load(config.data)
    net = build(config.model)
    _check_fit(config, net, data)
    models = _train(config, net, data, out, progress)
    spec = trace_spec(net.apply, models[0], jnp.asarray(data.x_test[:2]))
    setting = _Setting(config, net, data, spec, _metrics(config, net, data), _batches(config, data))
    found, kept = [], {}
    progress.start("pairs", config.pairs)
    for number, (a, b) in enumerate(zip(models[::2], models[1::2], strict=True)):
        pair, trees = _measure(setting, a, b, jax.random.fold_in(jax.random.key(config.seed), number))
        found.append(pair)
        kept = kept or trees
        progress.step(1, barrier=pair.barriers["weights"].barrier_mid)
    progress.done()
    return report(config, data.name, spec, found, kept)


# -- preparing -----------------------------------------------------------------------------------------------------


def _load(config: DataConfig) -> Dataset:
    options = {k: getattr(config, k) for k in ("path", "seed", "train_size", "test_size")}
    return load(config.name, config.root, **{k: v for k, v in options.items() if v is not None})


def _check_fit(config: RebasinConfig, net: Net, data: Dataset) -> None:
    wanted, given = tuple(net.example_inputs(1)[0].shape[1:]), tuple(data.x_train.shape[1:])
    if wanted != given:
        raise ValueError(
            f"the data set {data.name} has inputs of shape {given}, but the model takes {wanted}; "
            f"set model.input_shape = {list(given)}."
        )
    if config.pairs < 1:
        raise ValueError(f"pairs must be at least 1, not {config.pairs}.")


def _train(config: RebasinConfig, net: Net, data: Dataset, out: Path, progress: Any) -> list[Any]:
    seeds = [config.seed + i for i in range(2 * config.pairs)]
    progress.start(f"training {len(seeds)} networks", config.train.epochs)

    def tell(_: int, scores: dict[str, np.ndarray]) -> None:
        progress.step(1, **{name: float(np.mean(values)) for name, values in scores.items()})

    augment = partial(images.random_crop_flip) if config.augment else None
    state = out / "state" / "train"
    result = train(net, data, config.train, seeds, checkpoint_dir=state, progress=tell, augment=augment)
    progress.done()
    return list(tree.unstack(jax.device_get(result.params)))


def _batches(config: RebasinConfig, data: Dataset) -> list:
    x = data.x_train[: config.match_examples]
    size = min(config.batch_size, len(x))
    return [jnp.asarray(x[i : i + size]) for i in range(0, len(x) - size + 1, size)]


def _metrics(config: RebasinConfig, net: Net, data: Dataset) -> Callable:
    """Return loss and accuracy of a batch; running statistics are re-estimated first where the config asks for it."""
    calibration = jnp.asarray(data.x_train[: min(config.batch_size, config.match_examples)])

    def metrics(params: Any, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        if config.normalisation == "statistics":
            params = batch_statistics(net, params, calibration)
        logits = net.apply(params, x)
        return {"loss": cross_entropy(logits, y), "accuracy": accuracy(logits, y)}

    return metrics


# -- one pair ------------------------------------------------------------------------------------------------------


def _measure(setting: _Setting, a: Any, b: Any, key: jax.Array) -> tuple[Pair, dict[str, Any]]:
    config, spec = setting.config, setting.spec
    keys = dict(zip(("match", "random", "check"), jax.random.split(key, 3), strict=True))
    start = time.perf_counter()
    matched = weight_matching(spec, (a, b), key=keys["match"], **vars(config.weights))
    seconds = time.perf_counter() - start
    active = activation_matching(
        spec, (a, b), apply=setting.net.apply, data=setting.batches, **vars(config.activations)
    )
    aligned = {"naive": b, "weights": matched.models[1], "activations": active.models[1]}
    barriers = {name: _line(setting, a, model) for name, model in aligned.items()}
    if config.controls:
        barriers |= _controls(setting, a, aligned, keys["random"])
    merged = average(spec, (a, aligned["weights"])).models[0]
    if config.normalisation == "repair":
        repaired = repair(spec, (a, aligned["weights"]), merged, apply=setting.net.apply, data=setting.batches)
        barriers["weights_repaired"] = _with_middle(setting, barriers["weights"], repaired.models[0])
    scalars = {
        "l2_reduction_percent": l2_reduction_percent(spec, a, b, aligned["weights"]),
        "equivalence_error": equivalence_error(setting.net.apply, b, spec, keys["check"], *_few(setting)),
        "seconds_matching": seconds,
    }
    correlations = {"naive": active.info.before[0], "activations": active.info.after[0]}
    again = activation_matching(spec, (a, aligned["weights"]), apply=setting.net.apply, data=setting.batches)
    correlations["weights"] = again.info.before[0]
    return Pair(barriers, scalars, correlations), {"a": a, "b_aligned": aligned["weights"], "merged": merged}


def _line(setting: _Setting, a: Any, b: Any) -> Barrier:
    x, y = setting.data.x_test, setting.data.y_test
    return barrier(setting.metrics, a, b, (x, y), points=setting.config.points, batch_size=setting.config.batch_size)


def _controls(setting: _Setting, a: Any, aligned: dict[str, Any], key: jax.Array) -> dict[str, Barrier]:
    """Return the controls of the literature: a random permutation, and barriers at the best temperature."""
    config, data = setting.config, setting.data
    options: dict[str, Any] = {"points": config.points, "batch_size": config.batch_size}
    test = (data.x_test, data.y_test)
    found = {"random": random_barrier(setting.spec, setting.metrics, a, aligned["naive"], test, key=key, **options)}
    if config.normalisation == "statistics":
        return found
    half = len(data.x_test) // 2
    kept, fitted = tuple(x[:half] for x in test), tuple(x[half:] for x in test)
    for name in ("naive", "weights"):
        line = calibrated_barrier(setting.net.apply, a, aligned[name], kept, fitted, **options)
        found[f"{name}_calibrated"] = line
    return found


def _with_middle(setting: _Setting, line: Barrier, merged: Any) -> Barrier:
    """Return the line with the corrected network as its middle."""
    middle = _line(setting, merged, merged)
    loss, right = line.loss.copy(), line.accuracy.copy()
    k = len(line.t) // 2
    loss[k], right[k] = middle.loss[k], middle.accuracy[k]
    height = loss - ((1 - line.t) * loss[0] + line.t * loss[-1])
    return Barrier(line.t, loss, right, float(height[k]), float(height.max()))


def _few(setting: _Setting) -> tuple[jax.Array]:
    return (jnp.asarray(setting.data.x_test[:64]),)


EXPERIMENT = Experiment(RebasinConfig, run)
