"""Train networks from independent seeds, align them by permutation, merge them, and measure their barrier."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from permjax.data.dataset import Dataset
from permjax.experiments.networks import (
    NetworksConfig,
    joined,
    labelled_batches,
    load_data,
    resolved,
    scorer,
    train_networks,
)
from permjax.experiments.rebasin_report import Pair, report
from permjax.experiments.registry import Experiment
from permjax.lmc.barrier import Barrier, barrier, calibrated_barrier, l2_reduction_percent, random_barrier
from permjax.match.activations import ActivationMatching, activation_matching
from permjax.match.weights import WeightMatching, weight_matching
from permjax.merge.average import average
from permjax.merge.repair import repair
from permjax.nets.base import Net
from permjax.nets.registry import build
from permjax.report import Outcome
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.trace import trace_spec
from permjax.symmetry.verify import equivalence_error


@dataclass(frozen=True)
class RebasinConfig(NetworksConfig):
    """A re-basin experiment.

    Attributes:
        widths: width multipliers to try one after the other in place of the model's own.
        norms: normalisation layers to try one after the other in place of the model's own.
        weights: hyper-parameters of weight matching.
        activations: hyper-parameters of activation matching.
        pairs: number of disjoint pairs of networks; results are means over pairs.
        controls: also measure randomly permuted networks, and barriers at the best softmax temperature.
    """

    experiment: ClassVar[str] = "rebasin"
    widths: tuple[int, ...] = ()
    norms: tuple[str, ...] = ()
    weights: WeightMatching = WeightMatching()
    activations: ActivationMatching = ActivationMatching()
    pairs: int = 1
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
    return joined({label: _run_one(one, out / "state" / label, progress) for label, one in variants})


def _variants(config: RebasinConfig) -> Iterator[tuple[str, RebasinConfig]]:
    """Yield the configuration of every width and norm, with a label such as `width4_layer`."""
    for width in config.widths or (None,):
        for norm in config.norms or (None,):
            changes = {k: v for k, v in (("width", width), ("norm", norm)) if v is not None}
            if wrong := sorted(k for k in changes if not hasattr(config.model, k)):
                raise ValueError(f"a model of type {config.model.model_type} has no {wrong[0]} that could be varied.")
            model = replace(config.model, **changes)
            mode = resolved(config.normalisation, model)
            label = "_".join(f"width{v}" if k == "width" else str(v) for k, v in changes.items())
            yield label, replace(config, model=model, widths=(), norms=(), normalisation=mode)


def _run_one(config: RebasinConfig, out: Path, progress: Any) -> Outcome:
    if config.pairs < 1:
        raise ValueError(f"pairs must be at least 1, not {config.pairs}.")
    net = build(config.model)
    data = load_data(config.data, net)
    models = train_networks(config, net, data, 2 * config.pairs, out, progress)
    spec = trace_spec(net.apply, models[0], jnp.asarray(data.x_test[:2]))
    batches = [x for x, _ in labelled_batches(config, data)]
    setting = _Setting(config, net, data, spec, scorer(config, net, data), batches)
    found, kept = [], {}
    progress.start("pairs", config.pairs)
    for number, (a, b) in enumerate(zip(models[::2], models[1::2], strict=True)):
        pair, trees = _measure(setting, a, b, jax.random.fold_in(jax.random.key(config.seed), number))
        found.append(pair)
        kept = kept or trees
        progress.step(1, barrier=pair.barriers["weights"].barrier_mid)
    progress.done()
    return report(config, data.name, spec, found, kept)


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
