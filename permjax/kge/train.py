"""Training of embeddings: both directions of every triple, several seeds, the best model by validation."""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from permjax.io.runs import load_run, save_run
from permjax.kge.base import Family, Params
from permjax.kge.batches import Examples, examples, most_tails, order
from permjax.kge.graph import Graph
from permjax.kge.queries import Queries, queries
from permjax.kge.rank import model_scorer, rank_metrics, rank_queries
from permjax.kge.step import KgeTraining, Programs, State, programs

Progress: TypeAlias = Callable[[int, dict[str, np.ndarray]], None]
History: TypeAlias = dict[str, np.ndarray]

__all__ = ["DivergedError", "KgeResult", "KgeTraining", "train_kge"]


class DivergedError(ValueError):
    """A loss or a parameter is no longer a finite number; says after which epoch, and what to try."""


class KgeResult(NamedTuple):
    """Trained models.

    Attributes:
        params: of each seed those with the best MRR on the validation split, or without validation the last ones;
            every leaf has a first axis over seeds, which `permjax.tree.unstack` takes apart.
        history: arrays [epochs, seeds]: `loss`, the mean over an epoch as its batches were met; `valid_mrr` (filtered,
            realistic, NaN where not measured); `seconds`. NaN after the end of a seed.
        best_epoch: of each seed the epoch, from 0 on, after which `params` were kept.
        valid_mrr: of each seed the MRR of `params` on the validation split; NaN without one.
        seconds: of all epochs, validation, compilation and checkpoints included.
        triples_per_second: median over epochs, both directions counted, validation left out.
    """

    params: Params
    history: History
    best_epoch: Int[np.ndarray, " seeds"]
    valid_mrr: Float[np.ndarray, " seeds"]
    seconds: float
    triples_per_second: float


class _Models(NamedTuple):
    """Seeds that are trained by the same call, and the best models so far; None before the first validation."""

    state: State
    best: Params | None


def train_kge(
    family: Family,
    graph: Graph,
    training: KgeTraining,
    seeds: Sequence[int] = (0,),
    *,
    checkpoint_dir: str | Path | None = None,
    progress: Progress | None = None,
    together: bool | None = None,
) -> KgeResult:
    """Train one model per seed; a seed decides the initial rows, the order of the triples, and the negatives.

    Args:
        family: the family of embeddings.
        graph: its training triples are learned in both directions: relation r + R is the inverse of r. Of each seed,
            the parameters with the best MRR on the validation triples are kept.
        training: loss, optimizer, schedule.
        seeds: one number per model.
        checkpoint_dir: where to keep the state. A run that finds its own state there goes on from it and ends with the
            bits of an uninterrupted one.
        progress: called as `progress(epoch, values)` after each epoch, with `loss` and `valid_mrr` of each seed and
            `triples_per_second`.
        together: whether one compiled call trains all seeds, or one each. By default they are trained together on an
            accelerator only: on a CPU, that is not quicker. The results are the same up to rounding.

    Raises:
        DivergedError: a loss is no longer a number.
        ValueError: there is no seed, or `checkpoint_dir` holds another run.

    Example:
        >>> result = train_kge(Nfe1(dimension=64), knowledge_graph("family"), KgeTraining(epochs=10), seeds=[0, 1, 2])
        >>> result.valid_mrr.mean()

    Source: Xiao et al., Knowledge Graph Embedding by Normalizing Flows (AAAI 2023), whose loss is the default.
    """
    _check(seeds)
    run = _prepare(family, graph, training, seeds, together)
    about = {} if checkpoint_dir is None else _about(family, graph, training, seeds)
    begin, models, history = run.start(checkpoint_dir, about)
    for epoch in range(begin, training.epochs):
        active = _active(history["valid_mrr"], training.patience)
        if not active.any():
            break
        models = run.advance(models, history, epoch, active, checkpoint_dir)
        if epoch + 1 == training.epochs or (epoch + 1) % max(training.valid_every, 1) == 0:
            models = run.validate(models, history, epoch, active)
            if checkpoint_dir is not None:
                save_run(checkpoint_dir, epoch + 1, (_concatenated(models), history), about)
        if progress is not None:
            rate = run.count * active.sum() / np.nansum(history["seconds"][epoch])
            shown = {name: history[name][epoch] for name in ("loss", "valid_mrr")}
            progress(epoch, {**shown, "triples_per_second": np.asarray(rate)})
    return _result(models, history, run.count)


