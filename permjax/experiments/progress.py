"""What a long run tells while it works."""

import sys
from typing import Any

from tqdm import tqdm


class Progress:
    """One bar at a time on the standard error stream.

    Example:
        >>> with Progress() as progress:
        ...     progress.start("training", 3)
        ...     for loss in (0.9, 0.5, 0.4):
        ...         progress.step(1, loss=loss)
        ...     progress.done()
    """

    def __init__(self, *, visible: bool = True):
        """Make an empty one; an invisible one says nothing."""
        self._visible = visible
        self._bar: tqdm | None = None

    def start(self, name: str, total: int) -> None:
        """Begin a stage of `total` steps; an unfinished one ends."""
        self.done()
        often = 0.1 if sys.stderr.isatty() else 10.0  # seconds
        self._bar = tqdm(total=total, desc=name, disable=not self._visible, mininterval=often, file=sys.stderr)

    def step(self, n: int = 1, **values: Any) -> None:
        """Count `n` steps and show the values."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(n)

    def done(self) -> None:
        """End the stage; its bar stays."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.done()
