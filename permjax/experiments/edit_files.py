"""What `permjax edit` reads: a model with its tokenizer, the facts, and texts that say what is to stay."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax

from permjax.data.corpora import read_corpora
from permjax.edit.base import Editor, Statistics
from permjax.edit.covariance import collect_covariances
from permjax.edit.evaluate import Probe as Others
from permjax.edit.evaluate import prepare_probe
from permjax.edit.places import MlpPlace, mlp_place
from permjax.edit.prefixes import STARTS, sampled_prefixes
from permjax.edit.prepare import PreparedEdit, prepare_all
from permjax.edit.presets import PREFIXES
from permjax.edit.requests import EditRequest, read_requests
from permjax.experiments.architectures import FilesError, find_architecture
from permjax.experiments.edit_editors import editors_of, layers_of
from permjax.experiments.edit_options import EditOptions
from permjax.experiments.guard_files import read_probe
from permjax.experiments.language_files import LanguageFiles, open_language_model
from permjax.experiments.model_files import check_place
from permjax.io.tokenizers import FileTokenizer
from permjax.merge.energy import InputMoment
from permjax.merge.perplexity import Probe, Sentences, padded

_ASKED = ((10, 5),)  # prefixes before the prompts that are asked: tokens, and how many
_LIKELY, _LONGEST, _ROWS, _TIMES = 40, 64, 16, 4  # of text that the model writes; so many tokens for each key's width
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
        editors: name -> editor, to be tried in this order.
        edits: the facts as arrays.
        statistics: of keys in the model.
        source: what they were collected from.
        probe: the sentences of the guard; none without one.
        moments: leaf -> second moments of its inputs on these sentences.
    """

    files: LanguageFiles
    requests: list[EditRequest]
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
    requests = read_requests(options.edits)
    files = open_language_model(options.model)
    check_place(Path(options.out), [files.checkpoint])
    editors = editors_of(options, files.net.config)
    places = {layer: mlp_place(files.net.config, layer) for layer in layers_of(editors)}
    tokenizer = replace(files.tokenizer, special=True)
    probe, text = _texts(options, files)
    edits = _prepared(options, files, tokenizer, requests, [*editors])
    statistics, source = _statistics(options, files, tokenizer, text, places)
    moments = _moments(files, probe, places)
    return Job(files, requests, editors, edits, statistics, source, probe, moments)


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
    corpora = [read_corpora(paths) if paths else {} for paths in (options.guard, options.text)]
    guarded, kept = ({line for lines in some.values() for line in lines} for some in corpora)
    if shared := sorted(guarded & kept):
        message = f"--guard and --text share {len(shared)} sentences, such as {shared[0][:60]!r}; a guard judges by "
        raise FilesError(message + "text that the edit was not fitted to: give other text to one of them.")
    architecture = find_architecture((files.checkpoint,), None, None)
    most = (options.guard_sentences, max(map(len, corpora[1].values()), default=1))
    guard, text = (
        read_probe(paths, architecture, files.checkpoint, None, count) if paths else {}
        for paths, count in zip((options.guard, options.text), most, strict=True)
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
    kinds = list(dict.fromkeys([_ASKED, *(PREFIXES[name] for name in names)]))
    keys = dict(zip(kinds, jax.random.split(jax.random.key(options.seed), len(kinds)), strict=True))
    own = {kind: _with_prefixes(files, tokenizer, requests, kind, keys[kind]) for kind in kinds}
    fresh = _with_prefixes(files, tokenizer, requests, _ASKED, jax.random.fold_in(keys[_ASKED], 1))
    longest = files.net.config.positions
    asked = [(text, one.target) for one in requests for text in (*one.paraphrases, *one.neighbours)]
    pad_to = min(longest, _rounded(max((len(tokenizer.encode(" ".join(pair)).ids) for pair in asked), default=1)))
    others = [prepare_probe(one, tokenizer, pad_to=pad_to) for one in requests]
    return Prepared({name: own[PREFIXES[name]] for name in names}, fresh, others)


def _with_prefixes(
    files: LanguageFiles,
    tokenizer: FileTokenizer,
    requests: Sequence[EditRequest],
    kind: tuple[tuple[int, int], ...],
    key: jax.Array,
) -> list[PreparedEdit]:
    prefixes = _sampled(files, tokenizer, key, kind) if kind else []
    edits = prepare_all(requests, tokenizer, prefixes=prefixes)
    longest = files.net.config.positions
    if edits[0].tokens.shape[1] <= longest:
        return edits
    return prepare_all(requests, tokenizer, prefixes=prefixes, pad_to=longest)


def _sampled(
    files: LanguageFiles, tokenizer: FileTokenizer, key: jax.Array, lengths: tuple[tuple[int, int], ...], **options: Any
) -> list[str]:
    """Texts by the model, from those starts that are short enough in its tokens."""
    shortest = min(length for length, _ in lengths)
    starts = [start for start in STARTS if len(tokenizer.encode(start).ids) <= shortest]
    return sampled_prefixes(files.net, files.params, tokenizer, key, lengths=lengths, starts=starts, **options)


def _rounded(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE


# second moments


def _statistics(
    options: EditOptions, files: LanguageFiles, tokenizer: FileTokenizer, text: Probe, places: dict[int, MlpPlace]
) -> tuple[Statistics, str]:
    """The second moments of the keys of all layers to edit, and what they come from."""
    if options.identity:
        return Statistics.of(files.net, files.params, None), "the identity"
    width = max(_width(files, place) for place in places.values())
    rows = chain.from_iterable(text.values() if text else [_own_text(options, files, tokenizer, width)])
    found = collect_covariances(files.net, files.params, rows, [*places])
    whose = f"of {', '.join(options.text)}" if text else "that the model wrote itself"
    count = next(iter(found.values())).count
    return Statistics.of(files.net, files.params, found), f"{count:,} tokens {whose}"


def _width(files: LanguageFiles, place: MlpPlace) -> int:
    return files.checkpoint[place.weight].shape[0 if place.orientation == "in_out" else 1]


def _own_text(
    options: EditOptions, files: LanguageFiles, tokenizer: FileTokenizer, width: int
) -> tuple[Sentences, ...]:
    """Text that the model writes, with several tokens for every dimension of the keys."""
    config = files.net.config
    length, top = min(_LONGEST, config.positions), min(_LIKELY, config.vocab_size)
    pieces = -(-_TIMES * width // (length * _ROWS))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), 1), pieces)
    written = (_sampled(files, tokenizer, key, ((length, _ROWS),), end="", top=top) for key in keys)
    texts = chain.from_iterable(written)
    return padded((tokenizer.encode(text).ids for text in texts), rows=_ROWS, longest=length)


def _moments(files: LanguageFiles, probe: Probe, places: dict[int, MlpPlace]) -> dict[str, InputMoment]:
    """What goes into the matrices to edit on the text of the guard, for the energy of an edit."""
    if not probe:
        return {}
    found = collect_covariances(files.net, files.params, chain.from_iterable(probe.values()), [*places])
    axes = {"in_out": (0,), "out_in": (1,)}
    return {place.weight: InputMoment(found[n].matrix, axes[place.orientation]) for n, place in places.items()}
