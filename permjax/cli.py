"""The `permjax` command: experiments from configurations, and models from files."""

import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Union

import tyro

from permjax.merge.guard import GuardRefusedError

FAILED, BAD_INPUT, REFUSED, INTERRUPTED = 1, 2, 3, 130
"""Exit statuses besides 0."""

_FILE_COMMANDS = {
    "align": "Bring the units of models in checkpoint files into the order of those of the first.",
    "merge": "Align models in checkpoint files and merge them into one.",
}
_GROUPS = {
    "lora": "Merge LoRA adapters, inspect one, or extract one from two checkpoints.",
    "kge": "Train models of knowledge graphs, evaluate one, ask it, list its rules, or export it.",
    "reversal": "Re-order the semantic units of texts, or show them.",
    "edit": "Change facts in a language model, each in the first way that a guard accepts.",
    "check": "Tell how well a language model foretells text, and whether a change has broken it.",
}
"""Commands, some with commands of their own, which `permjax.experiments.<name>_commands` has in a type of that name."""


@dataclass(frozen=True)
class Run:
    """What to run, and where to.

    Attributes:
        config: a TOML file, or the name of one that comes with permjax; the demo by default.
        out: the folder of the run; runs/<CONFIG>-<hash> by default.
        overrides: replace one value of the configuration, as in train.epochs=3.
        force: start anew in a folder that holds a run.
        progress: show progress bars.
    """

    config: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[CONFIG]")] = None
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    overrides: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="SECTION.KEY=VALUE")
    ] = ()
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    progress: bool = True


@dataclass(frozen=True)
class _Unread:
    """Stands for a command that was not called, so that its module need not be imported."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    It is 0, 1 for a bug, 2 for bad input, 3 for what a guard refused, or 130 when interrupted.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        _run(_parsed(arguments), shlex.join(["permjax", *arguments]))
    except SystemExit as end:  # tyro has said what is wrong, or shown the help
        return end.code if isinstance(end.code, int) else BAD_INPUT
    except KeyboardInterrupt:
        return _say("interrupted; the same command goes on where it can.", INTERRUPTED)
    except (ValueError, OSError) as error:
        return _say(_line(error), BAD_INPUT)
    except GuardRefusedError as error:
        if outcome := getattr(error, "outcome", None):
            _tell(outcome, tables=True)
        return _say(_line(error), REFUSED)
    except Exception as error:
        place = _save_traceback()
        return _say(f"internal error, {type(error).__name__}: {_line(error)} (the traceback is in {place})", FAILED)
    return 0


def _parsed(arguments: Sequence[str]) -> Any:
    wanted = next(iter(arguments), "")
    if wanted in _GROUPS:
        group = getattr(import_module(f"permjax.experiments.{wanted}_commands"), wanted.title())
        return tyro.cli(group, prog=f"permjax {wanted}", description=_GROUPS[wanted], args=arguments[1:])
    kinds: list[Any] = [
        Annotated[Run, tyro.conf.subcommand("run", description="Run an experiment and report what it found.")]
    ]
    for name, description in _FILE_COMMANDS.items():
        cls = getattr(import_module("permjax.experiments.commands"), name.title()) if name == wanted else _Unread
        kinds.append(Annotated[cls, tyro.conf.subcommand(name, description=description)])
    for name, description in _GROUPS.items():
        kinds.append(Annotated[_Unread, tyro.conf.subcommand(name, description=description)])
    description = "Find, use and check the permutation symmetries of neural networks."
    commands: Any = Union[tuple(kinds)]  # noqa: UP007
    return tyro.cli(commands, prog="permjax", description=description, args=arguments)


def _run(options: Any, command: str) -> None:
    """Import what is needed only now, so that `--help` is quick."""
    if isinstance(options, Run):
        from permjax.experiments.runs import run

        visible = options.progress
        finished = run(
            options.config, options.out, options.overrides, force=options.force, visible=visible, command=command
        )
    elif group := next((name for name in _GROUPS if type(options).__name__.startswith(name.title())), None):
        outcome, finished = import_module(f"permjax.experiments.{group}_commands").run(options, command)
        if outcome is not None:
            _tell(outcome, tables=finished is None)
    else:
        from permjax.experiments import commands

        finished = commands.run(options, command)
    if finished is not None:
        _show(finished)


def _tell(outcome: Any, *, tables: bool) -> None:
    """Print what was found, in words, and the tables as well where there is no report that has them."""
    from rich.console import Console
    from rich.table import Column, Table

    from permjax.report import format_value

    console = Console(markup=False, highlight=False, width=1000)  # a longer line is broken by the terminal
    console.print(outcome.summary + "\n", soft_wrap=True)
    for table in outcome.tables if tables else ():
        first, *others = table.columns
        shown = Table(first, *(Column(name, justify="right") for name in others), box=None, pad_edge=False)
        for row in table.rows:
            shown.add_row(*map(format_value, row))
        console.print(shown)


def _show(finished: Any) -> None:
    """Print the metrics as a table, and where the report is."""
    from rich.console import Console
    from rich.table import Table

    from permjax.report import headline

    table = Table("metric", "value", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for key, value in headline(finished.metrics).items():
        table.add_row(key, value)
    console = Console(markup=False, highlight=False)
    if not finished.fresh:
        console.print(f"{finished.folder} holds this run, complete; --force runs it anew.", soft_wrap=True)
    console.print(table)
    console.print(f"\nReport: {finished.folder / 'report.html'}", soft_wrap=True)


def _say(message: str, status: int) -> int:
    print(f"permjax: {message}", file=sys.stderr)
    return status


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _save_traceback() -> str:
    with tempfile.NamedTemporaryFile("w", prefix="permjax-", suffix=".txt", delete=False) as file:
        file.write(traceback.format_exc())
    return file.name
