"""What experiments on classifiers share: data, networks trained from several seeds, and how they are measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.data import images
from permjax.data.dataset import Dataset
from permjax.data.registry import load
from permjax.nets.base import Net
from permjax.nets.linen import batch_statistics
from permjax.nets.mlp import MLPConfig
from permjax.nets.resnet import ResNetConfig
from permjax.nets.vgg import VGGConfig
from permjax.nets.vit import ViTConfig
from permjax.report import Outcome
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
class NetworksConfig:
    """Classifiers of one architecture trained from several seeds, and how they are measured.

    Attributes:
        model: the network, as its `config.json` would say: `model_type` and the fields of that type.
        data: the data set.
        train: how every network is trained.
        seed: networks are trained from the seeds `seed`, `seed + 1`, ...
        augment: random crops and flips of training images.
        points: points on the line between two networks, both ends included.
        batch_size: examples at a time when measuring.
        match_examples: training examples for matching by data and for normalisation.
        normalisation: what is corrected in a merged network before it is measured: nothing, the mean and spread of
            every channel (REPAIR, for networks without BatchNorm), or the running statistics of BatchNorm; `auto` does
            the last for networks that have some.
    """

    model: MLPConfig | VGGConfig | ResNetConfig | ViTConfig = MLPConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    seed: int = 0
    augment: bool = False
    points: int = 25
    batch_size: int = 1000
    match_examples: int = 2000
    normalisation: Normalisation = "none"


def load_data(config: DataConfig, net: Net) -> Dataset:
    """The data set of a configuration.

    Raises:
        ValueError: the network does not take its inputs.
    """
    options = {k: getattr(config, k) for k in ("path", "seed", "train_size", "test_size")}
    data = load(config.name, config.root, **{k: v for k, v in options.items() if v is not None})
    wanted, given = tuple(net.example_inputs(1)[0].shape[1:]), tuple(data.x_train.shape[1:])
    if wanted != given:
        raise ValueError(
            f"the data set {data.name} has inputs of shape {given}, but the model takes {wanted}; "
            f"set model.input_shape = {list(given)}."
        )
    return data


def train_networks(config: NetworksConfig, net: Net, data: Dataset, count: int, out: Path, progress: Any) -> list[Any]:
    """`count` networks from consecutive seeds, on the host; an interrupted training goes on from `out/state/train`."""
    seeds = [config.seed + i for i in range(count)]
    progress.start(f"training {len(seeds)} networks", config.train.epochs)

    def tell(_: int, scores: dict[str, np.ndarray]) -> None:
        progress.step(1, **{name: float(np.mean(values)) for name, values in scores.items()})

    augment = partial(images.random_crop_flip) if config.augment else None
    state = out / "state" / "train"
    result = train(net, data, config.train, seeds, checkpoint_dir=state, progress=tell, augment=augment)
    progress.done()
    return list(tree.unstack(jax.device_get(result.params)))


def labelled_batches(config: NetworksConfig, data: Dataset) -> list[tuple[jax.Array, jax.Array]]:
    """The first `match_examples` training examples with their labels, in whole batches."""
    x, y = (values[: config.match_examples] for values in (data.x_train, data.y_train))
    size = min(config.batch_size, len(x))
    starts = range(0, len(x) - size + 1, size)
    return [(jnp.asarray(x[i : i + size]), jnp.asarray(y[i : i + size])) for i in starts]


def scorer(config: NetworksConfig, net: Net, data: Dataset) -> Callable:
    """Loss and accuracy of a batch; running statistics are re-estimated first where the configuration asks for it."""
    calibration = jnp.asarray(data.x_train[: min(config.batch_size, config.match_examples)])

    def metrics(params: Any, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        if config.normalisation == "statistics":
            params = batch_statistics(net, params, calibration)
        logits = net.apply(params, x)
        return {"loss": cross_entropy(logits, y), "accuracy": accuracy(logits, y)}

    return metrics


def resolved(normalisation: Normalisation, model: Any) -> Normalisation:
    """`auto` as what it means for a model: statistics where it has BatchNorm, else nothing."""
    if normalisation != "auto":
        return normalisation
    return "statistics" if getattr(model, "norm", "none") == "batch" else "none"


def joined(found: dict[str, Outcome]) -> Outcome:
    """Return the outcomes of several variants as one; models of another network than the first one's are left out."""
    first = next(iter(found.values()))
    alike = [(label, o) for label, o in found.items() if o.network == first.network]
    tables = [t._replace(title=f"{t.title}, {label}") for label, o in found.items() for t in o.tables]
    figures = [(label, f) for label, o in found.items() for f in o.figures]
    return Outcome(
        title=first.title,
        summary=" ".join(f"{label}: {o.summary}" for label, o in found.items()),
        metrics={f"{k}_{label}": v for label, o in found.items() for k, v in o.metrics.items()},
        tables=tuple(tables),
        figures=tuple(f._replace(name=f"{f.name}_{label}", title=f"{f.title}, {label}") for label, f in figures),
        texts=first.texts,
        models={f"{stem}_{label}": leaves for label, o in alike for stem, leaves in o.models.items()},
        network=first.network,
    )