@dataclass(frozen=True)
class _Run:
    """What stays the same from epoch to epoch."""

    family: Family
    graph: Graph
    training: KgeTraining
    seeds: Sequence[int]
    groups: tuple[slice, ...]
    programs: Programs
    found: Examples
    asked: Queries | None

    @property
    def count(self) -> int:
        """Examples of an epoch."""
        return len(self.found.heads)

    def keys(self, group: slice) -> Array:
        """One key per seed."""
        return jnp.stack([jax.random.key(seed) for seed in self.seeds[group]])

    def start(self, folder: str | Path | None, about: dict[str, Any]) -> tuple[int, list[_Models], History]:
        """The first epoch to do with the models and the history before it, from a checkpoint if there is one."""
        names = ("loss", "valid_mrr", "seconds", "valid_seconds")
        history = {name: np.full((self.training.epochs, len(self.seeds)), np.nan, np.float32) for name in names}
        if folder is not None:
            state = jax.eval_shape(self.programs.init, self.keys(slice(None)))
            like = _Models(state, None if self.asked is None else state.params), history
            if saved := load_run(folder, like, about):
                models, history = saved.state
                split = [jax.tree.map(lambda x, some=some: jnp.asarray(x[some]), models) for some in self.groups]
                return saved.step, split, {name: np.array(values) for name, values in history.items()}
        return 0, [_Models(self.programs.init(self.keys(some)), None) for some in self.groups], history

    def advance(
        self, models: list[_Models], history: History, epoch: int, active: np.ndarray, folder: str | Path | None
    ) -> list[_Models]:
        """An epoch of all groups in which a seed goes on; fills in their losses and seconds."""
        rate = self.training.learning_rate * self.training.decay**epoch
        done = []
        for group, some in zip(self.groups, models, strict=True):
            if active[group].any():
                begin = time.perf_counter()
                batches = [order(seed, epoch, self.count, self.training.batch_size) for seed in self.seeds[group]]
                first, keys = epoch * len(batches[0]), self.keys(group)
                state, totals, finite = self.programs.advance(
                    some.state, keys, np.stack(batches), first, rate, self.found
                )
                some = some._replace(state=state)
                lost = np.asarray(self.seeds)[group][active[group] & ~np.asarray(finite)]
                if len(lost):
                    raise DivergedError(_diverged(self.training, epoch, lost.tolist(), folder))
                history["loss"][epoch, group] = np.where(active[group], np.asarray(totals) / self.count, np.nan)
                share = (time.perf_counter() - begin) / active[group].sum()
                history["seconds"][epoch, group] = np.where(active[group], share, np.nan)
            done.append(some)
        return done

    def validate(self, models: list[_Models], history: History, epoch: int, active: np.ndarray) -> list[_Models]:
        """Rank the validation triples for the seeds that go on, and keep what is better than before."""
        if self.asked is None:
            return models
        before = np.fmax.reduce(history["valid_mrr"], axis=0, initial=-np.inf)
        done = []
        for group, some in zip(self.groups, models, strict=True):
            for seed in np.arange(len(self.seeds))[group][active[group]]:
                begin = time.perf_counter()
                params = jax.tree.map(lambda x, at=seed - group.start: x[at], some.state.params)
                ranks = rank_queries(model_scorer(self.family, params, self.graph), self.asked)
                history["valid_mrr"][epoch, seed] = rank_metrics(ranks)["mrr"]
                history["valid_seconds"][epoch, seed] = time.perf_counter() - begin
            if some.best is None:
                some = some._replace(best=jax.tree.map(jnp.copy, some.state.params))
            else:
                chosen = history["valid_mrr"][epoch, group] > before[group]
                some = some._replace(best=self.programs.better(some.best, some.state.params, chosen))
            done.append(some)
        return done


