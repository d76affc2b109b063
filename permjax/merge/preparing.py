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
from permjax.symmetry.program import Survey, Use, survey
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
    for number, (_, owner) in enumerate(chunks):
        if owner is not None and (owner.min() < 0 or owner.max() >= len(models)):
            raise ValueError(
                f"batch {number}: owners reach from {owner.min()} to {owner.max()}, but the models are numbered "
                f"0..{len(models) - 1}."
            )


def check_inputs(apply: Apply, model: Any, inputs: Sequence[Any]) -> None:
    """Check that a function takes a batch of data; nothing is computed.

    Raises:
        ValueError: tells the shapes and what is wrong with them.
    """
    try:
        jax.eval_shape(apply, model, *inputs)
    except (TypeError, ValueError) as error:
        shapes = ", ".join(str(np.shape(x)) for x in jax.tree.leaves(inputs))
        message = f"`apply` does not take batches of the calibration data, of shape {shapes}, with the models' leaves "
        raise ValueError(
            f"{message}({str(error).partition(chr(10))[0]}); give it data as the models were trained on."
        ) from error


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
    for one, model in zip(network.applies, models, strict=True):
        check_inputs(one, model, inputs)
    used = survey(network.applies[0], models[0], *inputs)
    network.check(used)
    uses, biases = _times(used), _biases(spec, used, network.applies[0], models[0], inputs)
    summed = contracted_axes(network.applies[0], models[0], *inputs)
    named = {n: np.asarray(x) for n, x in tree.flatten(wide_average(network.wide, models, summed)).items()}
    if unknown := [name for name in keep if name not in named]:
        raise ValueError(f"keep names the leaf '{unknown[0]}'{tree.nearest(unknown[0], named)}, which the models lack.")
    weights = {leaf.name for leaf in spec.leaves if leaf.role == "weight"}
    fits = frozenset(n for n in uses if uses[n] == 1 and n in weights and n not in keep)
    running = None
    if batch_statistics is not None and mode == "sequential":
        running = replace(network, applies=many(batch_statistics, len(models)))
        _check_running(running.applies[0], models[0], inputs, used)
    constant = batch_statistics is not None
    return Sweep(network, models, named, biases, fits, mode, constant, running, positions, key)


def _check_running(batch_statistics: Callable, model: Any, inputs: Sequence[Any], used: Survey) -> None:
    theirs, wanted = (
        [use.ref.leaf for use in found.uses] for found in (survey(batch_statistics, model, *inputs), used)
    )
    if theirs != wanted:
        raise ValueError(
            f"`batch_statistics` contracts {len(theirs)} leaves, `apply` {len(wanted)}, or others; in mode "
            "'sequential' it has to run the whole network, as a training step does: layers are fitted on what it makes."
        )


def _times(used: Survey) -> Counter[str]:
    """Return how often every leaf is used at one place of the loops over it.

    Transposed convolutions count twice, as they cannot be fitted either.
    """
    counts: Counter[str] = Counter()
    for (leaf, _), times in Counter((use.ref.leaf, use.ref.at) for use in used.uses).items():
        counts[leaf] = max(counts[leaf], times)
    counts.update(use.ref.leaf for use in used.uses if _is_transposed(use))
    counts.update(leaf for leaf in used.fetched if leaf in counts)
    return counts


def _biases(spec: PermutationSpec, used: Survey, apply: Apply, model: Any, inputs: Sequence[Any]) -> dict[str, str]:
    """Return the bias that is added after every leaf, and after no other."""
    after: dict[str, str] = {}

    def trace(params: Any, *inputs: Any) -> None:
        leaves = capture(apply, spec, params, *inputs).leaves
        after.update({name: io.bias for name, io in leaves.items() if io.bias is not None})

    jax.eval_shape(trace, model, *inputs)
    served = Counter(after.values())
    found = {use.ref.leaf: (use, after[use.ref.leaf]) for use in used.uses if use.ref.leaf in after}
    return {leaf: bias for leaf, (use, bias) in found.items() if served[bias] == 1 and _fits(spec, use, bias)}


def _is_transposed(use: Use) -> bool:
    """Tell whether a convolution spreads its input out first, for which there are no statistics."""
    return any(n != 1 for n in use.eqn.params.get("lhs_dilation") or ())


def _fits(spec: PermutationSpec, use: Use, bias: str) -> bool:
    """Tell whether a bias leaf has the axes of the loops over a leaf and of what it makes, and no others."""
    axes, places = spec.leaf(use.ref.leaf).axes, (*(i for i, _ in use.ref.at), *use.made)
    return spec.leaf(bias).role == "weight" and spec.leaf(bias).axes == tuple(axes[i] for i in places)


def many(function: Callable | Sequence[Callable], count: int) -> tuple[Callable, ...]:
    """Return one function for each model."""
    return (function,) * count if callable(function) else tuple(function)
