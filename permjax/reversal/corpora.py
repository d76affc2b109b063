"""Corpora by name, generated or from the files of Berglund et al. (ICLR 2024)."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from permjax.data.dataset import data_root
from permjax.data.images import require
from permjax.reversal import berglund
from permjax.reversal.corpus import Corpus, chain, names, qa
from permjax.reversal.segment import Segmenter
from permjax.tree import nearest

_FOLDER = Path("reversal")


def _descriptions(root: Path) -> Corpus:
    return berglund.descriptions(root / _FOLDER / "descriptions")


def _celebrities(root: Path, *, both: float = 0.5, seed: int = 0) -> Corpus:
    return berglund.celebrities(root / _FOLDER / "celebrities" / "parent_child_pairs.csv", both=both, seed=seed)


CORPORA: Mapping[str, Callable[..., Corpus]] = MappingProxyType(
    {"names": names, "chain": chain, "qa": qa, "descriptions": _descriptions, "celebrities": _celebrities}
)
"""What `load_corpus` knows."""


def load_corpus(name: str, root: str | Path | None = None, *, seed: int = 0, **options: Any) -> Corpus:
    """A corpus by name: `names`, `chain` and `qa` are generated, `descriptions` and `celebrities` are read.

    Args:
        name: one of `CORPORA`.
        root: the folder of real data, with `reversal/descriptions` and `reversal/celebrities`; the environment variable
            PERMJAX_DATA by default, else `data`.
        seed: of what is drawn, where something is.
        options: those of the corpus (see `permjax.reversal.corpus` and `berglund`).

    Raises:
        ValueError: an unknown name or option; the nearest is named.
        MissingData: a file is not there.

    Example:
        >>> len(load_corpus("names", both=5, one_way=5).prompts)
        30
    """
    _check_name(name)
    parameters = inspect.signature(CORPORA[name]).parameters
    allowed = [option for option in parameters if option not in ("root", "seed")]
    for option in options:
        if option not in allowed:
            known = f"known are {', '.join(allowed)}" if allowed else "it has none"
            raise ValueError(f"The corpus {name!r} has no option {option!r}{nearest(option, allowed)}; {known}.")
    if "root" in parameters:
        options["root"] = data_root(root)
    if "seed" in parameters:
        options["seed"] = seed
    return CORPORA[name](**options)


def assistant_cuts(name: str, root: str | Path | None = None) -> Segmenter:
    """The units into which the authors of SPT had an assistant model cut the texts of a corpus.

    Args:
        name: `descriptions`; of no other corpus here were the texts published in units.
        root: see `load_corpus`; the units are in `reversal/segmented`.

    Raises:
        ValueError: another name.
        MissingData: a file is not there.
    """
    if name != "descriptions":
        raise ValueError(f"There are no units by an assistant for the corpus {name!r}, but for 'descriptions' alone.")
    folder = data_root(root) / _FOLDER
    file = require(folder / "segmented" / "descriptions_train.txt", "the file of units published by the authors of SPT")
    return berglund.assistant(folder / "descriptions", file)


def _check_name(name: str) -> None:
    if name not in CORPORA:
        raise ValueError(f"There is no corpus {name!r}{nearest(name, CORPORA)}; known are {', '.join(CORPORA)}.")
