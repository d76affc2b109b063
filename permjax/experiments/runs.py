"""From a configuration to a complete folder: fresh, resumed, or found complete."""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from permjax.config import ConfigError, config_hash, load_config, read_toml, to_dict, to_toml
from permjax.experiments.progress import Progress
from permjax.experiments.registry import experiments
from permjax.files import atomic_path
from permjax.report import write_report
from permjax.tree import nearest

DEMO = "rebasin_digits"
_OWN = ("metrics.json", "report.html", "config.toml", "figures", "model", "state")
"""What a run puts into its folder, the mark of completeness first."""


class Finished(NamedTuple):
    """A complete run.

    Attributes:
        folder: where its report is.
        metrics: the contents of its metrics.json.
        fresh: whether it ran now, and was not found complete.
    """

    folder: Path
    metrics: dict[str, Any]
    fresh: bool = True


def run(
    config: str | None, out: str | None, overrides: Sequence[str], *, force: bool, visible: bool, command: str
) -> Finished:
    """Run an experiment, or go on with one that was interrupted, unless it is complete.

    Args:
        config: a TOML file or the name of one that comes with permjax; the demo by default.
        out: the folder; `runs/<configuration>-<hash>` by default.
        overrides: `section.key=value` strings.
        force: start anew in a folder that holds a run.
        visible: whether to show progress bars.
        command: what to type to repeat the run, for the report.

    Raises:
        ConfigError: the configuration is wrong, or the folder holds a run of another one.
    """
    path, known = find_config(config), experiments()
    settings = load_config(path, overrides, {kind: experiment.config for kind, experiment in known.items()})
    folder = Path("runs", f"{path.stem}-{config_hash(settings)}") if out is None else Path(out)
    if _is_complete(folder, settings, force=force):
        return Finished(folder, read_metrics(folder), fresh=False)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax raises what matters; the rest is about its own files
    begin = time.perf_counter()
    with Progress(visible=visible) as progress:
        outcome = known[settings.experiment].run(settings, folder, progress)
    write_report(outcome, folder, settings, command=command, seconds=time.perf_counter() - begin)
    shutil.rmtree(folder / "state", ignore_errors=True)
    return Finished(folder, read_metrics(folder))


def find_config(name: str | None) -> Path:
    """The file of a configuration that is given by its path or, for those that come with permjax, by its name.

    Raises:
        ConfigError: there is none; names the nearest one.
    """
    path, shipped = Path(name or DEMO), _shipped()
    if name is not None and path.is_file():
        return path
    if str(path) not in shipped:
        message = f"There is no configuration {str(path)!r}{nearest(path.stem, shipped)}; give a TOML file, or the "
        raise ConfigError(f"{message}name of one that comes with permjax: {', '.join(shipped)}.")
    return shipped[str(path)]


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of a complete run."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def _shipped() -> dict[str, Path]:
    """The configurations in an installed permjax, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _is_complete(folder: Path, settings: Any, *, force: bool) -> bool:
    """Whether a folder holds this run; else it is made ready for it."""
    saved, complete = folder / "config.toml", (folder / "metrics.json").is_file()
    if complete and not saved.is_file():
        message = f"{folder} holds a metrics.json, but no config.toml that says of which run it is; give another --out."
        raise ConfigError(message)
    if force and saved.is_file():
        _clear(folder)
    elif saved.is_file() and (complete or (folder / "state").is_dir()):
        _check_same(folder, settings)
        return complete
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(saved) as temporary:
        temporary.write_text(to_toml(settings), encoding="utf-8")
    return False


def _check_same(folder: Path, settings: Any) -> None:
    here, there = (dict(_flat(values)) for values in (to_dict(settings), read_toml(folder / "config.toml")))
    for key in here | there:
        if here.get(key) != there.get(key):
            was, now = (repr(values[key]) if key in values else "not set" for values in (there, here))
            message = f"{folder} holds a run of another configuration: {key!r} is {was} there, but {now} here; "
            raise ConfigError(f"{message}give another --out, or --force to start anew.")


def _flat(values: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{section}{key}.")
        else:
            yield section + key, value


def _clear(folder: Path) -> None:
    for name in _OWN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
