"""Knowledge graphs by name."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from permjax.data.images import require
from permjax.kge.family import family_graph
from permjax.kge.graph_files import load_graph, save_graph
from permjax.kge.triples import Graph, GraphError
from permjax.tree import nearest

__all__ = ["GRAPHS", "Graph", "GraphError", "family_graph", "knowledge_graph", "load_graph", "save_graph"]


def _in(folder: str, name: str) -> Callable[..., Graph]:
    """The reader of a folder under `<root>/kg`."""
    return lambda root: load_graph(require(root / "kg" / folder, f"{name}, as a folder of triples"), name)


def _folder(path: Path, name: str | None = None) -> Graph:
    return load_graph(path, name)


GRAPHS: dict[str, Callable[..., Graph]] = {
    "family": family_graph,
    "umls": _in("umls", "UMLS"),
    "nations": _in("nations", "Nations"),
    "kinships": _in("kinships", "Kinships"),
    "codex-s": _in("codex-s", "CoDEx-S"),
    "wn18rr": _in("WN18RR", "WN18RR"),
    "fb15k237": _in("FB15k-237", "FB15k-237"),
    "folder": _folder,
}
"""Readers by name; `family` is generated, `folder` takes the option `path`, the others read `<root>/kg/...`."""


def knowledge_graph(name: str = "family", root: str | Path | None = None, **options: Any) -> Graph:
    """A knowledge graph by name.

    Args:
        name: one of `GRAPHS`.
        root: the folder of real data; the environment variable PERMJAX_DATA by default, else `data`. A relative `path`
            starts at the first two.
        options: those of `family_graph` for `family`, and `path` and `name` for `folder` (see `load_graph`).

    Raises:
        MissingData: a file is not there; says which, what it is, and which setting names its folder.
        GraphError: an unknown name or option (with the nearest one), or a graph that cannot be used.

    Example:
        >>> knowledge_graph("family", seed=1).relations[:2]
        ('parent_of', 'child_of')
    """
    if name not in GRAPHS:
        raise GraphError(f"There is no graph {name!r}{nearest(name, GRAPHS)}; known are {', '.join(GRAPHS)}.")
    parameters = inspect.signature(GRAPHS[name]).parameters
    allowed = [option for option in parameters if option != "root"]
    for option in options:
        if option not in allowed:
            known = f"known are {', '.join(allowed)}" if allowed else "it takes none"
            raise GraphError(f"The graph {name!r} has no option {option!r}{nearest(option, allowed)}; {known}.")
    folder = root or os.environ.get("PERMJAX_DATA")
    if "root" in parameters:
        options["root"] = Path(folder or "data")
    elif "path" in parameters:
        if "path" not in options:
            raise GraphError(f"The graph {name!r} needs the option 'path', the folder or archive to read.")
        options["path"] = Path(folder or "", options["path"])
    return GRAPHS[name](**options)
