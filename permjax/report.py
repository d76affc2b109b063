"""The report of a run: metrics, figures, models, and one page that opens offline."""

import base64
import json
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from permjax.config import config_hash, to_dict, to_toml
from permjax.figures import Contour, Curve, Drawing, Figure, Mark, Matrix, draw, rounded
from permjax.files import atomic_path
from permjax.io.checkpoint import save_checkpoint

__all__ = [
    "Contour",
    "Curve",
    "Figure",
    "Mark",
    "Matrix",
    "Outcome",
    "Table",
    "Text",
    "format_value",
    "headline",
    "write_report",
]

PROVENANCE = ("config_hash", "seed", "versions", "device", "seconds")
"""The keys of metrics.json that say how a run was made."""

_PACKAGES = ("permjax", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "safetensors")


class Table(NamedTuple):
    """A table; numbers in a column are written with the same decimals.

    Attributes:
        title: one line above.
        columns: the head of each column.
        rows: one cell per column: numbers or text.
        caption: a sentence or two for below.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple, ...]
    caption: str = ""


class Text(NamedTuple):
    """Preformatted text, folded away under its title."""

    title: str
    body: str


class Outcome(NamedTuple):
    """What an experiment found.

    Attributes:
        title: one line.
        summary: what was run and what came out, in a few sentences.
        metrics: numbers, text and truth values by key, the most important first.
        tables: in the order of the page.
        figures: in the order of the page.
        texts: longer things, such as `spec.explain()`.
        models: file stem -> named leaves; saved as `model/<stem>.safetensors`.
        headline: keys of the few metrics that stand on top of the page; none by default.
        network: configuration of the models, where it is not the `model` of the run's.
    """

    title: str
    summary: str
    metrics: Mapping[str, float | int | str | bool]
    tables: tuple[Table, ...] = ()
    figures: tuple[Drawing, ...] = ()
    texts: tuple[Text, ...] = ()
    models: Mapping[str, Mapping[str, Any]] = {}
    headline: tuple[str, ...] = ()
    network: Any = None


def write_report(outcome: Outcome, out: Path, config: Any, *, command: str, seconds: float) -> None:
    """Write `model/`, `figures/`, `config.toml`, `report.html` and last `metrics.json`, which marks a complete run.

    The outcome's `network`, or the configuration's `model`, is written beside the models as their `config.json`.

    Args:
        outcome: what to report.
        out: the folder, made where missing.
        config: the configuration dataclass of the run; its `seed` is reported, or 0.
        command: what to type to repeat the run.
        seconds: how long it took.

    Raises:
        ValueError: two figures have one name, a metric is no number, text or truth value or takes the name of one
            of `PROVENANCE`, a row of a table is too long or short, or a figure cannot be drawn; nothing is written.
        CheckpointError: a model cannot be saved.
    """
    _check_names(outcome)
    metrics = _metrics(outcome, config, seconds)
    pictures = [_Picture(figure, draw(figure), draw(figure, "dark")) for figure in outcome.figures]
    page = _page(outcome, pictures, config, metrics, command)
    for folder in (out, *([out / "figures"] if pictures else [])):
        folder.mkdir(parents=True, exist_ok=True)
    for stem, leaves in outcome.models.items():
        save_checkpoint(out / "model" / f"{stem}.safetensors", leaves)
    network = outcome.network or getattr(config, "model", None)
    if outcome.models and network is not None:  # so that `align` and `merge` know the architecture
        _write(out / "model" / "config.json", json.dumps(to_dict(network), indent=2).encode())
    for picture in pictures:
        _write(out / "figures" / f"{picture.figure.name}.png", picture.light)
    _write(out / "config.toml", to_toml(config).encode())
    _write(out / "report.html", page.encode())
    _write(out / "metrics.json", (json.dumps(metrics, indent=2, ensure_ascii=False) + "\n").encode())


def headline(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What was found, as text by key, without what says how it was made; a `_std` joins the mean it belongs to."""
    found = {key: value for key, value in metrics.items() if key not in PROVENANCE}
    spreads = {key: found.get(f"{key}_std") for key in found}
    return {
        key: format_value(value) + ("" if spreads[key] is None else f" ± {format_value(spreads[key])}")
        for key, value in found.items()
        if not (key.endswith("_std") and key.removesuffix("_std") in found)
    }


