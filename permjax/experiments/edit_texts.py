"""Texts around the edits of a model in files: what it writes itself, prefixes of prompts, and second moments."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, combinations
from typing import Any

import jax

from permjax.data.corpora import read_corpora
from permjax.edit.base import Statistics
from permjax.edit.covariance import collect_covariances
from permjax.edit.places import MlpPlace
from permjax.edit.prefixes import STARTS, sampled_prefixes
from permjax.edit.prepare import PreparedEdit, prepare_all
from permjax.edit.requests import EditRequest
from permjax.experiments.architectures import FilesError
from permjax.experiments.language_files import LanguageFiles
from permjax.io.tokenizers import FileTokenizer
from permjax.merge.perplexity import Probe, Sentences, padded

ASKED = ((10, 5),)
"""Prefixes before the prompts that are asked: tokens, and how many."""

_LIKELY, _LONGEST, _ROWS, _TIMES = 40, 64, 16, 4  # of text that the model writes; so many tokens for each key's width


def check_disjoint(texts: Mapping[str, Sequence[str]]) -> None:
    """Refuse texts of different uses that have a sentence in common.

    Args:
        texts: name of the option -> files.

    Raises:
        ValueError: names two options, and one of the sentences.
        OSError: a file cannot be read.
    """
    found = {
        name: {line for lines in read_corpora(paths).values() for line in lines} if paths else set()
        for name, paths in texts.items()
    }
    for one, other in combinations(found, 2):
        if shared := sorted(found[one] & found[other]):
            message = f"{one} and {other} share {len(shared)} sentences, such as {shared[0][:60]!r}; what judges an "
            raise FilesError(message + "edit must not have made it: give other text to one of them.")


def with_prefixes(
    files: LanguageFiles,
    tokenizer: FileTokenizer,
    requests: Sequence[EditRequest],
    kind: tuple[tuple[int, int], ...],
    key: jax.Array,
) -> list[PreparedEdit]:
    """Requests as arrays of one shape, with prefixes that the model writes.

    Args:
        files: the model.
        tokenizer: its tokenizer, with what it adds by itself.
        requests: the facts.
        kind: pairs of a number of tokens and how many prefixes have so many; none without any.
        key: a random key.

    Raises:
        ValueError: a prompt cannot be edited, or is longer than the model has positions.
    """
    prefixes = written_texts(files, tokenizer, key, kind) if kind else []
    edits = prepare_all(requests, tokenizer, prefixes=prefixes)
    longest = files.net.config.positions
    if edits[0].tokens.shape[1] <= longest:
        return edits
    return prepare_all(requests, tokenizer, prefixes=prefixes, pad_to=longest)


def written_texts(
    files: LanguageFiles, tokenizer: FileTokenizer, key: jax.Array, lengths: tuple[tuple[int, int], ...], **options: Any
) -> list[str]:
    """Texts by the model, from those starts that are short enough in its tokens; see `sampled_prefixes`."""
    shortest = min(length for length, _ in lengths)
    starts = [start for start in STARTS if len(tokenizer.encode(start).ids) <= shortest]
    return sampled_prefixes(files.net, files.params, tokenizer, key, lengths=lengths, starts=starts, **options)


def own_length(files: LanguageFiles) -> int:
    """How many tokens a text has that the model writes, at most."""
    return min(_LONGEST, files.net.config.positions)


def own_text(files: LanguageFiles, tokenizer: FileTokenizer, key: jax.Array, count: int) -> list[str]:
    """So many texts, or a few more, that the model writes from its likelier tokens."""
    length, top = own_length(files), min(_LIKELY, files.net.config.vocab_size)
    keys = jax.random.split(key, -(-count // _ROWS))
    written = (written_texts(files, tokenizer, one, ((length, _ROWS),), end="", top=top) for one in keys)
    return [*chain.from_iterable(written)]


def own_batches(
    files: LanguageFiles, tokenizer: FileTokenizer, places: Iterable[MlpPlace], key: jax.Array
) -> tuple[Sentences, ...]:
    """Text that the model writes, with several tokens for every dimension of the keys."""
    width, length = max(_width(files, place) for place in places), own_length(files)
    texts = own_text(files, tokenizer, key, -(-_TIMES * width // length))
    return padded((tokenizer.encode(text).ids for text in texts), rows=_ROWS, longest=length)


def _width(files: LanguageFiles, place: MlpPlace) -> int:
    return files.checkpoint[place.weight].shape[0 if place.orientation == "in_out" else 1]


def statistics_of_text(
    files: LanguageFiles,
    tokenizer: FileTokenizer,
    places: dict[int, MlpPlace],
    text: Probe,
    sources: Sequence[str],
    key: jax.Array,
) -> tuple[Statistics, str]:
    """The second moments of the keys of some layers, and what they come from in words.

    Args:
        files: the model.
        tokenizer: its tokenizer, with what it adds by itself.
        places: by layer.
        text: what to collect from; the model writes some itself where there is none.
        sources: the files of the text.
        key: for text that the model writes.
    """
    batches = text.values() if text else [own_batches(files, tokenizer, places.values(), key)]
    found = collect_covariances(files.net, files.params, chain.from_iterable(batches), [*places])
    whose = f"of {', '.join(sources)}" if text else "that the model wrote itself"
    count = next(iter(found.values())).count
    return Statistics.of(files.net, files.params, found), f"{count:,} tokens {whose}"
