"""The commands on LoRA adapters, as the command line sees them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeAlias, Union

from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg, subcommand

from permjax.experiments import lora_extract, lora_files
from permjax.experiments.commands import GuardFlags, Weights
from permjax.experiments.guard_files import with_guard
from permjax.experiments.lora_extract import LoraExtractOptions
from permjax.experiments.lora_files import Dtype, LoraMergeOptions, Style
from permjax.experiments.lora_files_report import extracted_outcome, inspected_outcome, merged_outcome
from permjax.experiments.progress import Progress
from permjax.experiments.runs import Finished, read_metrics
from permjax.report import Outcome, write_report

_Out = Annotated[str, arg(aliases=("-o",), metavar="OUT")]


@dataclass(frozen=True)
class LoraMerge(LoraMergeOptions):
    """The options of `lora_files.merge`, and how to show what it does.

    Attributes:
        progress: show progress bars.
    """

    adapters: Annotated[tuple[str, ...], Positional, arg(metavar="A [B ...]", help_behavior_hint="")]
    out: _Out
    method: Annotated[str, arg(metavar="NAME")] = "lego"
    rank: Annotated[str | None, arg(metavar="K|auto:ENERGY|budget:TOTAL")] = None
    weights: Weights = None
    settings: Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE")] = ()
    style: Style | None = None
    dtype: Dtype | None = None
    force: FlagCreatePairsOff[bool] = False
    base: Annotated[str | None, arg(metavar="MODEL")] = None
    watch: Annotated[GuardFlags, arg(name="")] = GuardFlags()
    progress: bool = True


@dataclass(frozen=True)
class LoraInspect:
    """What to inspect.

    Attributes:
        adapter: a PEFT folder, or a file with the keys of kohya's scripts or of diffusers.
        out: also write a report to this folder.
        force: ignore unknown keys in the configuration.
    """

    adapter: Annotated[str, Positional, arg(metavar="ADAPTER")]
    out: Annotated[str | None, arg(aliases=("-o",), metavar="DIR")] = None
    force: FlagCreatePairsOff[bool] = False


@dataclass(frozen=True)
class LoraExtract(LoraExtractOptions):
    """The options of `lora_extract.extract`, and how to show what it does.

    Attributes:
        progress: show progress bars.
    """

    base: Annotated[str, Positional, arg(metavar="BASE")]
    tuned: Annotated[str, Positional, arg(metavar="TUNED")]
    out: _Out
    rank: Annotated[int, arg(metavar="K")]
    targets: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="PATTERN")] = ()
    progress: bool = True


Lora: TypeAlias = Union[  # noqa: UP007
    Annotated[LoraMerge, subcommand("merge", description="Merge LoRA adapters into one; no base model is needed.")],
    Annotated[
        LoraInspect, subcommand("inspect", description="Tell how large an adapter's updates are, and of what rank.")
    ],
    Annotated[
        LoraExtract, subcommand("extract", description="Make an adapter from a model before and after training.")
    ],
]
"""All commands on adapters."""


def run(given: Any, command: str) -> tuple[Outcome, Finished | None]:
    """Run a command; its report goes beside the output: `OUT/report/`, or `OUT.report/` where OUT is a file."""
    if isinstance(given, LoraInspect):
        return _inspect(given, command)
    cls, work = _WORK[type(given)]
    options = cls(**{field.name: getattr(given, field.name) for field in fields(cls)})
    begin = time.perf_counter()
    with Progress(visible=given.progress) as progress:
        outcome = work(options, progress)
    out = Path(options.out)
    folder = out / "report" if out.is_dir() else out.with_name(f"{out.name}.report")
    return outcome, _reported(outcome, folder, options, command, begin)


def _merge(options: LoraMergeOptions, progress: Progress) -> Outcome:
    result = lora_files.merge(options, progress)
    return with_guard(merged_outcome(options, result), result.judged)


def _extract(options: LoraExtractOptions, progress: Progress) -> Outcome:
    return extracted_outcome(options, lora_extract.extract(options, progress))


_WORK: dict[type, tuple[type, Callable[[Any, Progress], Outcome]]] = {
    LoraMerge: (LoraMergeOptions, _merge),
    LoraExtract: (LoraExtractOptions, _extract),
}


def _inspect(given: LoraInspect, command: str) -> tuple[Outcome, Finished | None]:
    begin = time.perf_counter()
    outcome = inspected_outcome(*lora_files.look(given.adapter, force=given.force))
    return outcome, _reported(outcome, Path(given.out), given, command, begin) if given.out else None


def _reported(outcome: Outcome, folder: Path, options: Any, command: str, begin: float) -> Finished:
    write_report(outcome, folder, options, command=command, seconds=time.perf_counter() - begin)
    return Finished(folder, read_metrics(folder))
