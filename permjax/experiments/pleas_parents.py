"""Training the parents of a task, and the network that learns everything at once."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from permjax import tree
from permjax.data import images
from permjax.experiments.networks import NetworksConfig
from permjax.experiments.pleas_tasks import Task
from permjax.nets.base import Net
from permjax.nets.registry import build
from permjax.train import TrainConfig, train


class Trained(NamedTuple):
    """Networks of one architecture.

    Attributes:
        net: how to apply them.
        models: for every seed the parents of that seed, or the one network that is no parent; on the host.
    """

    net: Net
    models: list[Any]


def train_parents(
    config: NetworksConfig,
    task: Task,
    seeds: Sequence[int],
    out: Path,
    progress: Any,
    *,
    base: TrainConfig | None = None,
) -> Trained:
    """The parents of a task for every seed; an interrupted training goes on from `out/state`.

    No two networks start from the same weights: parent m of seed s is trained from the seed s * parents + m.

    Args:
        config: the network, whose number of classes is set to that of a parent's head, and how it is trained.
        task: what the parents learn.
        seeds: one number for every set of parents.
        out: folder of the run.
        progress: told about training.
        base: how the bases of a task that has some are trained; as the parents by default.
    """
    net = build(replace(config.model, classes=len(task.classes[0])))
    loop = _Loop(config, out / "state", progress)
    numbers = [[seed * len(task.train) + m for seed in seeds] for m in range(len(task.train))]
    if task.bases:
        found = _fine_tuned(loop, net, task, numbers, base or config.train)
    else:
        found = [loop.train(f"parent_{m}", net, _data(task, m), mine) for m, mine in enumerate(numbers)]
    return Trained(net, list(zip(*found, strict=True)))


def train_joint(config: NetworksConfig, task: Task, seeds: Sequence[int], out: Path, progress: Any) -> Trained:
    """One network of the parents' width for every seed that learns what all parents know, from all their images.

    It is what a merge could at best be. As it sees every image of all parents, an epoch is as many times longer.

    Args:
        config: the network, whose number of classes is set to all of the task's, and how it is trained.
        task: what to learn.
        seeds: one number for every network.
        out: folder of the run.
        progress: told about training.
    """
    net = build(replace(config.model, classes=task.joint_classes))
    numbers = [seed * len(task.train) for seed in seeds]
    data = (*task.joint_train, *task.joint_test)
    return Trained(net, _Loop(config, out / "state", progress).train("joint", net, data, numbers))


class _Loop(NamedTuple):
    """How everything is trained."""

    config: NetworksConfig
    state: Path
    progress: Any

    def train(self, name: str, net: Net, data: Sequence[np.ndarray], seeds: Sequence[int]) -> list[Any]:
        """Train a network for every seed, on the host."""
        config = self.config.train
        self.progress.start(f"training {name.replace('_', ' ')}", config.epochs)

        def tell(_: int, scores: dict[str, np.ndarray]) -> None:
            self.progress.step(1, **{name: float(np.mean(values)) for name, values in scores.items()})

        folder, augment = self.state / name, images.random_crop_flip if self.config.augment else None
        result = train(net, data, config, list(seeds), checkpoint_dir=folder, progress=tell, augment=augment)
        self.progress.done()
        return list(tree.unstack(jax.device_get(result.params)))


def _fine_tuned(loop: _Loop, net: Net, task: Task, numbers: list[list[int]], base: TrainConfig) -> list[list[Any]]:
    """Train the bases of every parent, and then every parent from its base."""
    whole = build(replace(loop.config.model, classes=task.joint_classes))
    first = loop._replace(config=replace(loop.config, train=base))
    found = []
    for m, mine in enumerate(numbers):
        bases = zip(first.train(f"base_{m}", whole, task.bases[m], mine), mine, strict=True)
        found.append([loop.train(f"parent_{m}_{n}", _from_base(net, b), _data(task, m), [n])[0] for b, n in bases])
    return found


def _from_base(net: Net, base: Any) -> Net:
    """Return the network that starts from a base; only the leaves of another shape, those of its head, start anew."""

    def init(key: jax.Array) -> Any:
        return jax.tree.map(lambda new, old: old if old.shape == new.shape else new, net.init(key), base)

    return net._replace(init=init)


def _data(task: Task, parent: int) -> tuple[np.ndarray, ...]:
    return (*task.train[parent], *task.test[parent])
