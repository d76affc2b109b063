"""Files that appear whole or not at all."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staging(folder: Path) -> Iterator[Callable[[str, Callable[[Path], object]], None]]:
    """Files written under temporary names, renamed in order once all are on the disk, removed if one fails."""
    staged: list[tuple[Path, Path]] = []

    def stage(name: str, write: Callable[[Path], object]) -> None:
        temporary = folder / f".{name}.{secrets.token_hex(4)}.tmp"
        staged.append((temporary, folder / name))
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes its files private
        _sync(temporary)

    try:
        yield stage
        for temporary, target in staged:
            os.replace(temporary, target)
        _sync(folder)
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
