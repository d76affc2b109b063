"""What a fit needs before it starts: checked arguments, the averaged weights, and which leaves can be fitted."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from permjax import tree
from permjax.merge.block_apply import Apply, block_apply
from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.statistics import Statistics
from permjax.merge.sweep import Chunk, Sweep
from permjax.plan import Plan
from permjax.symmetry.capture import capture
from permjax.symmetry.program import Use, survey
from permjax.symmetry.spec import PermutationSpec


def check_request(
    models: tuple,
    chunks: Sequence[Chunk],
    statistics: Statistics | None,
    mode: str,
    targets: str,
    owners: Any,
    at_once: bool,
    key: jax.Array | None,
    positions: int | None,
) -> None:
    """Check the arguments of `pleas` that do not depend on the plan.

    Raises:
        ValueError: says which do not go together, or which model is not finite.
    """
    if len(models) < 2:
        raise ValueError(f"merging needs two models or more, not {len(models)}.")
    for index, model in enumerate(models):
        tree.check_finite(model, f"model {index}")
    known = {"mode": (mode, ("parallel", "sequential", "separate")), "targets": (targets, ("mean", "owner"))}
    for name, (value, choices) in known.items():
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; choose from {list(choices)}.")
    if (statistics is None) == (not chunks):
        raise ValueError("give either calibration `data` or the `statistics` collected from it.")
    if mode == "sequential" and (statistics is not None or not at_once):
        raise ValueError(
            "mode 'sequential' fits each layer on what the merged network makes of the data: it needs all data at once."
        )
    if (targets == "owner") != (owners is not None) and statistics is None:
        raise ValueError("targets 'owner' need `owners`, one array for each batch, and only these use them.")
    if mode == "separate" and targets == "owner":
        raise ValueError("mode 'separate' fits every parent's own results; targets 'owner' go with the other modes.")
    if positions is not None and key is None:
        raise ValueError("`positions` are drawn at random; give a `key`.")


def prepared(
    spec: PermutationSpec,
    models: tuple,
    plan: Plan,
    apply: Apply | Sequence[Apply],
    chunks: Sequence[Chunk],
    statistics: Statistics | None,
    mode: Any,
    keep: Sequence[str],
    batch_statistics: Callable | Sequence[Callable] | None,
    positions: int | None,
    key: jax.Array | None,
) -> Sweep:
    """Return the walk that `pleas` makes: averaged weights, biases, and the leaves that it fits.

    Raises:
        ValueError: models, plan and `keep` that do not fit.
    """
    network = block_apply(spec, plan, apply)
    if len(models) != network.wide.models:
        raise ValueError(f"the plan is for {network.wide.models} models, but {len(models)} were given.")
    for index, (model, source) in enumerate(zip(models, network.wide.sources, strict=True)):
        source.validate({name: np.shape(leaf) for name, leaf in tree.flatten(model).items()}, f"model {index}")
    inputs = statistics.inputs if statistics is not None else chunks[0][0]
    uses, biases = _uses(spec, network.applies[0], models[0], inputs)
    summed = contracted_axes(network.applies[0], models[0], *inputs)
    named = {n: np.asarray(x) for n, x in tree.flatten(wide_average(network.wide, models, summed)).items()}
    if unknown := [name for name in keep if name not in named]:
        raise ValueError(f"keep names the leaf '{unknown[0]}'{tree.nearest(unknown[0], named)}, which the models lack.")
    weights = {leaf.name for leaf in spec.leaves if leaf.role == "weight"}
    fits = frozenset(n for n in uses if uses[n] == 1 and n in weights and n not in keep)
    running = None
    if batch_statistics is not None and mode == "sequential":
        running = replace(network, applies=many(batch_statistics, len(models)))
    constant = batch_statistics is not None
    return Sweep(network, models, named, biases, fits, mode, constant, running, positions, key)


def _uses(spec: PermutationSpec, apply: Apply, model: Any, inputs: Sequence[Any]) -> tuple[Counter, dict[str, str]]:
    """Return how often every leaf is contracted at one place of the loops over it, and the bias added after it.

    Transposed convolutions count twice, as they cannot be fitted either.
    """
    uses = survey(apply, model, *inputs).uses
    counts: Counter[str] = Counter()
    for (leaf, _), times in Counter((use.ref.leaf, use.ref.at) for use in uses).items():
        counts[leaf] = max(counts[leaf], times)
    counts.update(use.ref.leaf for use in uses if _is_transposed(use))
    after: dict[str, str] = {}

    def trace(params: Any, *inputs: Any) -> None:
        leaves = capture(apply, spec, params, *inputs).leaves
        after.update({name: io.bias for name, io in leaves.items() if io.bias is not None})

    jax.eval_shape(trace, model, *inputs)
    served = Counter(after.values())
    return counts, {leaf: bias for leaf, bias in after.items() if served[bias] == 1 and _fits(spec, leaf, bias)}


def _is_transposed(use: Use) -> bool:
    """Tell whether a convolution spreads its input out first, for which there are no statistics."""
    return any(n != 1 for n in use.eqn.params.get("lhs_dilation") or ())


def _fits(spec: PermutationSpec, leaf: str, bias: str) -> bool:
    """Tell whether a bias leaf has nothing but axes of the leaf that it follows."""
    return spec.leaf(bias).role == "weight" and set(spec.leaf(bias).axes) <= set(spec.leaf(leaf).axes)


def many(function: Callable | Sequence[Callable], count: int) -> tuple[Callable, ...]:
    """Return one function for each model."""
    return (function,) * count if callable(function) else tuple(function)
