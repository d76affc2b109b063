"""The commands on checkpoint files, as the command line sees them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from permjax.experiments import files
from permjax.experiments.file_options import AlignOptions, MergeOptions, PleasOptions
from permjax.experiments.guard_files import GuardOptions
from permjax.experiments.progress import Progress
from permjax.experiments.runs import Finished, read_metrics
from permjax.report import Outcome, write_report

Weights = Annotated[
    tuple[float, ...] | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="W,W[,...]",
        instance_from_str=lambda texts: tuple(map(float, texts[0].split(","))),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value or ()))],
    ),
    arg(help_behavior_hint=""),
]
"""Numbers between commas."""

_Models = Annotated[tuple[str, ...], Positional, arg(metavar="A B [C ...]", help_behavior_hint="")]
_Out = Annotated[str, arg(aliases=("-o",), metavar="OUT")]
_File = Annotated[str | None, arg(metavar="FILE")]
_Number = Annotated[float | None, arg(metavar="FLOAT")]
_Count = Annotated[int | None, arg(metavar="INT")]
_Function = Annotated[str | None, arg(metavar="MODULE:FUNCTION")]


@dataclass(frozen=True)
class Align(AlignOptions):
    """The options of `files.align`, and how to show what it does.

    Attributes:
        progress: show progress bars.
    """

    models: _Models
    out: _Out
    config: _File = None
    arch: _Function = None
    calibration: _File = None
    samples: _Count = None
    plan: _File = None
    init: _File = None
    progress: bool = True


@dataclass(frozen=True)
class Pleas(PleasOptions):
    """The options of the method pleas, as flags of `merge`."""

    budget: _Number = None
    params: _Number = None
    width: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="[GROUP=]SHARE")] = ()
    whole: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="GROUP")] = ()
    positions: _Count = None
    canonical_scale: FlagCreatePairsOff[bool] = False


@dataclass(frozen=True)
class GuardFlags(GuardOptions):
    """The options of the guard, as flags."""

    guard: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = ()
    guard_limit: Annotated[float, arg(metavar="FLOAT")] = 1.5
    guard_sentences: Annotated[int, arg(metavar="INT")] = 64
    tokenizer: _File = None


@dataclass(frozen=True)
class Merge(MergeOptions):
    """The options of `files.merge`, and how to show what it does.

    Attributes:
        out: where the merged model goes: a `.safetensors` file or a folder.
        progress: show progress bars.
    """

    models: _Models
    out: _Out
    config: _File = None
    arch: _Function = None
    calibration: _File = None
    samples: _Count = None
    plan: _File = None
    init: _File = None
    weights: Weights = None
    pleas: Annotated[Pleas, arg(name="")] = Pleas()
    watch: Annotated[GuardFlags, arg(name="")] = GuardFlags()
    progress: bool = True


_WORK: dict[type, tuple[type[AlignOptions], Callable[[Any, Progress], Outcome]]] = {
    Align: (AlignOptions, files.align),
    Merge: (MergeOptions, files.merge),
}


def run(given: Align | Merge, command: str) -> Finished:
    """Align or merge, and report beside the output: `OUT.report/`, or `OUT/report/` where OUT is a folder."""
    cls, work = _WORK[type(given)]
    options = cls(**{field.name: getattr(given, field.name) for field in fields(cls)})
    begin = time.perf_counter()
    with Progress(visible=given.progress) as progress:
        outcome = work(options, progress)
    out = Path(options.out)
    folder = out / "report" if out.is_dir() else out.with_name(f"{out.name}.report")
    write_report(outcome, folder, options, command=command, seconds=time.perf_counter() - begin)
    return Finished(folder, read_metrics(folder))
