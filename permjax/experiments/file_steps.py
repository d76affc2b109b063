"""What aligning and merging files have in common: checks, matching, and the permutations that are written."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from permjax.experiments.alignment import Alignment, findings
from permjax.experiments.architectures import FilesError
from permjax.experiments.calibration_files import Calibration, read_calibration
from permjax.experiments.file_options import AlignOptions, MergeOptions
from permjax.experiments.guard_files import UNGUARDED, Candidate, Judged, as_stored, judge, on_device
from permjax.experiments.model_files import ModelFiles, check_place, check_plan, examine
from permjax.experiments.progress import Progress
from permjax.io.checkpoint import Checkpoint
from permjax.lmc.barrier import l2_distance
from permjax.match.activations import activation_matching
from permjax.match.weights import WeightInfo, weight_matching
from permjax.merge.perplexity import Probe
from permjax.permutation import Permutations, validate
from permjax.plan import Plan
from permjax.steps import Result
from permjax.symmetry.spec import PermutationSpec


@contextmanager
def stage(progress: Progress | None, what: str) -> Iterator[None]:
    """Show that something is being done."""
    if progress is None:
        yield
        return
    progress.start(what, 1)
    try:
        yield
        progress.step(1)
    finally:
        progress.done()


def examined(options: AlignOptions, checkpoints: tuple[Checkpoint, ...], targets: Sequence[Path]) -> ModelFiles:
    """Check everything about models and places that can be wrong, cheap things first.

    Raises:
        ValueError: names the option or the file.
    """
    if options.restarts < 1:
        raise FilesError(f"restarts must be at least 1, not {options.restarts}.")
    if options.compared == "activations" and (options.restarts > 1 or options.init is not None):
        raise FilesError("--restarts and --init are for the matching of weights; add --matching weights for them.")
    _check_data(options)
    for target in targets:
        check_place(target, checkpoints)
    if options.plan is not None:
        check_plan(options.plan, checkpoints, targets)
    return examine(checkpoints, options.config, options.arch)


def _check_data(options: AlignOptions) -> None:
    """Check that calibration data are given if and only if something reads them."""
    if options.calibration is None and options.needs_data:
        message = (
            "Activations are compared, and layers fitted, on calibration data: give --calibration FILE (.npz, .npy or "
            ".safetensors) with inputs like those that the models were trained on, without labels; or, if there are "
            "none, ask for --calibration generated:white_noise, from which results are worse."
        )
        raise FilesError(message)
    if options.calibration is not None and not options.needs_data:
        message = "--calibration is only read by --matching activations and --method pleas; add one, or leave it out."
        raise FilesError(message)


def calibration_of(options: AlignOptions, files: ModelFiles) -> Calibration | None:
    """The calibration data, where they are used.

    Raises:
        FilesError: they cannot be had or do not fit; names the file.
    """
    if options.calibration is None:
        return None
    cut: dict[str, Any] = {"samples": options.samples, "batch_size": options.batch_size, "seed": options.seed}
    return read_calibration(options.calibration, files.architecture, models=len(files.checkpoints), **cut)


def aligned(
    options: AlignOptions,
    files: ModelFiles,
    models: tuple[Any, ...],
    data: Calibration | None,
    progress: Progress | None,
) -> Alignment:
    """Bring the units of all models into the order of the first one's.

    Raises:
        ValueError: there are no units, or a start that does not fit.
    """
    if not files.spec.groups:
        raise FilesError(f"Nothing in {files.architecture.source} can be permuted, so there is nothing to align.")
    begin_with = _start(options, files.spec)
    with stage(progress, "matching"):
        begin = time.perf_counter()
        result = _matched(options, files, models, data, begin_with)
        seconds = time.perf_counter() - begin
    run = jax.jit(files.architecture.apply)
    pairs = list(zip(models, result.models, strict=True))[1:]
    with jax.default_matmul_precision("highest"):
        changes = tuple(_change(*(run(model, *files.architecture.inputs) for model in pair)) for pair in pairs)
    plan = cast(Plan, result.plan)  # matching always finds one
    before, after = _distances(files.spec, models, result)
    found = findings(result.info)
    return Alignment(options.models, files.spec, models, result.models, plan, before, after, found, changes, seconds)


def _distances(spec: PermutationSpec, models: tuple[Any, ...], result: Result) -> list[np.ndarray]:
    """The distances of all models to the anchor before and after matching."""
    if isinstance(result.info, WeightInfo):
        return [result.info.l2_before, result.info.l2_after]
    return [np.array([l2_distance(spec, some[0], other) for other in some[1:]]) for some in (models, result.models)]


def _matched(
    options: AlignOptions,
    files: ModelFiles,
    models: tuple[Any, ...],
    data: Calibration | None,
    init: list[Permutations] | None,
) -> Result:
    if options.compared == "weights" or data is None:
        hyper: dict[str, Any] = {"solver": options.solver, "restarts": options.restarts, "init": init}
        return weight_matching(files.spec, models, key=jax.random.key(options.seed), **hyper)
    apply = files.architecture.apply
    return activation_matching(files.spec, models, apply=apply, data=data.batches, solver=options.solver)


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


def judge_merged(
    options: MergeOptions, probe: Probe, files: ModelFiles, models: Sequence[Any], result: Candidate
) -> Judged:
    """What the guard says of a merged model, which will be rounded like the first of those it comes from.

    Raises:
        GuardRefusedError: it is refused.
    """
    if not probe:
        return UNGUARDED
    named = zip(options.models, models, strict=True)
    given = (Candidate(name, files.architecture.apply, jax.tree.map(on_device, model)) for name, model in named)
    written = result._replace(params=as_stored(result.params, files.checkpoints[0]))
    return judge(options.watch, probe, given, written)


def save_plan(options: AlignOptions, alignment: Alignment | None) -> None:
    """Write the permutations that matching found, if that is asked for.

    Raises:
        FilesError: the disk refuses.
    """
    if options.plan is None or alignment is None:
        return
    try:
        Path(options.plan).parent.mkdir(parents=True, exist_ok=True)
        alignment.plan.save(options.plan)
    except OSError as error:
        raise FilesError(f"The plan {options.plan} was not written ({error}); check the disk and the path.") from None


def listed(items: Iterable[Any]) -> str:
    """Return items as text, between commas."""
    return ", ".join(map(str, items))
