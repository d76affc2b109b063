"""Merging checkpoint files by PLeaS: aligned and fitted on calibration data, written with their block structure."""

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from permjax import tree
from permjax.experiments.architectures import FilesError
from permjax.experiments.calibration_files import Calibration, check_outputs
from permjax.experiments.file_options import MergeOptions, PleasOptions
from permjax.experiments.file_steps import aligned, calibration_of, examined, judge_merged, save_plan, stage
from permjax.experiments.guard_files import Candidate, probe_of, with_guard
from permjax.experiments.model_files import ModelFiles, open_all
from permjax.experiments.pleas_files_report import Fit, outcome
from permjax.experiments.progress import Progress
from permjax.io.checkpoint import Checkpoint, companions, save_checkpoint
from permjax.merge.average import check_aligned
from permjax.merge.block_apply import block_apply
from permjax.merge.budget import cost
from permjax.merge.export import save_merged
from permjax.merge.heads import Heads, own_heads
from permjax.merge.partial import partial_plan, widenable
from permjax.merge.perplexity import Probe
from permjax.merge.planning import pleas_plan
from permjax.merge.pleas import pleas
from permjax.merge.ratios import ratios_for
from permjax.merge.scale import ScaleInfo, canonical_scale
from permjax.report import Outcome
from permjax.symmetry.program import survey
from permjax.symmetry.work import contractions


def merge_by_pleas(options: MergeOptions, progress: Progress | None = None) -> Outcome:
    """Merge all models into one network of the size that is asked for; see `files.merge`.

    Raises:
        ValueError: options, files or calibration data that do not fit. Nothing is written then.
        GuardRefusedError: the guard refuses the network. Nothing is written then.
    """
    checkpoints = open_all(options.models)
    files = examined(options, checkpoints, [Path(options.out)])
    data = cast(Calibration, calibration_of(options, files))  # the method always needs them
    heads = _heads(options.pleas, files, data)
    size = _size(options.pleas, files, heads)
    _check_owners(options, data)
    probe = _probe(options, files)
    models = files.load()
    check_aligned(files.spec, models)
    check_outputs(data, files.architecture.apply, models, options.models)
    models, scaled = _scaled(options.pleas, files, models, data, progress)
    alignment = aligned(options, files, models, data, progress) if options.align else None
    with stage(progress, "fitting"):
        fit = _fitted(options, files, alignment.after if alignment else models, data, heads, size)
    with stage(progress, "writing"):
        judged = judge_merged(options, probe, files, models, Candidate(options.out, fit.network, fit.params))
        _save(options.out, files, fit)
    save_plan(options, alignment)
    return with_guard(outcome(options, files, data, alignment, fit, scaled), judged)


# checks


def _heads(how: PleasOptions, files: ModelFiles, data: Calibration) -> Heads:
    """The spec in which own heads are units, or the plain one."""
    if how.heads == "shared":
        return Heads(files.spec, (), ())
    architecture = files.architecture
    try:
        return own_heads(files.spec, architecture.apply, architecture.like, *data.batches[0])
    except ValueError as error:
        raise FilesError(f"--heads {how.heads} cannot be had: {error}") from None


def _size(how: PleasOptions, files: ModelFiles, heads: Heads) -> dict[str, Any]:
    """The size that is asked for, as `pleas_plan` takes it; that of one model by default.

    It is tried on a plan of such a size, before anything is computed.
    """
    size: dict[str, Any] = {"budget": how.budget, "params": how.params, "width": _widths(how.width, heads)}
    if not any(value is not None for value in size.values()):
        size["budget"] = 1.0
    spec, architecture, count = heads.spec, files.architecture, len(files.checkpoints)
    apply, inputs = architecture.apply, architecture.inputs
    works = contractions(apply, spec, architecture.like, *inputs)
    optimised = how.shape == "optimised"
    shape = "uniform" if optimised else how.shape
    ratios = ratios_for(works, spec, **size, shape=shape, models=count, whole=(*how.whole, *heads.groups))
    if not optimised:  # where which groups are widened is not known yet
        plan = partial_plan(spec, ratios=ratios | dict.fromkeys(heads.groups, 1.0), models=count)
        block_apply(spec, plan, apply).check(survey(apply, architecture.like, *inputs))
    return size


def _widths(given: Sequence[str], heads: Heads) -> Mapping[str, float] | None:
    """The share of each group that every model keeps, from texts `GROUP=SHARE` or `SHARE`, the later ones first."""
    found: dict[str, float] = {}
    for text in given:
        name, _, share = text.rpartition("=")
        names = [name] if name else [g for g in widenable(heads.spec) if g not in heads.groups]
        try:
            found |= dict.fromkeys(names, float(share))
        except ValueError:
            message = f"--width {text} must be SHARE or GROUP=SHARE with a number from 0 to 1, as in 0.25."
            raise FilesError(message) from None
    return found if given else None


