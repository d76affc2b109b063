"""The guard of the commands: text becomes tokens of a model in files, and perplexities decide on what is written."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.data.corpora import read_corpora
from permjax.experiments.architectures import Architecture, FilesError
from permjax.io.checkpoint import Checkpoint
from permjax.io.tokenizers import check_size, load_tokenizer
from permjax.merge.guard import GuardRefusedError
from permjax.merge.guard_step import GuardInfo, compare, perplexities, refusal
from permjax.merge.perplexity import Probe, Sentences, padded
from permjax.nets.registry import config_from_dict
from permjax.report import Outcome, Table

_BYTES = 256  # tokens of a model that needs no tokenizer
_LONGEST = 256  # tokens of a sentence
_ROWS, _LOGITS = 16, 1 << 26  # at most: sentences of a batch, and logits of a model at a time
_CONVENTION = "sentence_mean"
_POSITIONS = ("n_positions", "max_position_embeddings")


@dataclass(frozen=True)
class GuardOptions:
    """What a result is measured on before it is written.

    Attributes:
        guard: refuse a result of which this text shows that it has collapsed, with exit status 3: a file with a
            sentence in each line, or a JSON list of records with Corpus and Text; may be given several times.
        guard_limit: the largest perplexity of a file or corpus, as a multiple of that of the best model that was given.
        guard_sentences: of each file or corpus, at most.
        tokenizer: a `tokenizer.json`; the one beside the model by default.
    """

    guard: tuple[str, ...] = ()
    guard_limit: float = 1.5
    guard_sentences: int = 64
    tokenizer: str | None = None


class Refused(GuardRefusedError):
    """A guard refused the result of a command.

    Attributes:
        outcome: what it saw.
    """

    def __init__(self, message: str, outcome: Outcome):
        super().__init__(message)
        self.outcome = outcome


class Candidate(NamedTuple):
    """A model: what to call it, its function, and its parameters."""

    name: str
    apply: Callable[..., Any]
    params: Any


class Judged(NamedTuple):
    """What a guard saw in a result that it accepts; nothing where there is no guard.

    Attributes:
        sentence: on the worst corpus.
        metrics: its ratio and its name.
        tables: perplexities by corpus.
    """

    sentence: str
    metrics: dict[str, Any]
    tables: tuple[Table, ...]


UNGUARDED = Judged("", {}, ())


def probe_of(options: GuardOptions, architecture: Architecture, checkpoint: Checkpoint) -> Probe:
    """The sentences that a guard looks at, as tokens of the model; none where there is no guard.

    Raises:
        ValueError: options without a guard that reads them, a model of no language, or text or a tokenizer that do not
            fit; names the file.
    """
    check_unguarded(options)
    if not options.guard:
        return {}
    if not (options.guard_limit > 0 and options.guard_sentences > 0):
        message = f"--guard-limit and --guard-sentences must be above 0, not {options.guard_limit} and "
        raise FilesError(f"{message}{options.guard_sentences}.")
    return read_probe(options.guard, architecture, checkpoint, options.tokenizer, options.guard_sentences)


def check_unguarded(options: GuardOptions) -> None:
    """Refuse options of a guard where there is none.

    Raises:
        FilesError: names the option.
    """
    if options.guard:
        return
    for name in ("guard_limit", "guard_sentences", "tokenizer"):
        if getattr(options, name) != getattr(GuardOptions(), name):
            flag = name.replace("_", "-")
            raise FilesError(f"--{flag} is for the guard; add --guard TEXT, or leave it out.")


def read_probe(
    texts: Sequence[str],
    architecture: Architecture,
    checkpoint: Checkpoint,
    tokenizer: str | None,
    sentences: int | None,
    *,
    special: bool = False,
) -> Probe:
    """The sentences of text files as tokens of a model, by corpus.

    Args:
        texts: the files.
        architecture: of the model.
        checkpoint: of the model, with its tokenizer beside it.
        tokenizer: another one.
        sentences: of each corpus, at most; all for None.
        special: with what the tokenizer adds by itself, such as Llama's token for the beginning. Perplexity of ME-PPL
            is taken without: nothing foretells the first token of a sentence, and it is not scored.

    Raises:
        ValueError: see `probe_of`.
    """
    vocabulary = _vocabulary(architecture)
    encode = _encoder(tokenizer, checkpoint, vocabulary, special=special)
    return {
        corpus: in_batches(corpus, map(encode, some), _positions(architecture), vocabulary)
        for corpus, some in read_corpora(texts, most=sentences).items()
    }


def _vocabulary(architecture: Architecture) -> int:
    """How many tokens a model foretells."""
    out = jax.eval_shape(architecture.apply, architecture.like, *architecture.inputs)
    tokens = architecture.inputs[0]
    single = len(architecture.inputs) == 1 and jnp.issubdtype(tokens.dtype, jnp.integer) and tokens.ndim == 2
    if not (single and getattr(out, "shape", ())[:-1] == tokens.shape):
        message = f"{architecture.source} is no language model, which takes tokens and foretells the next one; "
        raise FilesError(message + "perplexity on text is only for such models.")
    return out.shape[-1]


def _positions(architecture: Architecture) -> int:
    """The longest sentence that is measured."""
    config = config_from_dict(architecture.config) if architecture.config else None
    known = [getattr(config, name) for name in _POSITIONS if hasattr(config, name)]
    return min(_LONGEST, *known, *(() if known else (architecture.inputs[0].shape[1],)))


def _encoder(
    given: str | None, checkpoint: Checkpoint, vocabulary: int, *, special: bool
) -> Callable[[str], Sequence[int]]:
    """From text to tokens, by the tokenizer that is given, or that beside the model, or as bytes."""
    beside = checkpoint.path.parent / "tokenizer.json"
    if given is None and not beside.is_file():
        if vocabulary == _BYTES:
            return lambda text: tuple(text.encode())
        message = f"There is no tokenizer.json beside {checkpoint.path}, whose model has {vocabulary} tokens; "
        raise FilesError(message + "put it there, or name one with --tokenizer FILE.")
    try:
        tokenizer = load_tokenizer(given or beside, special=special)
    except ImportError as error:
        raise FilesError(str(error)) from None
    check_size(tokenizer, vocabulary)
    return lambda text: tokenizer.encode(text).ids


def in_batches(corpus: str, sentences: Iterable[Sequence[int]], longest: int, vocabulary: int) -> tuple[Sentences, ...]:
    """Sentences side by side, so many that their logits fit into memory.

    Args:
        corpus: their name.
        sentences: their tokens.
        longest: what is longer is cut at this length.
        vocabulary: how many tokens the model foretells.

    Raises:
        FilesError: no sentence has two tokens; names the corpus.
    """
    rows = max(1, min(_ROWS, _LOGITS // (longest * vocabulary)))
    try:
        return padded(sentences, rows=rows, longest=longest)
    except ValueError as error:
        raise FilesError(f"Corpus {corpus!r}: {error}") from None


def as_stored(params: Any, checkpoint: Checkpoint) -> Any:
    """Parameters as they will be in a file like a checkpoint: rounded to its dtypes, but in float32 or wider."""

    def rounded(name: str, leaf: Any) -> jax.Array:
        with np.errstate(over="ignore"):
            return on_device(np.asarray(leaf).astype(checkpoint[name].dtype))

    return tree.map_named(rounded, params)


def on_device(leaf: Any) -> jax.Array:
    """A leaf as JAX computes with it: floats in float32 or wider."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.asarray(
        leaf, jax.dtypes.canonicalize_dtype(np.result_type(np.float32, leaf.dtype)) if floating else None
    )


