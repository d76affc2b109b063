"""What `permjax edit` reads: a model with its tokenizer, the facts, and texts that say what is to stay."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import jax

from permjax.edit.base import Editor, Statistics
from permjax.edit.covariance import collect_covariances
from permjax.edit.evaluate import Probe as Others
from permjax.edit.evaluate import prepare_probe
from permjax.edit.places import MlpPlace, mlp_place
from permjax.edit.prepare import PreparedEdit
from permjax.edit.presets import PREFIXES
from permjax.edit.requests import EditRequest, read_requests, sift_requests
from permjax.experiments.architectures import FilesError, find_architecture
from permjax.experiments.edit_editors import editors_of, layers_of
from permjax.experiments.edit_options import EditOptions
from permjax.experiments.edit_texts import ASKED, check_disjoint, statistics_of_text, with_prefixes
from permjax.experiments.guard_files import read_probe
from permjax.experiments.language_files import LanguageFiles, open_language_model
from permjax.experiments.model_files import check_place
from permjax.io.tokenizers import FileTokenizer
from permjax.merge.energy import InputMoment
from permjax.merge.perplexity import Probe

_MULTIPLE = 8


class Prepared(NamedTuple):
    """All edits as arrays.

    Attributes:
        written: editor -> edits with the prefixes that it asks for.
        asked: edits with other prefixes, to measure on.
        others: paraphrases and neighbours of each.
    """

    written: dict[str, list[PreparedEdit]]
    asked: list[PreparedEdit]
    others: list[Others]


class Job(NamedTuple):
    """All that an edit needs, checked.

    Attributes:
        files: the model.
        requests: the facts.
        skipped: a sentence on each record that was left out.
        editors: name -> editor, to be tried in this order.
        edits: the facts as arrays.
        statistics: of keys in the model.
        source: what they were collected from.
        probe: the sentences of the guard; none without one.
        moments: leaf -> second moments of its inputs on these sentences.
    """

    files: LanguageFiles
    requests: list[EditRequest]
    skipped: tuple[str, ...]
    editors: dict[str, Editor]
    edits: Prepared
    statistics: Statistics
    source: str
    probe: Probe
    moments: dict[str, InputMoment]


def opened(options: EditOptions) -> Job:
    """Read and check everything, cheap things first.

    Raises:
        ValueError: names the option, the file, and the line or record where there is one.
        OSError: a file cannot be read.
    """
    _check(options)
    requests, skipped = sift_requests(options.edits) if options.skip_bad else (read_requests(options.edits), ())
    files = open_language_model(options.model)
    check_place(Path(options.out), [files.checkpoint])
    editors = editors_of(options, files.net.config)
    places = {layer: mlp_place(files.net.config, layer) for layer in layers_of(editors)}
    tokenizer = replace(files.tokenizer, special=True)
    probe, text = _texts(options, files)
    edits = _prepared(options, files, tokenizer, requests, [*editors])
    statistics, source = _statistics(options, files, tokenizer, text, places)
    moments = _moments(files, probe, places)
    return Job(files, requests, skipped, editors, edits, statistics, source, probe, moments)


def _check(options: EditOptions) -> None:
    """Check the options by themselves."""
    if options.identity and options.text:
        raise FilesError("--identity takes no second moments, and --text is what to collect them from; give only one.")
    for name in ("guard_limit", "guard_each", "guard_energy", "guard_sentences"):
        flag, value = name.replace("_", "-"), getattr(options, name)
        if value != getattr(EditOptions, name) and not options.guard:
            raise FilesError(f"--{flag} is for the guard; add --guard TEXT, or leave it out.")
        if value is not None and not value > 0:
            raise FilesError(f"--{flag} must be above 0, not {value}.")
    if options.batch < 1:
        raise FilesError(f"--batch must be at least 1, not {options.batch}.")
    if not options.ridge >= 0:
        raise FilesError(f"--ridge must be at least 0, not {options.ridge}.")
    if Path(options.out).suffix == ".safetensors":
        raise FilesError(f"{options.out} is a file, but an edited model needs a folder, with its tokenizer; name one.")


def _texts(options: EditOptions, files: LanguageFiles) -> tuple[Probe, Probe]:
    """The sentences of the guard and those for second moments, which must be other ones."""
    check_disjoint({"--guard": options.guard, "--text": options.text})
    architecture = find_architecture((files.checkpoint,), None, None)
    kinds = ((options.guard, options.guard_sentences, False), (options.text, None, True))
    guard, text = (
        read_probe(paths, architecture, files.checkpoint, None, count, special=special) if paths else {}
        for paths, count, special in kinds
    )
    return guard, text


# edits


def _prepared(
    options: EditOptions,
    files: LanguageFiles,
    tokenizer: FileTokenizer,
    requests: Sequence[EditRequest],
    names: Sequence[str],
) -> Prepared:
    """The arrays of all edits, with prefixes that the model writes."""
    kinds = list(dict.fromkeys([ASKED, *(PREFIXES[name] for name in names)]))
    keys = dict(zip(kinds, jax.random.split(jax.random.key(options.seed), len(kinds)), strict=True))
    own = {kind: with_prefixes(files, tokenizer, requests, kind, keys[kind]) for kind in kinds}
    fresh = with_prefixes(files, tokenizer, requests, ASKED, jax.random.fold_in(keys[ASKED], 1))
    longest = files.net.config.positions
    asked = [(text, one.target) for one in requests for text in (*one.paraphrases, *one.neighbours)]
    pad_to = min(longest, _rounded(max((len(tokenizer.encode(" ".join(pair)).ids) for pair in asked), default=1)))
    others = [prepare_probe(one, tokenizer, pad_to=pad_to) for one in requests]
    return Prepared({name: own[PREFIXES[name]] for name in names}, fresh, others)


def _rounded(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE


# second moments


def _statistics(
    options: EditOptions, files: LanguageFiles, tokenizer: FileTokenizer, text: Probe, places: dict[int, MlpPlace]
) -> tuple[Statistics, str]:
    """The second moments of the keys of all layers to edit, and what they come from."""
    if options.identity:
        return Statistics.of(files.net, files.params, None), "the identity"
    key = jax.random.fold_in(jax.random.key(options.seed), 1)
    return statistics_of_text(files, tokenizer, places, text, options.text, key)


def _moments(files: LanguageFiles, probe: Probe, places: dict[int, MlpPlace]) -> dict[str, InputMoment]:
    """What goes into the matrices to edit on the text of the guard, for the energy of an edit."""
    if not probe:
        return {}
    found = collect_covariances(files.net, files.params, chain.from_iterable(probe.values()), [*places])
    axes = {"in_out": (0,), "out_in": (1,)}
    return {place.weight: InputMoment(found[n].matrix, axes[place.orientation]) for n, place in places.items()}
