"""Merging, inspecting and extracting LoRA adapters in files: all is checked and computed before it is written."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from permjax.config import from_dict
from permjax.experiments.architectures import FilesError
from permjax.experiments.guard_files import UNGUARDED, GuardOptions, Judged
from permjax.experiments.lora_guard import Base, base_of, judge_adapters
from permjax.experiments.progress import Progress
from permjax.lora.formats import AdapterFiles, common_names, open_adapter, save_adapter
from permjax.lora.inspection import Inspection, inspect
from permjax.lora.merge import Method, checked_weights, merge_loras
from permjax.lora.methods import METHODS
from permjax.lora.pool import Factors, Merged, module_names
from permjax.lora.quality import Quality, lora_quality
from permjax.lora.ranks import rank_for_energy, ranks_for_budget, spectra
from permjax.lora.saving import check_place
from permjax.tree import nearest

Style = Literal["peft", "kohya", "diffusers"]
Dtype = Literal["float32", "float16", "bfloat16"]

_ALIASES = {"lego": "lora_lego"}
_CHUNK = 1 << 26  # bytes of factors that are read and merged at a time


@dataclass(frozen=True)
class LoraMergeOptions:
    """What to merge, and how.

    Attributes:
        adapters: PEFT folders, or files with the keys of kohya's scripts or of diffusers.
        out: where the merged adapter goes: a folder, or a `.safetensors` file for the styles kohya and diffusers.
        method: lego (short for lora_lego), lego_balanced, lego_weighted, lego_gauged, lego_kernel, truncate, concat,
            task_arithmetic, linear, aligned_linear, ties, dare, magnitude, knots, core_space, tsv, iso_c, ctm,
            ties_svd, dare_svd or magnitude_svd.
        rank: `16` for all modules; `auto:0.95` for the smallest rank that can hold so much of the energy of the
            weighted sum; `budget:512` for the sum of the ranks, spread over the modules by singular values; that of the
            largest adapter by default (the sum of all ranks for concat).
        weights: one number for each adapter, negative ones too, as in `--weights=1,-0.5`; 1 / T by default.
        settings: a hyper-parameter of the method, as in density=0.3.
        style: of the file; that of the first adapter by default.
        dtype: of the factors; the widest of the adapters by default.
        seed: of methods that draw.
        force: ignore unknown keys in the configurations of the adapters, which must then have no effect on them.
        base: the model that the adapters are for, for the guard.
        watch: options of the guard.
    """

    adapters: tuple[str, ...]
    out: str
    method: str = "lego"
    rank: str | None = None
    weights: tuple[float, ...] | None = None
    settings: tuple[str, ...] = ()
    style: Style | None = None
    dtype: Dtype | None = None
    seed: int = 0
    force: bool = False
    base: str | None = None
    watch: GuardOptions = GuardOptions()


class RankChoice(NamedTuple):
    """How ranks are chosen: "natural", "fixed", "auto" or "budget", and the number that belongs to it."""

    kind: str
    number: float = 0


class Job(NamedTuple):
    """A merge whose options and files have been checked.

    Attributes:
        method: the name of the method.
        merger: the method itself.
        ranks: how ranks are chosen.
        weights: of the adapters.
        adapters: the files, with common names of modules.
        names: of all modules.
    """

    method: str
    merger: Method
    ranks: RankChoice
    weights: np.ndarray
    adapters: list[AdapterFiles]
    names: list[str]


class MergedFiles(NamedTuple):
    """What a merge found: the merged modules, which were written, their quality, and what a guard says of them."""

    job: Job
    merged: dict[str, Factors]
    found: dict[str, Quality]
    judged: Judged


def merge(options: LoraMergeOptions, progress: Progress) -> MergedFiles:
    """Merge adapters into one, a few modules at a time, and write it.

    Raises:
        ValueError: options or files that do not fit; names the option, or the file and the module. Nothing is written.
        GuardRefusedError: the guard refuses the merged adapter. Nothing is written.
    """
    job = _examined(options)
    infos = {name: one[name] for one in job.adapters for name in one}
    base = base_of(options.watch, options.base, infos)
    rank = _chosen_ranks(job, progress)
    merged, found = _merged(job, rank, options.seed, progress)
    judged = _judged(options, job, base, merged)
    uniform = job.ranks.kind != "budget"
    save_adapter(options.out, merged, like=job.adapters, style=options.style, dtype=options.dtype, uniform=uniform)
    return MergedFiles(job, merged, found, judged)


def _judged(options: LoraMergeOptions, job: Job, base: Base | None, merged: Mapping[str, Factors]) -> Judged:
    if base is None:
        return UNGUARDED
    adapters = {str(one.path): one.factors for one in job.adapters}
    return judge_adapters(options.watch, base, adapters, (options.out, merged))


def look(path: str, *, force: bool) -> tuple[AdapterFiles, dict[str, Inspection]]:
    """Inspect every module of an adapter.

    Raises:
        ValueError: it is none, or cannot be read.
    """
    adapter = open_adapter(path, force=force)
    found: dict[str, Inspection] = {}
    for names in _chunks([adapter], list(adapter)):
        found |= inspect(adapter.factors(names))
    return adapter, {name: found[name] for name in adapter}


# checks


def _examined(options: LoraMergeOptions) -> Job:
    """Check everything that can be wrong before a tensor is read, cheap things first."""
    name, merger = chosen_method(options.method, options.settings)
    ranks, weights = rank_choice(options.rank), _weights(options)
    adapters = common_names([open_adapter(path, force=options.force) for path in options.adapters])
    check_target(options.out, options.style or adapters[0].style, [one.path for one in adapters])
    names = module_names(adapters)
    for module in names:
        _check_alike(module, adapters)
    if ranks.kind == "budget" and ranks.number < len(names):
        message = f"--rank budget:{ranks.number:g} is too small: {len(names)} modules need a rank of at least 1 each."
        raise FilesError(message)
    return Job(name, merger, ranks, weights, adapters, names)


def chosen_method(method: str, settings: Sequence[str]) -> tuple[str, Method]:
    """The name of a method, and the method with its hyper-parameters.

    Raises:
        FilesError: an unknown method or hyper-parameter, or a value that does not fit.
    """
    name = _ALIASES.get(method, method)
    known = [one for one, cls in METHODS.items() if not cls.needs_inputs]
    if name in METHODS and name not in known:
        message = f"--method {name} needs the inputs of all modules; call permjax.lora.merge.merge_loras with them."
        raise FilesError(message)
    if name not in known:
        known = [*_ALIASES, *known]
        raise FilesError(f"There is no method {method!r}{nearest(method, known)}; known are {', '.join(known)}.")
    cls: Any = METHODS[name]
    return name, from_dict(cls, dict(map(_setting, settings)), where=f"--set for {name}")


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals and value):
        raise FilesError(f"--set {text} is no setting; write key=value, such as density=0.3.")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def rank_choice(text: str | None) -> RankChoice:
    """What `--rank` asks for.

    Raises:
        FilesError: it cannot be understood, or no such rank is possible.
    """
    if text is None:
        return RankChoice("natural")
    kind, colon, number = text.rpartition(":")
    kind = kind if colon else "fixed"
    try:
        value = float(number) if kind == "auto" else int(number)
    except ValueError:
        value = 0
    if kind not in ("fixed", "auto", "budget") or not value > 0 or (kind == "auto" and value > 1):
        message = f"--rank {text} is no rank; give a whole number above 0, auto:ENERGY (0 to 1), or budget:TOTAL."
        raise FilesError(message)
    return RankChoice(kind, value)


def _weights(options: LoraMergeOptions) -> np.ndarray:
    count = len(options.adapters)
    if count < 1:
        raise FilesError("There is no adapter to merge; name at least one.")
    try:
        return checked_weights(options.weights, count)
    except ValueError:
        given = ",".join(f"{w:g}" for w in options.weights or ())
        message = f"--weights {given}: {count} adapters need as many finite numbers, not all of them 0."
        raise FilesError(message) from None


def check_target(out: str, style: str, taken: Sequence[Path]) -> None:
    """Refuse a target that is no place for an adapter of the style, or that is one of the files that are read.

    Raises:
        ValueError: names the target.
    """
    target = Path(out)
    check_place(target, style)
    for path in taken:
        places = {path.resolve(), path.parent.resolve()} if path.is_file() else {path.resolve()}
        if target.resolve() in places:
            raise FilesError(f"{out} would be written over {path}, which is read; give another place.")


def _check_alike(module: str, adapters: Sequence[AdapterFiles]) -> None:
    """Check that a module has one kind and one size in all adapters that have it."""
    seen = {one.path: one[module] for one in adapters if module in one}
    sizes = {path: (info.kind, info.size_out, info.size_in) for path, info in seen.items()}
    (first, expected), *others = sizes.items()
    for path, size in others:
        if size != expected:
            message = (
                f"{path}: module {module!r} is {_described(size)}, but {_described(expected)} in {first}; merge "
                "adapters of one base model."
            )
            raise FilesError(message)


def _described(size: tuple[str, int, int]) -> str:
    return f"{size[0]} of {size[1]} x {size[2]}"


# work


def _chunks(adapters: Sequence[AdapterFiles], names: Sequence[str]) -> Iterator[list[str]]:
    """Modules of one shape, as many at a time as fit into the memory that is set aside."""
    buckets: dict[Any, list[str]] = {}
    for name in names:
        shapes = tuple((one[name].a_shape, one[name].b_shape) if name in one else None for one in adapters)
        buckets.setdefault(shapes, []).append(name)
    for bucket in buckets.values():
        infos = [one[bucket[0]] for one in adapters if bucket[0] in one]
        size = sum(4 * info.rank * (info.size_in + info.size_out) for info in infos)
        parts = -(-len(bucket) // max(1, _CHUNK // size))
        step = -(-len(bucket) // parts)  # chunks of one length, so that they are compiled once
        yield from (bucket[i : i + step] for i in range(0, len(bucket), step))


def _read(job: Job, names: Sequence[str]) -> list[dict[str, Factors]]:
    return [one.factors(name for name in names if name in one) for one in job.adapters]


def _chosen_ranks(job: Job, progress: Progress) -> int | dict[str, int] | None:
    """The rank of all modules, or of each; None for what is natural for the method."""
    if job.ranks.kind == "natural":
        return None
    if job.ranks.kind == "fixed":
        return int(job.ranks.number)
    values: dict[str, Any] = {}
    progress.start("choosing ranks", len(job.names))
    for names in _chunks(job.adapters, job.names):
        values |= spectra(_read(job, names), job.weights)
        progress.step(len(names))
    progress.done()
    if job.ranks.kind == "auto":
        return rank_for_energy(values, job.ranks.number)
    return ranks_for_budget({name: values[name] for name in job.names}, int(job.ranks.number))


def _merged(
    job: Job, rank: int | Mapping[str, int] | None, seed: int, progress: Progress
) -> tuple[dict[str, Factors], dict[str, Quality]]:
    merged: dict[str, Factors] = {}
    found: dict[str, Quality] = {}
    key = jax.random.key(seed)
    progress.start("merging", len(job.names))
    for names in _chunks(job.adapters, job.names):
        some = _read(job, names)
        done = merge_loras(some, job.merger, rank=rank, weights=job.weights, key=key)
        host = {name: Merged(*jax.device_get(one)) for name, one in done.items()}
        found |= lora_quality(some, host, job.weights)
        merged |= {name: Factors(one.a, one.b) for name, one in host.items()}
        progress.step(len(names))
    progress.done()
    return {name: merged[name] for name in job.names}, {name: found[name] for name in job.names}
