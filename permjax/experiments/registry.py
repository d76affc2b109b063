"""The kinds of experiments by name, imported when they are asked for."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from permjax.experiments.progress import Progress
from permjax.report import Outcome

_MODULES = {
    "rebasin": "permjax.experiments.rebasin",
    "lmc": "permjax.experiments.lmc",
    "lmc_gpt": "permjax.experiments.lmc_gpt",
    "pleas": "permjax.experiments.pleas",
    "lora_tasks": "permjax.experiments.lora_tasks",
    "nfe_dihedral": "permjax.experiments.nfe_dihedral",
    "nfe_alignment": "permjax.experiments.nfe_alignment",
    "nfe": "permjax.experiments.nfe",
    "spt": "permjax.experiments.spt",
    "spt_text": "permjax.experiments.spt_text",
    "collapse_single": "permjax.experiments.collapse_single",
    "collapse_sequential": "permjax.experiments.collapse_sequential",
    "collapse_signals": "permjax.experiments.collapse_signals",
    "edit_hf": "permjax.experiments.edit_hf",
    "edit_transport": "permjax.experiments.edit_transport",
}


class Experiment(NamedTuple):
    """One kind of experiment; its module has it as `EXPERIMENT`.

    Attributes:
        config: the configuration class, with its name as the class variable `experiment`.
        run: `run(config, out, progress)`; it may keep state in `out/state`, from which an interrupted run goes on.
    """

    config: type
    run: Callable[[Any, Path, Progress], Outcome]


def experiments() -> dict[str, Experiment]:
    """All kinds by name."""
    return {kind: import_module(module).EXPERIMENT for kind, module in _MODULES.items()}