def _check_owners(options: MergeOptions, data: Calibration) -> None:
    if options.pleas.targets == "owner" and data.owners is None:
        message = (
            f"--targets owner needs to know in whose domain each sample of {options.calibration} is: add an array "
            "'owner' to that file with the number of the model (0 for the first) for every sample."
        )
        raise FilesError(message)


def _probe(options: MergeOptions, files: ModelFiles) -> Probe:
    """What the guard looks at, if there is one."""
    if options.watch.guard and options.pleas.heads != "shared":
        raise FilesError("--guard is for models with one output layer; leave it out, or take --heads shared.")
    return probe_of(options.watch, files.architecture, files.checkpoints[0])


# the fit


def _scaled(
    how: PleasOptions,
    files: ModelFiles,
    models: tuple[Any, ...],
    data: Calibration,
    progress: Progress | None,
) -> tuple[tuple[Any, ...], tuple[ScaleInfo, ...]]:
    """The models at canonical scale, if that is asked for."""
    if not how.canonical_scale:
        return models, ()
    with stage(progress, "scaling"):
        first = tuple(x[:8] for x in data.batches[0])
        results = [canonical_scale(files.spec, m, apply=files.architecture.apply, inputs=first) for m in models]
    return tuple(result.models[0] for result in results), tuple(result.info for result in results)


def _fitted(
    options: MergeOptions,
    files: ModelFiles,
    models: tuple[Any, ...],
    data: Calibration,
    heads: Heads,
    size: Mapping[str, Any],
) -> Fit:
    """Choose which units are merged, and fit all layers."""
    how, apply, begin = options.pleas, files.architecture.apply, time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given: dict[str, Any] = {"apply": apply, "data": data.batches}
        plan = pleas_plan(heads.spec, models, **given, **size, shape=how.shape, apart=heads.groups, whole=how.whole)
        result = pleas(heads.spec, models, plan, **given, **_fit_options(options, files, data, heads))
    network = block_apply(heads.spec, plan, apply, joined="mean" if how.heads == "shared" else "concatenate")
    works = contractions(apply, heads.spec, files.architecture.like, *files.architecture.inputs)
    said = tuple(dict.fromkeys(str(warning.message) for warning in caught))
    seconds = time.perf_counter() - begin
    return Fit(result.models[0], network, result.info, cost(works, heads.spec, plan), said, seconds)


def _fit_options(options: MergeOptions, files: ModelFiles, data: Calibration, heads: Heads) -> dict[str, Any]:
    how = options.pleas
    found: dict[str, Any] = {"mode": how.mode, "positions": how.positions, "batch_statistics": files.statistics}
    found["ridge"] = how.ridge.replace("-", "_") if isinstance(how.ridge, str) else how.ridge
    found["keep"] = heads.leaves if how.heads == "own" else ()
    if how.targets == "owner":
        found |= {"targets": "owner", "owners": data.owners}
    return found | {"key": jax.random.key(options.seed)}


# writing


def _save(out: str, files: ModelFiles, fit: Fit) -> None:
    """Write the network: like the first model if it has the widths of one, else with its block structure."""
    first, named = files.checkpoints[0], tree.flatten(fit.params)
    if not fit.is_wide:
        save_checkpoint(out, {**first, **named}, like=first)
        return
    stored = tree.map_named(lambda name, leaf: _rounded(name, leaf, first), fit.params)
    place: dict[str, Any] = {}
    if Path(out).is_dir() or Path(out).suffix != ".safetensors":
        beside = [file for file in companions(first, Path(out)) if file.name != "config.json"]
        largest = max(sum(first[name].nbytes for name in names) for names in first.shards.values())
        place = {"extra_files": beside, "shard_size": largest if len(first.shards) > 1 else None}
    about = {"config": files.architecture.config, "source": files.architecture.source, "metadata": first.metadata}
    constants = {name: lazy for name, lazy in first.items() if name not in named}
    save_merged(out, stored, fit.network, constants=constants, **about, **place)


def _rounded(name: str, leaf: Any, first: Checkpoint) -> np.ndarray:
    """A leaf in the dtype that it has in the first model."""
    with np.errstate(over="ignore"):
        array = np.asarray(leaf).astype(first[name].dtype)
    tree.check_finite({name: array}, f"the merged network in the dtype of {first.path}")
    return array
