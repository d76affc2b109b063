"""Where an experiment finds real data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataRoot:
    """Where real data is.

    Attributes:
        root: the folder with `kg/...`, `reversal/...` and `text/...`; the environment variable PERMJAX_DATA by default.
    """

    root: str | None = None
