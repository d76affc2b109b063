"""Compose relations that were learned one by one: the infinite dihedral group cut to a range, and directed cycles."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.experiments.nfe_dihedral_report import Scores, report
from permjax.experiments.registry import Experiment
from permjax.kge.base import Family, Params
from permjax.kge.graph import Graph
from permjax.kge.models import FAMILIES, against_all, moved, rows
from permjax.kge.train import KgeTraining, train_kge
from permjax.report import Outcome
from permjax.tree import nearest

NAMES = (*FAMILIES, "nfe_2_exact", "nfe_3_exact")
"""Models by name: families, two of them also in the mode `exact`."""


@dataclass(frozen=True)
class NfeDihedralConfig:
    """An experiment on composing relations.

    Attributes:
        reach: the numbers are -reach, ..., reach.
        cycles: lengths of the directed cycles.
        models: names of `FAMILIES`, or `nfe_2_exact` or `nfe_3_exact`.
        dimension: of the embeddings.
        training: how models learn the steps of the dihedral group.
        cycle_epochs: epochs for a cycle; all else is as in `training`.
        trials: number of seeds.
        seed: they are `seed`, `seed + 1`, ...
    """

    experiment: ClassVar[str] = "nfe_dihedral"
    reach: int = 10
    cycles: tuple[int, ...] = (3, 5, 12)
    models: tuple[str, ...] = (
        "affine", "nfe_1", "nfe_2_exact", "nfe_2", "nfe_3", "distmult", "complex", "rotate", "transe",
    )  # fmt: skip
    dimension: int = 32
    training: KgeTraining = KgeTraining(learning_rate=0.02, decay=0.995, epochs=600, batch_size=16, valid_every=0)
    cycle_epochs: int = 1000
    trials: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if unknown := [name for name in self.models if name not in NAMES]:
            message = f"there is no model {unknown[0]!r}{nearest(unknown[0], NAMES)}; choose from {', '.join(NAMES)}."
            raise ValueError(message)
        if self.reach < 2 or min(self.cycles, default=3) < 3:
            raise ValueError("reach must be 2 or more, and a cycle has 3 or more edges.")
        if self.trials < 1 or not self.models:
            raise ValueError("trials must be at least 1, and there must be one model or more.")


def run(config: NfeDihedralConfig, out: Path, progress: Any) -> Outcome:  # noqa: ARG001
    """Run the experiment.

    Args:
        config: what to do.
        out: folder of the run; nothing is kept in it, as every model takes seconds.
        progress: told about models.

    Returns:
        Metrics, tables and figures.
    """
    seeds = [config.seed + number for number in range(config.trials)]
    progress.start("training", len(config.models) * (1 + len(config.cycles)))
    found = {}
    for name in config.models:
        family = model_family(name, config.dimension)
        steps, compositions = _dihedral(config, family, seeds, progress)
        cycles = {n: _cycle(config, family, n, seeds, progress) for n in config.cycles}
        found[name] = Scores(steps, compositions, cycles)
    progress.done()
    return report(config, found)


def model_family(name: str, dimension: int) -> Family:
    """The family of a name of `NAMES`."""
    if name.endswith("_exact"):
        return replace(FAMILIES[name.removesuffix("_exact")](dimension), mode="exact")  # pyright: ignore[reportCallIssue]
    return FAMILIES[name](dimension)


def dihedral_graph(reach: int) -> Graph:
    """The numbers from -reach to reach with the steps T: x -> x + 1 and S: x -> -x wherever they do not leave them."""
    numbers = range(-reach, reach + 1)
    edges = [(x, 0, x + 1) for x in numbers[:-1]] + [(x, 1, -x) for x in numbers]
    triples = np.array([(h + reach, r, t + reach) for h, r, t in edges], np.int32)
    return Graph("dihedral", tuple(map(str, numbers)), ("T", "S"), triples, triples, triples)


def cycle_graph(n: int) -> Graph:
    """The directed cycle 0 -> 1 -> ... -> n - 1 -> 0."""
    triples = np.array([(x, 0, (x + 1) % n) for x in range(n)], np.int32)
    return Graph(f"cycle of {n}", tuple(map(str, range(n))), ("next",), triples, triples, triples)


def composed_queries(reach: int) -> np.ndarray:
    """Starts x with the answers of T after S, 1 - x, and S after T, -1 - x, none out of range: ids `[starts, 3]`."""
    starts = np.arange(1 - reach, reach)
    return np.stack([starts, 1 - starts, -1 - starts], axis=1) + reach


def _dihedral(
    config: NfeDihedralConfig, family: Family, seeds: Sequence[int], progress: Any
) -> tuple[np.ndarray, np.ndarray]:
    graph = dihedral_graph(config.reach)
    result = train_kge(family, graph, config.training, seeds, together=True)
    asked = composed_queries(config.reach)
    progress.step(1)
    models = tree.unstack(result.params)
    return (
        np.array([np.mean(known(family, params, jnp.asarray(graph.train))) for params in models]),
        np.array([np.mean(composed(family, params, jnp.asarray(asked))) for params in models]),
    )


def _cycle(config: NfeDihedralConfig, family: Family, n: int, seeds: Sequence[int], progress: Any) -> np.ndarray:
    graph = cycle_graph(n)
    training = replace(config.training, epochs=config.cycle_epochs)
    result = train_kge(family, graph, training, seeds, together=True)
    progress.step(1)
    triples = jnp.asarray(graph.train)
    return np.array([np.mean(known(family, params, triples)) for params in tree.unstack(result.params)])


@partial(jax.jit, static_argnums=0)
def known(family: Family, params: Params, triples: jax.Array) -> jax.Array:
    """Which triples have their tail above all other entities."""
    return _first(against_all(family, params, moved(family, params, triples[:, 0], triples[:, 1])), triples[:, 2])


@partial(jax.jit, static_argnums=0)
def composed(family: Family, params: Params, asked: jax.Array) -> jax.Array:
    """Which answers to T after S, and to S after T, composed as elements of the group, are right."""
    once, turn = (family.relation(rows(params["relation"], jnp.full(len(asked), r))) for r in (0, 1))
    start = family.entity(rows(params["entity"], asked[:, 0]))
    orders = (family.compose(once, turn), family.compose(turn, once))
    right = [
        _first(against_all(family, params, family.act(element, start)), asked[:, 1 + number])
        for number, element in enumerate(orders)
    ]
    return jnp.stack(right)


def _first(scores: jax.Array, answers: jax.Array) -> jax.Array:
    right = jnp.arange(scores.shape[1])[None] == answers[:, None]
    own = jnp.max(jnp.where(right, scores, -jnp.inf), axis=1, keepdims=True)
    return jnp.all((scores < own) | right, axis=1)


EXPERIMENT = Experiment(NfeDihedralConfig, run)