def format_value(value: Any) -> str:
    """A number, truth value or text for a reader: four digits, or all before the point, `yes` and `no`."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Real) and not isinstance(value, int | np.integer):
        number = float(value)
        return f"{number:,.0f}" if 1e4 <= abs(number) < 1e9 else f"{number:.4g}"
    return f"{value:,}" if isinstance(value, int | np.integer) else str(value)


def _write(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


# metrics


def _check_names(outcome: Outcome) -> None:
    taken = [key for key in outcome.metrics if key in PROVENANCE]
    if taken:
        raise ValueError(f"The metric {taken[0]!r} has a name that every report uses for itself; rename it.")
    missing = [key for key in outcome.headline if key not in outcome.metrics]
    if missing:
        raise ValueError(f"The headline names {missing[0]!r}, which is no metric; known are {list(outcome.metrics)}.")
    twice = [name for name, count in Counter(figure.name for figure in outcome.figures).items() if count > 1]
    if twice:
        raise ValueError(f"Two figures have the name {twice[0]!r}, which is also their file name; rename one.")


def _metrics(outcome: Outcome, config: Any, seconds: float) -> dict[str, Any]:
    found = {key: _plain(key, value) for key, value in outcome.metrics.items()}
    made = {"versions": _versions(), "device": _device(), "seconds": round(seconds, 3)}
    return found | {"config_hash": config_hash(config), "seed": getattr(config, "seed", 0)} | made


def _plain(key: str, value: Any) -> float | int | str | bool:
    """A value that JSON can hold; NaN and infinities, which it cannot, become text."""
    value = value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) and value.size == 1 else value
    if not isinstance(value, float | int | str | bool):
        message = f"The metric {key!r} is {type(value).__name__}; give one number, truth value or text."
        raise ValueError(message)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} from a checkout")
    return ", ".join(found)


def _device() -> str:
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


# the page


class _Picture(NamedTuple):
    figure: Drawing
    light: bytes
    dark: bytes


class _Column(NamedTuple):
    head: str
    cells: list[str]
    numeric: bool


def _page(outcome: Outcome, pictures: Sequence[_Picture], config: Any, metrics: Mapping[str, Any], command: str) -> str:
    return _template().render(
        outcome=outcome,
        kind=getattr(config, "experiment", ""),
        tiles=[(key.replace("_", " "), format_value(metrics[key])) for key in outcome.headline],
        numbers=headline(metrics),
        tables=[(table, _columns(table)) for table in outcome.tables],
        figures=[(figure, _embedded(light), _embedded(dark)) for figure, light, dark in pictures],
        config=to_toml(config),
        command=command,
        made={key: format_value(metrics[key]) for key in PROVENANCE},
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )


@cache
def _template() -> Template:
    loader = PackageLoader("permjax", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")


def _embedded(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _columns(table: Table) -> list[_Column]:
    for row in table.rows:
        if len(row) != len(table.columns):
            message = (
                f"A row of the table {table.title!r} has {len(row)} cells for {len(table.columns)} columns: {row}."
            )
            raise ValueError(message)
    return [_column(head, [row[i] for row in table.rows]) for i, head in enumerate(table.columns)]


def _column(head: str, values: Sequence[Any]) -> _Column:
    floats = [i for i, value in enumerate(values) if isinstance(value, float | np.floating)]
    cells = [format_value(value) for value in values]
    for i, text in zip(floats, rounded([values[i] for i in floats]), strict=True):
        cells[i] = text
    return _Column(head, cells, all(cell[:1] in "+-−.0123456789" or cell in ("nan", "inf") for cell in cells))
