"""Writing files so that a killed run leaves either the old file or the new one."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is flushed to disk and renamed to `path`.

    An exception removes the temporary file and leaves `path` as it was.

    Example:
        >>> with atomic_path("metrics.json") as temporary:
        ...     temporary.write_text("{}")
    """
    path = Path(path)
    temporary, mode = _temporary(path)
    try:
        yield temporary
        _settle(temporary, mode)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staging(folder: Path) -> Iterator[Callable[[str, Callable[[Path], object]], None]]:
    """Several files of one folder: `stage(name, write)` calls `write(temporary path)`.

    They are renamed in order once all are on the disk, and removed if one fails.
    """
    staged: list[tuple[Path, Path]] = []

    def stage(name: str, write: Callable[[Path], object]) -> None:
        temporary, mode = _temporary(folder / name)
        staged.append((temporary, folder / name))
        write(temporary)
        _settle(temporary, mode)

    try:
        yield stage
        for temporary, target in staged:
            os.replace(temporary, target)
        _sync(folder)
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> tuple[Path, int]:
    """Make an empty file beside `path` and return it with its mode, which is what the user's umask asks for."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.touch(exist_ok=False)
    return temporary, temporary.stat().st_mode


def _settle(temporary: Path, mode: int) -> None:
    """Bring a written file to the disk, with its mode: safetensors makes its files private."""
    temporary.chmod(mode)
    _sync(temporary)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
