"""Files of re-ordered copies, for trainers that cannot be changed: streaming, and resumed where killed."""

import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from permjax.files import atomic_path
from permjax.reversal.reorder import ORDERS
from permjax.reversal.texts import Lines, PermuteOptions, check_options, permute_lines

_CHUNK = 512  # lines
Progress = Callable[[int], None]


class Written(NamedTuple):
    """What is in the file.

    Attributes:
        texts: how many were read.
        lines: lines written.
        units: units of all texts.
        orders: how many lines have each order, by its name.
        resumed: texts that an earlier run had done.
    """

    texts: int
    lines: int
    units: int
    orders: dict[str, int]
    resumed: int


def permute_file(
    source: str | Path,
    target: str | Path,
    options: PermuteOptions,
    *,
    processes: int = 1,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Written:
    """Write each text of a file of JSON lines and re-ordered copies of it; other fields stay, and `order` is new.

    Until it is complete, the output is `<target>.part` beside `<target>.part.json`, which says how far it is; the
    same call goes on from there. What is written depends on the options alone, not on processes or interruptions.

    Args:
        source: one JSON object in each line.
        target: the same, with an `order` in each.
        options: what to make of each line.
        processes: how many work at a time.
        force: overwrite a complete output, or begin a partial one anew.
        progress: called with the bytes of the source that are done, as they are.

    Raises:
        ValueError: a line is no object with a text, names no example, or an option is wrong; or a partial output is
            one of other options.
        FileExistsError: the output exists.
    """
    source, target = Path(source), Path(target)
    check_options(options)
    _check(source, target, force=force)
    part, state = (target.with_name(f"{target.name}.{end}") for end in ("part", "part.json"))
    about = _about(source, options)
    done = _begin(state, about, force=force)
    with source.open("rb") as lines, part.open("ab") as output:
        lines.seek(done["read"])
        output.truncate(done["written"])
        progress(done["read"])
        for count, result in _results(_chunks(lines, done["line"]), options, processes):
            output.write(result.content)
            output.flush()
            os.fsync(output.fileno())
            done = _counted(done, result) | {"line": done["line"] + count, "written": output.tell()}
            _save(state, about | {"done": done})
            progress(result.read)
    os.replace(part, target)
    state.unlink(missing_ok=True)
    return Written(done["texts"], done["lines"], done["units"], done["orders"], done["resumed"])


def _chunks(lines: BinaryIO, first: int) -> Iterator[tuple[int, list[bytes]]]:
    while chunk := list(islice(lines, _CHUNK)):
        yield first, chunk
        first += len(chunk)


def _results(
    chunks: Iterator[tuple[int, list[bytes]]], options: PermuteOptions, processes: int
) -> Iterator[tuple[int, Lines]]:
    """How many lines were read and what is written for them, in their order, with a few chunks under way at a time."""
    if processes == 1:
        yield from ((len(lines), permute_lines(first, lines, options)) for first, lines in chunks)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(processes, context) as pool:
        waiting: deque[tuple[int, Future]] = deque()
        for first, lines in chunks:
            waiting.append((len(lines), pool.submit(permute_lines, first, lines, options)))
            if len(waiting) > 2 * processes:
                count, future = waiting.popleft()
                yield count, future.result()
        yield from ((count, future.result()) for count, future in waiting)


def _counted(done: dict[str, Any], result: Lines) -> dict[str, Any]:
    added = {name: done[name] + getattr(result, name) for name in ("texts", "lines", "units", "read")}
    return done | added | {"orders": {name: done["orders"][name] + result.orders[name] for name in ORDERS}}


def _check(source: Path, target: Path, *, force: bool) -> None:
    if not source.is_file():
        raise ValueError(f"There is no file {source}; give one with a JSON object in each line.")
    if source.resolve() == target.resolve():
        raise ValueError(f"{source} would be overwritten while it is read; give the output another name.")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; give the output another name, or overwrite it with `--force`.")


def _about(source: Path, options: PermuteOptions) -> dict[str, Any]:
    """What makes two runs the same one, as JSON."""
    found = source.stat()
    about = {"source": str(source.resolve()), "size": found.st_size, "changed": found.st_mtime_ns}
    return about | {"options": json.loads(json.dumps(asdict(options)))}


def _begin(state: Path, about: dict[str, Any], *, force: bool) -> dict[str, Any]:
    """How far an earlier run came."""
    counts = dict.fromkeys(("line", "read", "written", "texts", "lines", "units", "resumed"), 0)
    if force or not state.is_file():
        return {**counts, "orders": dict.fromkeys(ORDERS, 0)}
    saved = json.loads(state.read_text())
    done = saved.pop("done")
    if saved != about:
        message = f"{state} is that of another source or of other options; "
        raise ValueError(message + "repeat that command to complete it, or begin anew with `--force`.")
    return done | {"resumed": done["texts"]}


def _save(state: Path, content: dict[str, Any]) -> None:
    with atomic_path(state) as temporary:
        temporary.write_text(json.dumps(content))
