"""The running statistics of BatchNorm in a merged network."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.merge.block_apply import BlockApply
from permjax.merge.wide import Wide, mean_units
from permjax.permutation import namespace


def wide_statistics(wide: Wide, params: Any, batch_statistics: Sequence[Callable], data: Iterable[tuple]) -> Any:
    """Return a merged network with fresh running statistics: the mean over all batches of those of one batch.

    Every model's view gives statistics of its own; a shared unit gets their mean.

    Args:
        wide: the geometry.
        params: the merged parameters; NumPy leaves stay NumPy.
        batch_statistics: for each model, `batch_statistics(params, *inputs) -> params` with those of the batch.
        data: batches as tuples of inputs.

    Raises:
        ValueError: there are no statistics or no batches, or statistics that are not finite.
    """
    names = [leaf.name for leaf in wide.spec.leaves if leaf.role == "statistic"]
    if not names:
        raise ValueError("The spec has no leaf of role statistic; name them by `statistics=` when you trace it.")
    network = BlockApply(wide, tuple(batch_statistics), "tuple")

    def collect(params: Any, *inputs: Any) -> dict[str, Any]:  # op by op: compiling takes longer than running
        views = [tree.flatten(view) for view in network.views(params, *inputs)]
        return {name: _joined(wide, name, [view[name] for view in views]) for name in names}

    held = jax.tree.map(jnp.asarray, params)
    found = [{name: np.asarray(x, np.float64) for name, x in collect(held, *batch).items()} for batch in data]
    if not found:
        raise ValueError("`data` gave no batches; give a list of batches, each a tuple of inputs.")
    named = tree.flatten(params)
    fresh = {name: np.mean([batch[name] for batch in found], axis=0) for name in names}
    tree.check_finite(fresh, "the re-estimated statistics")
    typed = {n: namespace(named[n]).asarray(x.astype(np.asarray(named[n]).dtype)) for n, x in fresh.items()}
    return tree.unflatten(params, named | typed)


def statistics_of_views(wide: Wide, params: Any, views: Sequence[Any]) -> Any:
    """Return merged parameters with the running statistics of the parameters of every view; traceable."""
    names = [leaf.name for leaf in wide.spec.leaves if leaf.role == "statistic"]
    seen = [tree.flatten(view) for view in views]
    joined = {name: _joined(wide, name, [view[name] for view in seen]) for name in names}
    return tree.unflatten(params, tree.flatten(params) | joined)


def _joined(wide: Wide, name: str, views: list[Any]) -> Any:
    """Return the mean over the units with one label along the one axis that is widened."""
    places = [i for i, axis in enumerate(wide.spec.leaf(name).axes) if wide.touches(axis)]
    place = places[0] if places else 0
    axis = wide.spec.leaf(name).axes[place]
    return mean_units(wide, axis, views, wide.views, place)
