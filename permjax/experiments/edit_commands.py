"""The command that edits facts of a language model, as the command line sees it."""

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from permjax.experiments.edit_files import opened
from permjax.experiments.edit_options import EditOptions, Method
from permjax.experiments.edit_report import edited_outcome
from permjax.experiments.edit_steps import edit_under_guard, save_edited
from permjax.experiments.guard_files import Refused
from permjax.experiments.progress import Progress
from permjax.experiments.runs import Finished, read_metrics
from permjax.report import Outcome, write_report


@dataclass(frozen=True)
class Edit(EditOptions):
    """The options of an edit, and how to show what it does.

    Attributes:
        progress: show progress bars.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    edits: Annotated[str, arg(metavar="FILE")]
    out: Annotated[str, arg(aliases=("-o",), metavar="OUT")]
    method: Method = "rome"
    layer: Annotated[int | None, arg(metavar="INT")] = None
    settings: Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE")] = ()
    text: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = ()
    skip_bad: FlagCreatePairsOff[bool] = False
    identity: FlagCreatePairsOff[bool] = False
    guard: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = ()
    guard_energy: Annotated[float | None, arg(metavar="FLOAT")] = None
    progress: bool = True


def run(given: Edit, command: str) -> tuple[Outcome, Finished]:
    """Edit a model; the report goes to `OUT/report/`.

    Raises:
        ValueError: files or options that do not fit; names them. Nothing is written.
        GuardRefusedError: the guard refuses every edit. Nothing is written.
    """
    options = EditOptions(**{field.name: getattr(given, field.name) for field in fields(EditOptions)})
    begin = time.perf_counter()
    with Progress(visible=given.progress) as progress:
        outcome = edit(options, progress)
    folder = Path(options.out) / "report"
    write_report(outcome, folder, options, command=command, seconds=time.perf_counter() - begin)
    return outcome, Finished(folder, read_metrics(folder))


def edit(options: EditOptions, progress: Progress) -> Outcome:
    """Edit a model and write it.

    Raises:
        ValueError: see `run`.
        GuardRefusedError: see `run`.
    """
    job = opened(options)
    edited = edit_under_guard(job, options, progress)
    outcome = edited_outcome(options, job, edited)
    if not edited.delta:
        worst = edited.changes[-1].attempts[-1].excesses[0]
        message = f"The guard refuses all {len(job.requests)} edits, the last one because {worst}; nothing was written."
        raise Refused(message, outcome)
    save_edited(job, edited, Path(options.out))
    return outcome
