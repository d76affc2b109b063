"""What an experiment on a checkpoint reads: the model, hard edits and their controls, and three texts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from permjax.edit.base import Editor, Statistics
from permjax.edit.hard_cases import mine_hard_cases
from permjax.edit.places import mlp_place
from permjax.edit.prepare import PreparedEdit
from permjax.edit.presets import PREFIXES
from permjax.edit.requests import EditRequest, Sifted, read_requests, sift_requests
from permjax.edit.templates import template_cases
from permjax.experiments.architectures import find_architecture
from permjax.experiments.edit_editors import editor_of, layers_of
from permjax.experiments.edit_hf_config import EditHfConfig
from permjax.experiments.edit_texts import (
    ASKED,
    check_disjoint,
    own_length,
    own_text,
    statistics_of_text,
    with_prefixes,
)
from permjax.experiments.guard_files import in_batches, read_probe
from permjax.experiments.language_files import LanguageFiles, open_language_model
from permjax.io.tokenizers import FileTokenizer
from permjax.merge.perplexity import Probe

_EDITS, _MOMENTS, _PROBE, _GUARD = range(4)  # what random keys are for


class Cases(NamedTuple):
    """Edits of one kind.

    Attributes:
        requests: the facts.
        written: editor -> the facts as arrays, with the prefixes that it asks for.
        asked: the same with other prefixes, to measure on.
    """

    requests: list[EditRequest]
    written: dict[str, list[PreparedEdit]]
    asked: list[PreparedEdit]

    def first(self, count: int) -> "Cases":
        """The first so many of them."""
        written = {name: edits[:count] for name, edits in self.written.items()}
        return Cases(self.requests[:count], written, self.asked[:count])


class Job(NamedTuple):
    """All that the experiment needs, checked.

    Attributes:
        files: the model.
        cases: `hard` and `control`, or `given`.
        editors: by name.
        statistics: of keys in the model.
        source: what they were collected from.
        probe: what perplexity is measured on.
        guard: what a guard looks at.
        skipped: a sentence on each record that was left out.
    """

    files: LanguageFiles
    cases: dict[str, Cases]
    editors: dict[str, Editor]
    statistics: Statistics
    source: str
    probe: Probe
    guard: Probe
    skipped: tuple[str, ...]


def opened(config: EditHfConfig) -> Job:
    """Read and check everything, cheap things first.

    Raises:
        ValueError: names the file, and the line or record where there is one.
        OSError: a file cannot be read.
    """
    read = _read(config)
    files = open_language_model(config.checkpoint)
    check_disjoint({"text": config.text, "probe": config.probe, "guard": config.guard})
    tokenizer = replace(files.tokenizer, special=True)
    editors = {name: _editor(config, name, files.net.config) for name in config.editors}
    keys = jax.random.split(jax.random.key(config.seed), 4)
    cases = _prepared(config, files, tokenizer, _cases(config, tokenizer, read.requests), keys[_EDITS])
    probe = _probe(files, config.probe, config.sentences, keys[_PROBE])
    guard = _probe(files, config.guard, config.guard_sentences, keys[_GUARD]) if config.sequence else {}
    return Job(files, cases, editors, *_statistics(config, files, editors, keys[_MOMENTS]), probe, guard, read.refused)


def _read(config: EditHfConfig) -> Sifted:
    if config.edits is None:
        return Sifted([], ())
    return sift_requests(config.edits) if config.skip_bad else Sifted(read_requests(config.edits), ())


def _editor(config: EditHfConfig, name: str, model: Any) -> Any:
    """An editor whose searches are no longer than they may be."""
    editor = editor_of(name, model, layer=config.layer, ridge=config.ridge)
    search = getattr(editor, "value", editor)
    if config.steps is None or search.steps <= config.steps:
        return editor
    shorter = replace(search, steps=config.steps)
    return shorter if search is editor else replace(editor, value=shorter)


# edits


def _cases(
    config: EditHfConfig, tokenizer: FileTokenizer, requests: Sequence[EditRequest]
) -> dict[str, list[EditRequest]]:
    if config.edits is not None and not config.mine:
        return {"given": [*requests[: config.most]]}
    templates = config.edits is None
    found = (
        template_cases(tokenizer, config.most, seed=config.seed) if templates else mine_hard_cases(requests, tokenizer)
    )
    return {"hard": found.hard[: config.most], "control": found.controls[: config.most]}


def _prepared(
    config: EditHfConfig,
    files: LanguageFiles,
    tokenizer: FileTokenizer,
    cases: dict[str, list[EditRequest]],
    key: jax.Array,
) -> dict[str, Cases]:
    """The arrays of all edits, all of one shape for each number of prefixes."""
    every = [request for some in cases.values() for request in some]
    kinds = [*dict.fromkeys(_limited(config, PREFIXES[name]) for name in config.editors)]
    keys = jax.random.split(key, len(kinds) + 1)
    own = {kind: with_prefixes(files, tokenizer, every, kind, one) for kind, one in zip(kinds, keys[1:], strict=True)}
    fresh = with_prefixes(files, tokenizer, every, _limited(config, ASKED), keys[0])
    found, start = {}, 0
    for name, some in cases.items():
        mine = slice(start, start + len(some))
        written = {editor: own[_limited(config, PREFIXES[editor])][mine] for editor in config.editors}
        found[name] = Cases(some, written, fresh[mine])
        start += len(some)
    return found


def _limited(config: EditHfConfig, kind: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    most = config.prefixes
    return kind if most is None else tuple((length, min(count, most)) for length, count in kind)


# texts


def _probe(files: LanguageFiles, paths: tuple[str, ...], sentences: int, key: jax.Array) -> Probe:
    """Sentences of files by corpus, or some that the model writes."""
    if paths:
        architecture = find_architecture((files.checkpoint,), None, None)
        return read_probe(paths, architecture, files.checkpoint, None, sentences)
    texts = own_text(files, files.tokenizer, key, sentences)[:sentences]
    tokens = (files.tokenizer.encode(text).ids for text in texts)
    return {"its own": in_batches("its own", tokens, own_length(files), files.net.config.vocab_size)}


def _statistics(
    config: EditHfConfig, files: LanguageFiles, editors: dict[str, Editor], key: jax.Array
) -> tuple[Statistics, str]:
    if config.identity:
        return Statistics.of(files.net, files.params, None), "the identity"
    tokenizer = replace(files.tokenizer, special=True)
    places = {layer: mlp_place(files.net.config, layer) for layer in layers_of(editors)}
    text = {}
    if config.text:
        architecture = find_architecture((files.checkpoint,), None, None)
        text = read_probe(config.text, architecture, files.checkpoint, None, None, special=True)
    return statistics_of_text(files, tokenizer, places, text, config.text, key)
