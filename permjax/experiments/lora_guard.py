"""The guard of merged adapters: they are put into their base model, as each of those they were made of."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from permjax import tree
from permjax.experiments.architectures import Architecture, FilesError, find_architecture
from permjax.experiments.guard_files import Candidate, GuardOptions, Judged, check_unguarded, judge, on_device, probe_of
from permjax.experiments.lora_places import Place, place_of
from permjax.io.checkpoint import Checkpoint, open_checkpoint
from permjax.lora.keys import ModuleInfo
from permjax.lora.pool import Factors
from permjax.merge.perplexity import Probe


class Base(NamedTuple):
    """A base model and what a guard measures it on.

    Attributes:
        checkpoint: its files.
        architecture: its function.
        probe: the sentences.
        places: by module of the adapters.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    probe: Probe
    places: Mapping[str, Place]


def base_of(options: GuardOptions, base: str | None, modules: Mapping[str, ModuleInfo]) -> Base | None:
    """The base model of adapters with these modules, where there is a guard.

    Raises:
        ValueError: one of the guard and the base model is missing, or they or the modules do not fit; names the file.
    """
    if (base is None) != (not options.guard):
        message = "--guard TEXT and --base MODEL belong together: adapters are measured in the model they are for; "
        raise FilesError(message + "give both, or neither.")
    check_unguarded(options)
    if base is None:
        return None
    checkpoint = open_checkpoint(base)
    architecture = find_architecture([checkpoint], None, None)
    places = {module: place_of(module, info, checkpoint) for module, info in modules.items()}
    return Base(checkpoint, architecture, probe_of(options, architecture, checkpoint), places)


def judge_adapters(
    options: GuardOptions,
    base: Base,
    adapters: Mapping[str, Callable[[], Mapping[str, Factors]]],
    merged: tuple[str, Mapping[str, Factors]],
) -> Judged:
    """Compare the base model with a merged adapter with the best of: it by itself, and it with each adapter.

    Args:
        options: the limit.
        base: the model.
        adapters: name -> function that reads the modules of an adapter.
        merged: name and modules of what they were merged to.

    Raises:
        Refused: its perplexity is above the limit for some corpus, or not finite.
    """
    params = {name: base.checkpoint[name].read() for name in tree.names(base.architecture.like)}

    def candidate(name: str, modules: Mapping[str, Factors]) -> Candidate:
        named = params | dict(_updated(base.places, params, modules))
        placed = {leaf: on_device(value) for leaf, value in named.items()}
        return Candidate(name, base.architecture.apply, tree.unflatten(base.architecture.like, placed))

    def given() -> Iterator[Candidate]:
        yield candidate("base", {})
        yield from (candidate(name, read()) for name, read in adapters.items())

    return judge(options, base.probe, given(), candidate(*merged))


def _updated(
    places: Mapping[str, Place], params: Mapping[str, np.ndarray], modules: Mapping[str, Factors]
) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves that an adapter changes, in float32 or wider."""
    for module, (a, b) in modules.items():
        name, transposed = places[module]
        update = np.asarray(b, np.float32) @ np.asarray(a, np.float32)
        update = (update.T if transposed else update).reshape(params[name].shape)
        yield name, np.asarray(params[name], np.result_type(np.float32, params[name].dtype)) + update
