"""The models that are edited until they collapse: trained here on a generated world, and kept for other runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from permjax import tree
from permjax.config import config_hash
from permjax.data.corpora import read_corpora
from permjax.data.dataset import data_root
from permjax.edit.base import Statistics
from permjax.edit.covariance import collect_covariances
from permjax.edit.facts import World, WorldConfig, edit_requests, make_world, task_rows
from permjax.edit.mixture import KINDS, mixture_rows
from permjax.edit.prefixes import random_prefixes
from permjax.edit.prepare import PreparedEdit, Scored, prepare_all
from permjax.experiments.collapse_editors import EditorsConfig
from permjax.experiments.data_root import DataRoot
from permjax.experiments.language_networks import Layout, SizeConfig, language_network
from permjax.merge.perplexity import Convention, Sentences
from permjax.nets.base import Net
from permjax.train import TrainConfig, train

_TRAINED, _COVARIANCE, _PROBE = 1, 2, 3  # seeds of rows, so that no two uses share them
_ROWS = 32  # of a batch
_PADDED = 16  # tokens of the rows of an edit


@dataclass(frozen=True)
class BaseSizeConfig(SizeConfig):
    """The size of a base.

    Attributes:
        positions: longest sequence; training rows have as many tokens.
    """

    layers: int = 4
    width: int = 64
    hidden: int = 256
    positions: int = 24


@dataclass(frozen=True)
class BaseConfig:
    """A model that is trained in the run.

    Attributes:
        world: what it is told.
        text: a file of sentences for the text, from `data.root` on; invented by default.
        size: of the model.
        rows: of training, all full of tokens.
        train: how it is trained.
    """

    world: WorldConfig = WorldConfig()
    text: str | None = None
    size: BaseSizeConfig = BaseSizeConfig()
    rows: int = 12_000
    train: TrainConfig = TrainConfig(
        epochs=12,
        batch_size=48,
        optimizer="adamw",
        learning_rate=3e-3,
        schedule="cosine",
        warmup_steps=100,
        weight_decay=0.01,
    )


@dataclass(frozen=True)
class Base:
    """A trained model and its world.

    Attributes:
        layout: of the model.
        seed: of its first weights and the order of its data.
        net: the network.
        params: its weights.
        world: what it was told.
    """

    layout: Layout
    seed: int
    net: Net
    params: Any
    world: World

    def edits(self, form: Any, count: int, *, start: int = 0, prefixes: int = 6) -> list[PreparedEdit]:
        """Requests for short names as arrays, all of the same length; see `edit_requests`."""
        requests = edit_requests(self.world, form, count=count, start=start)
        pieces = random_prefixes([s[:-2] for s in self.world.text], jax.random.key(0), count=prefixes, words=(3, 6))
        return prepare_all(requests, self.world.tokenizer, prefixes=pieces, pad_to=_PADDED)

    def subjects(self, count: int) -> list[str]:
        """The subjects of the first so many edits."""
        return [request.subject for request in edit_requests(self.world, "first", count=count)]

    def rows(self, kind: str, count: int, seed: int, *, held_out: bool = False) -> np.ndarray:
        """Rows of a mixture of `KINDS`."""
        length = self.net.config.positions
        return mixture_rows(self.world, count, length, seed=seed, shares=KINDS[kind], held_out=held_out)

    def probe(self, kinds: Sequence[str], count: int, *, seed: int = _PROBE) -> dict[str, list[Sentences]]:
        """Rows of mixtures to measure perplexity on, with text that was not trained on; other ones for each seed."""
        return {kind: batches(self.rows(kind, count, seed, held_out=True)) for kind in kinds}

    def tasks(self, without: Sequence[str]) -> dict[str, Scored]:
        """Questions about facts of other subjects, and sums."""
        return task_rows(self.world, without=without, pad_to=_PADDED)


@dataclass(frozen=True)
class OnBasesConfig:
    """What all experiments on trained bases have in common.

    Attributes:
        base: how models are made.
        settings: hyper-parameters of the editors.
        covariance_rows: of a mixture, from which covariances are collected.
        probe_rows: held-out rows of each group for perplexity.
        convention: of perplexity.
        data: where a given text is.
        cache: folder that keeps trained models for other runs; in the folder of the run by default.
        seeds: number of models of a layout, or of pairs of them.
        seed: the models have the seeds `seed`, `seed + 1`, ...
    """

    base: BaseConfig = BaseConfig()
    settings: EditorsConfig = EditorsConfig()
    covariance_rows: int = 1024
    probe_rows: int = 64
    convention: Convention = "token"
    data: DataRoot = DataRoot()
    cache: str | None = None
    seeds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers with which nothing can be run."""
        for name in ("covariance_rows", "probe_rows", "seeds"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")

    def folder(self, out: Path) -> Path:
        """Where trained models are kept, for a run in the folder `out`."""
        return out / "state" if self.cache is None else Path(self.cache)

    def trained(self, layout: Layout, out: Path, progress: Any, *, more: int = 0) -> list[Base]:
        """The models of a layout, and so many more."""
        seeds = range(self.seed, self.seed + self.seeds + more)
        return bases(self.base, layout, seeds, self.data, self.folder(out), progress)


def bases(
    config: BaseConfig, layout: Layout, seeds: Sequence[int], data: DataRoot, folder: Path, progress: Any
) -> list[Base]:
    """Train models, or find them trained.

    Args:
        config: what to train.
        layout: of the models.
        seeds: one for each.
        data: where the text is.
        folder: where trained models are kept, by layout, seed and what they were trained on.
        progress: told about training.
    """
    world = _world(config, data.root)
    length = config.size.positions
    net = language_network(config.size, layout, world.tokenizer.size, length, tied=True)
    rows = mixture_rows(world, config.rows, length + 1, seed=_TRAINED)
    found = []
    for seed in seeds:
        progress.start(f"training a base, {layout}, seed {seed}", config.train.epochs)
        own = folder / f"{layout}-{seed}-{config_hash(config)}"
        told = (rows[:, :-1], rows[:, 1:])
        result = train(net, told, config.train, [seed], checkpoint_dir=own, progress=_teller(progress))
        found.append(Base(layout, seed, net, tree.unstack(result.params)[0], world))
        progress.done()
    return found


def _teller(progress: Any) -> Callable[[int, dict[str, np.ndarray]], None]:
    return lambda _, scores: progress.step(1, **{name: float(np.mean(values)) for name, values in scores.items()})


@lru_cache(maxsize=4)
def _world(config: BaseConfig, root: str | None) -> World:
    if config.text is None:
        return make_world(config.world)
    corpora = read_corpora([data_root(root) / config.text])
    return make_world(config.world, [sentence for some in corpora.values() for sentence in some])


def batches(rows: np.ndarray) -> list[Sentences]:
    """Full rows as batches without padding; rows that fill no batch are left out."""
    size = min(_ROWS, len(rows))
    full = rows[: len(rows) // size * size].reshape(-1, size, rows.shape[1])
    return [Sentences(batch, np.ones(batch.shape, bool)) for batch in full]


def statistics_of(
    base: Base, net: Net, params: Any, kind: str, layers: Sequence[int], count: int, *, held_out: bool = False
) -> Statistics:
    """Second moments of keys over rows of a mixture, or the identity for the kind `identity`.

    Args:
        base: whose world.
        net: of the parameters, which need not be those of the base.
        params: the parameters.
        kind: of `KINDS`, or `identity`.
        layers: whose keys.
        count: rows.
        held_out: take text that is not trained on.
    """
    if kind == "identity":
        return Statistics.of(net, params, None)
    rows = batches(base.rows(kind, count, _COVARIANCE, held_out=held_out))
    return Statistics.of(net, params, collect_covariances(net, params, rows, layers))
