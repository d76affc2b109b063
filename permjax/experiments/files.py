"""Aligning and merging checkpoint files: all is checked before it is computed, and computed before it is written."""

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from permjax import tree
from permjax.action import permute_leaf
from permjax.experiments.alignment import HEADLINE, Alignment, explanation, metrics, pages, sentence
from permjax.experiments.architectures import FilesError
from permjax.experiments.file_options import AlignOptions, MergeOptions, PleasOptions
from permjax.experiments.file_steps import aligned, calibration_of, examined, judge_merged, listed, save_plan, stage
from permjax.experiments.guard_files import Candidate, probe_of, with_guard
from permjax.experiments.model_files import open_all, target_paths
from permjax.experiments.pleas_files import merge_by_pleas
from permjax.experiments.progress import Progress
from permjax.io.checkpoint import Checkpoint, save_checkpoint
from permjax.merge.average import average, check_aligned, slerp
from permjax.report import Outcome
from permjax.symmetry.spec import PermutationSpec


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
    files = examined(options, checkpoints, targets)
    alignment = aligned(options, files, files.load(), calibration_of(options, files), progress)
    with stage(progress, "writing"):
        for index, target in enumerate(targets, 1):
            _save_permuted(target, checkpoints[index], alignment, index)
    save_plan(options, alignment)
    title = f"{listed(options.models[1:])} aligned to {options.models[0]}"
    summary = f"{sentence(alignment)} Written to {listed(targets)}."
    return _outcome(title, summary, files.spec, alignment, {})


def merge(options: MergeOptions, progress: Progress | None = None) -> Outcome:
    """Merge all models into one.

    An average is stored like the first model: same names, order, dtypes, metadata and shards. So is what PLeaS makes at
    the size of one model; a wider network has the same names, its block structure in the metadata, and is run by
    `permjax.load_merged`. Computed in float32 or wider, and rounded once when it is written.

    Args:
        options: see `MergeOptions`.
        progress: told about the stages.

    Returns:
        As from `align`; without alignment there are only the numbers of models and groups. PLeaS adds what the network
        costs and how well its layers fit.

    Raises:
        ValueError: options or files that do not fit; names the file, leaf or axis. Nothing is written then.
        GuardRefusedError: the guard refuses the merged model. Nothing is written then.

    Example:
        >>> merge(MergeOptions(("a.safetensors", "b.safetensors"), "merged.safetensors", weights=(0.7, 0.3)))
    """
    _check_options(options)
    if options.method == "pleas":
        return merge_by_pleas(options, progress)
    shares = _shares(options)
    checkpoints = open_all(options.models)
    files = examined(options, checkpoints, [Path(options.out)])
    models, alignment = files.load(), None
    check_aligned(files.spec, models)
    probe = probe_of(options.watch, files.architecture, checkpoints[0])
    if options.align:
        alignment = aligned(options, files, models, calibration_of(options, files), progress)
        models = alignment.after
    with stage(progress, "merging"):
        merged, numbers = _merged(options.method, files.spec, models, shares)
        result = Candidate(options.out, files.architecture.apply, merged)
        judged = judge_merged(options, probe, files, models, result)
        save_checkpoint(options.out, {**checkpoints[0], **tree.flatten(merged)}, like=checkpoints[0])
    save_plan(options, alignment)
    how = sentence(alignment) if alignment else "The models were taken as they are, without alignment."
    method = {"average": "weighted average", "slerp": "point on the arc between them"}[options.method]
    summary = f"{how} Their {method} ({listed(f'{100 * s:.4g} %' for s in shares)}) was written to {options.out}."
    title = f"{listed(options.models)} merged"
    outcome = _outcome(title, summary + _advice(files.spec), files.spec, alignment, numbers)
    return with_guard(outcome, judged)


def _save_permuted(target: Path, checkpoint: Checkpoint, alignment: Alignment, index: int) -> None:
    """Write a model with the units of its stored arrays in their new places, one shard at a time."""
    permutations = alignment.plan.permutations(index)

    def moved(name: str) -> np.ndarray:
        return permute_leaf(alignment.spec, alignment.spec.leaf(name), permutations, checkpoint[name].read())

    tensors = {leaf.name: partial(moved, leaf.name) for leaf in alignment.spec.leaves}
    save_checkpoint(target, {**checkpoint, **tensors}, like=checkpoint)


def _check_options(options: MergeOptions) -> None:
    """Check that no option was given that the method does not read."""
    if options.plan is not None and not options.align:
        raise FilesError("Without alignment there is no plan to write; leave out --plan, or align the models.")
    if options.method == "pleas":
        if options.weights is not None:
            raise FilesError("--weights are for the methods average and slerp; pleas counts all models alike.")
        return
    for field in fields(PleasOptions):
        if getattr(options.pleas, field.name) != field.default:
            flag = field.name.replace("_", "-")
            raise FilesError(f"--{flag} is for the method pleas; add --method pleas, or leave it out.")


def _shares(options: MergeOptions) -> tuple[float, ...]:
    """The weights of the models, adding up to one."""
    count, weights = len(options.models), options.weights
    if options.method == "slerp" and count != 2:
        raise FilesError(f"slerp runs between two models, not {count}; use the method average for more.")
    if weights is None:
        return (1 / max(count, 1),) * count
    if len(weights) != count:
        raise FilesError(f"{count} models need {count} weights, not {len(weights)} ({listed(map(str, weights))}).")
    if not (np.isfinite(weights).all() and min(weights) >= 0 and sum(weights) > 0):
        raise FilesError(f"The weights {listed(map(str, weights))} must be numbers >= 0, and not all of them 0.")
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
