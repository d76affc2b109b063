"""Aligning and merging checkpoint files: all is checked before it is computed, and computed before it is written."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np

from permjax import tree
from permjax.action import permute_leaf
from permjax.experiments.alignment import HEADLINE, Alignment, explanation, metrics, pages, sentence
from permjax.experiments.architectures import FilesError
from permjax.experiments.model_files import ModelFiles, check_place, check_plan, examine, open_all, target_paths
from permjax.experiments.progress import Progress
from permjax.io.checkpoint import Checkpoint, save_checkpoint
from permjax.match.weights import weight_matching
from permjax.merge.average import average, check_aligned, slerp
from permjax.permutation import Permutations, validate
from permjax.plan import Plan
from permjax.report import Outcome
from permjax.symmetry.spec import PermutationSpec


@dataclass(frozen=True)
class AlignOptions:
    """What to align, and how.

    Attributes:
        models: two or more checkpoints (files, indices or folders); the first is the anchor.
        out: where the aligned model goes: a `.safetensors` file or a folder; with more than two models a folder that
            gets one checkpoint for each but the anchor.
        config: a JSON file with `model_type` and its fields; the `config.json` beside the models by default.
        arch: instead of a configuration, `module:function` that returns `(apply, example_inputs)`.
        matching: what is compared.
        solver: of the assignment problems; `auto` takes the quickest exact one that is there.
        seed: of the matching.
        restarts: runs of the matching, of which the best counts.
        plan: also write the permutations to this `.json` or `.safetensors` file.
        init: a plan from which the matching starts, as `plan` writes it.
    """

    models: tuple[str, ...]
    out: str
    config: str | None = None
    arch: str | None = None
    matching: Literal["weights"] = "weights"
    solver: Literal["auto", "scipy", "lapx", "optax", "auction"] = "auto"
    seed: int = 0
    restarts: int = 1
    plan: str | None = None
    init: str | None = None


@dataclass(frozen=True)
class MergeOptions(AlignOptions):
    """What to merge, and how; the options of `align` are as there.

    Attributes:
        method: the weighted average, or a point on the arc between two models.
        weights: one number for each model; equal ones by default.
        align: whether the models are aligned to the first one before.
    """

    method: Literal["average", "slerp"] = "average"
    weights: tuple[float, ...] | None = None
    align: bool = True


def align(options: AlignOptions, progress: Progress | None = None) -> Outcome:
    """Bring the units of all models into the order of the first one's, and write the models so permuted.

    The stored numbers are moved and never changed, whatever their dtype. Names, order, dtypes, metadata, shards and
    companion files of each model are kept.

    Args:
        options: see `AlignOptions`.
        progress: told about the stages.

    Returns:
        Distances before and after, the change of the outputs, and tables of models and groups.

    Raises:
        ValueError: options or files that do not fit; names the file, leaf or axis. Nothing is written then.

    Example:
        >>> outcome = align(AlignOptions(("a.safetensors", "b.safetensors"), "b_aligned.safetensors"))
        >>> outcome.metrics["l2_reduction_percent"]
    """
    checkpoints = open_all(options.models)
    targets = target_paths(options.out, checkpoints[1:])
    files = _examined(options, checkpoints, targets)
    alignment = _aligned(options, files, files.load(), progress)
    with _stage(progress, "writing"):
        for index, target in enumerate(targets, 1):
            _save_permuted(target, checkpoints[index], alignment, index)
    _save_plan(options, alignment)
    title = f"{_listed(options.models[1:])} aligned to {options.models[0]}"
    summary = f"{sentence(alignment)} Written to {_listed(targets)}."
    return _outcome(title, summary, files.spec, alignment, {})


def merge(options: MergeOptions, progress: Progress | None = None) -> Outcome:
    """Merge all models into one that is stored like the first: same names, order, dtypes, metadata and shards.

    Computed in float32 or wider, and rounded once when it is written.

    Args:
        options: see `MergeOptions`.
        progress: told about the stages.

    Returns:
        As from `align`; without alignment there are only the numbers of models and groups.

    Raises:
        ValueError: options or files that do not fit; names the file, leaf or axis. Nothing is written then.

    Example:
        >>> merge(MergeOptions(("a.safetensors", "b.safetensors"), "merged.safetensors", weights=(0.7, 0.3)))
    """
    shares = _shares(options)
    checkpoints = open_all(options.models)
    files = _examined(options, checkpoints, [Path(options.out)])
    models, alignment = files.load(), None
    check_aligned(files.spec, models)
    if options.align:
        alignment = _aligned(options, files, models, progress)
        models = alignment.after
    with _stage(progress, "merging"):
        merged, numbers = _merged(options.method, files.spec, models, shares)
        save_checkpoint(options.out, {**checkpoints[0], **tree.flatten(merged)}, like=checkpoints[0])
    _save_plan(options, alignment)
    how = sentence(alignment) if alignment else "The models were taken as they are, without alignment."
    method = {"average": "weighted average", "slerp": "point on the arc between them"}[options.method]
    summary = f"{how} Their {method} ({_listed(f'{100 * s:.4g} %' for s in shares)}) was written to {options.out}."
    title = f"{_listed(options.models)} merged"
    return _outcome(title, summary + _advice(files.spec), files.spec, alignment, numbers)


@contextmanager
def _stage(progress: Progress | None, what: str) -> Iterator[None]:
    if progress is None:
        yield
        return
    progress.start(what, 1)
    try:
        yield
        progress.step(1)
    finally:
        progress.done()


def _examined(options: AlignOptions, checkpoints: tuple[Checkpoint, ...], targets: Sequence[Path]) -> ModelFiles:
    """Check everything that can be wrong, cheap things first."""
    if options.restarts < 1:
        raise FilesError(f"restarts must be at least 1, not {options.restarts}.")
    for target in targets:
        check_place(target, checkpoints)
    if options.plan is not None:
        check_plan(options.plan, checkpoints, targets)
    return examine(checkpoints, options.config, options.arch)


def _aligned(options: AlignOptions, files: ModelFiles, models: tuple[Any, ...], progress: Progress | None) -> Alignment:
    if not files.spec.groups:
        raise FilesError(f"Nothing in {files.architecture.source} can be permuted, so there is nothing to align.")
    key, init = jax.random.key(options.seed), _start(options, files.spec)
    with _stage(progress, "matching"):
        begin = time.perf_counter()
        hyper: dict[str, Any] = {"solver": options.solver, "restarts": options.restarts, "init": init}
        result = weight_matching(files.spec, models, key=key, **hyper)
        seconds = time.perf_counter() - begin
    run = jax.jit(files.architecture.apply)
    pairs = list(zip(models, result.models, strict=True))[1:]
    with jax.default_matmul_precision("highest"):
        changes = tuple(_change(*(run(model, *files.architecture.inputs) for model in pair)) for pair in pairs)
    plan = cast(Plan, result.plan)  # matching always finds one
    return Alignment(options.models, files.spec, models, result.models, plan, result.info, changes, seconds)


def _start(options: AlignOptions, spec: PermutationSpec) -> list[Permutations] | None:
    """The permutations from which the matching starts."""
    if options.init is None:
        return None
    plan = Plan.load(options.init)
    if plan.models != len(options.models):
        raise FilesError(f"The plan {options.init} is for {plan.models} models, not {len(options.models)}.")
    try:
        found = [plan.permutations(index) for index in range(1, plan.models)]
        for permutations in found:
            validate(spec, permutations)
    except ValueError as error:
        raise FilesError(f"The plan {options.init} cannot be a start: {error}") from None
    return found


def _change(before: Any, after: Any) -> float:
    """The largest change of an output, relative to the largest output."""
    one, two = ([np.asarray(x, np.float64) for x in jax.tree.leaves(outputs)] for outputs in (before, after))
    top = max(np.abs(x).max(initial=0.0) for x in one)
    return float(max(np.abs(x - y).max(initial=0.0) for x, y in zip(one, two, strict=True)) / (top or 1.0))


def _save_permuted(target: Path, checkpoint: Checkpoint, alignment: Alignment, index: int) -> None:
    """Write a model with the units of its stored arrays in their new places, one shard at a time."""
    permutations = alignment.plan.permutations(index)

    def moved(name: str) -> np.ndarray:
        return permute_leaf(alignment.spec, alignment.spec.leaf(name), permutations, checkpoint[name].read())

    tensors = {leaf.name: partial(moved, leaf.name) for leaf in alignment.spec.leaves}
    save_checkpoint(target, {**checkpoint, **tensors}, like=checkpoint)


def _save_plan(options: AlignOptions, alignment: Alignment | None) -> None:
    if options.plan is None or alignment is None:
        return
    try:
        Path(options.plan).parent.mkdir(parents=True, exist_ok=True)
        alignment.plan.save(options.plan)
    except OSError as error:
        raise FilesError(f"The plan {options.plan} was not written ({error}); check the disk and the path.") from None


def _shares(options: MergeOptions) -> tuple[float, ...]:
    """The weights of the models, adding up to one."""
    count, weights = len(options.models), options.weights
    if options.method == "slerp" and count != 2:
        raise FilesError(f"slerp runs between two models, not {count}; use the method average for more.")
    if options.plan is not None and not options.align:
        raise FilesError("Without alignment there is no plan to write; leave out --plan, or align the models.")
    if weights is None:
        return (1 / max(count, 1),) * count
    if len(weights) != count:
        raise FilesError(f"{count} models need {count} weights, not {len(weights)} ({_listed(map(str, weights))}).")
    if not (np.isfinite(weights).all() and min(weights) >= 0 and sum(weights) > 0):
        raise FilesError(f"The weights {_listed(map(str, weights))} must be numbers >= 0, and not all of them 0.")
    return tuple(w / sum(weights) for w in weights)


def _merged(
    method: str, spec: PermutationSpec, models: tuple[Any, ...], shares: tuple[float, ...]
) -> tuple[Any, dict[str, float]]:
    """The merged model, and what the method tells about it."""
    if method == "slerp":
        result = slerp(spec, models, t=shares[1])
        return result.models[0], {"cosine": float(result.info.cosine)}
    return average(spec, models, weights=shares).models[0], {}


def _advice(spec: PermutationSpec) -> str:
    if not any(leaf.role == "statistic" for leaf in spec.leaves):
        return ""
    return " Its running statistics are mixed like weights: estimate them again on data before it is used."


def _outcome(
    title: str, summary: str, spec: PermutationSpec, alignment: Alignment | None, numbers: dict[str, float]
) -> Outcome:
    shown, figure = pages(alignment) if alignment else ((), None)
    return Outcome(
        title=title,
        summary=summary,
        metrics={"groups": len(spec.groups), **(metrics(alignment) if alignment else {}), **numbers},
        tables=shown,
        figures=(figure,) if figure else (),
        texts=(explanation(spec),),
        headline=HEADLINE if alignment else (),
    )


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))