def _prepare(family: Family, graph: Graph, training: KgeTraining, seeds: Sequence[int], together: bool | None) -> _Run:
    found = examples(graph, grouped=training.loss == "k_vs_all")
    most = most_tails(found, training.batch_size) if training.loss == "k_vs_all" else 0
    together = jax.default_backend() != "cpu" if together is None else together
    groups = [slice(0, len(seeds))] if together else [slice(i, i + 1) for i in range(len(seeds))]
    compiled = programs(family, training, graph.size, 2 * len(graph.relations), most)
    asked = queries(graph, "valid") if training.valid_every else None
    on_device = Examples(*map(jnp.asarray, found))
    return _Run(family, graph, training, seeds, (*groups,), compiled, on_device, asked)


def _active(valid_mrr: Float[np.ndarray, "epochs seeds"], patience: int) -> Bool[np.ndarray, " seeds"]:
    """Which seeds go on: those whose best validation is not `patience` validations ago."""
    going = np.ones(valid_mrr.shape[1], bool)
    for seed, values in enumerate(valid_mrr.T):
        seen = values[~np.isnan(values)]
        if patience and len(seen):
            going[seed] = len(seen) - 1 - seen.argmax() < patience
    return going


def _result(models: list[_Models], history: History, count: int) -> KgeResult:
    params = [some.state.params if some.best is None else some.best for some in models]
    measured = history["valid_mrr"]
    best = np.where(np.isnan(measured), -np.inf, measured).argmax(axis=0)
    last = (~np.isnan(history["loss"])).sum(axis=0) - 1
    return KgeResult(
        params=_concatenated(params),
        history=history,
        best_epoch=np.where(np.isnan(measured).all(axis=0), last, best),
        valid_mrr=np.fmax.reduce(measured, axis=0),
        seconds=float(np.nansum(history["seconds"]) + np.nansum(history["valid_seconds"])),
        triples_per_second=count / float(np.nanmedian(history["seconds"])),
    )


def _concatenated(parts: Sequence[PyTree]) -> PyTree:
    """All seeds in one tree, without a copy where there is one group."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _check(seeds: Sequence[int]) -> None:
    if not seeds or min(seeds) < 0:
        raise ValueError(f"The seeds are {list(seeds)}; give one per model, from 0 on, such as [0, 1].")


def _about(family: Family, graph: Graph, training: KgeTraining, seeds: Sequence[int]) -> dict[str, Any]:
    """What makes two runs the same one, as JSON."""
    sums = [
        f"{split.shape} {zlib.crc32(np.ascontiguousarray(split).tobytes()):08x}" for split in (graph.train, graph.valid)
    ]
    sizes = {"entities": graph.size, "relations": len(graph.relations), "train": sums[0], "valid": sums[1]}
    return {"family": repr(family), "training": repr(training), "seeds": list(seeds), "graph": sizes}


def _diverged(training: KgeTraining, epoch: int, seeds: Sequence[int], folder: str | Path | None) -> str:
    where = "Nothing was kept, as no checkpoint folder was given."
    if folder is not None:
        where = f"The last good state, if an epoch was saved before, is still in {folder}."
    return (
        f"The loss or a parameter of seed {', '.join(map(str, seeds))} was no finite number after epoch {epoch + 1} of "
        f"{training.epochs}. Try a smaller learning_rate (now {training.learning_rate:g}), or an init_bound (now "
        f"{training.init_bound:g}) that fits gamma (now {training.gamma:g}), as coupled_bound gives it. {where}"
    )