def judge(options: GuardOptions, probe: Probe, given: Iterable[Candidate], result: Candidate) -> Judged:
    """Compare the perplexities of a result with those of the best of the models that it comes from.

    Args:
        options: the limit.
        probe: what to measure on.
        given: the models, of which one at a time is in memory if this is a generator.
        result: what would be written.

    Raises:
        Refused: its perplexity is above the limit for some corpus, or not finite.
    """
    found = {one.name: perplexities(one.apply, one.params, probe, _CONVENTION) for one in given}
    after = perplexities(result.apply, result.params, probe, _CONVENTION)
    info = compare([*found.values()], [after], options.guard_limit)
    table = _table(probe, {**found, result.name: after}, info)
    if not info.accepted.all():
        summary = "The guard refused the result, and nothing was written."
        raise Refused(refusal(info, options.guard_limit), Outcome(f"{result.name} refused", summary, {}, (table,)))
    worst = max(info.ratio, key=lambda name: info.ratio[name][0])
    ratio = float(info.ratio[worst][0])
    sentence = f" The guard lets it pass: the perplexity of {worst} is {ratio:.4g} times that of the best model given."
    return Judged(sentence, {"guard_ratio": ratio, "guard_corpus": worst}, (table,))


def with_guard(outcome: Outcome, judged: Judged) -> Outcome:
    """An outcome that tells of the guard as well, if there was one."""
    headline = (*outcome.headline, *(key for key in judged.metrics if key == "guard_ratio" and outcome.headline))
    return outcome._replace(
        summary=outcome.summary + judged.sentence,
        metrics={**outcome.metrics, **judged.metrics},
        tables=(*outcome.tables, *judged.tables),
        headline=headline,
    )


def _table(probe: Probe, found: Mapping[str, Mapping[str, float]], info: GuardInfo) -> Table:
    """Perplexities of all models by corpus, the worst first."""
    counts = {name: sum(int(batch.mask.any(-1).sum()) for batch in batches) for name, batches in probe.items()}
    rows = [
        (name, counts[name], *(one[name] for one in found.values()), float(info.ratio[name][0]))
        for name in sorted(probe, key=lambda name: -np.nan_to_num(info.ratio[name][0], nan=np.inf))
    ]
    caption = "Means over sentences of exp of the mean loss of a token; the ratio is to the best model that was given."
    return Table("Perplexity", ("corpus", "sentences", *found, "ratio"), tuple(rows), caption)
