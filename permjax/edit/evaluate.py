"""Whether an edit took: where the target is forced, where the model runs freely, in other words, and beside it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from permjax.edit.delta import Delta, apply_delta
from permjax.edit.prepare import PreparedEdit, Scored, scored
from permjax.edit.requests import EditRequest
from permjax.edit.values import target_nll
from permjax.io.tokenizers import Tokenizer
from permjax.nets.base import Net
from permjax.nets.generation import generate
from permjax.nets.language import Weights, widen

_ROWS = 32  # of a forward pass; fewer are filled up, so that one program serves any number


class Probe(NamedTuple):
    """What is asked of a model about one edit beside its own prompt.

    Attributes:
        paraphrases: other prompts, with the target.
        neighbours: prompts about other subjects, with the target too, which says where their answer begins.
    """

    paraphrases: Scored
    neighbours: Scored


class Scores(NamedTuple):
    """How each edit fares in a model, from 0 to 1; NaN where nothing was asked.

    Attributes:
        bare: the share of the target's tokens that are the likeliest after those before them, which are given (teacher
            forcing), after the bare prompt.
        prefixed: the same with a prefix before the prompt, in the mean over prefixes.
        free: 1 where the model itself writes the whole target after the bare prompt. It is never above `bare`, and
            below it where a target of several tokens is only right in part.
        paraphrase: as `bare`, in the mean over paraphrases.
        locality: the likeliest next token is what it was before the edit, as a share of the neighbours.
        nll: `-log P` of the target after the bare prompt, the mean over its tokens.
    """

    bare: Float[np.ndarray, " edits"]
    prefixed: Float[np.ndarray, " edits"]
    free: Float[np.ndarray, " edits"]
    paraphrase: Float[np.ndarray, " edits"]
    locality: Float[np.ndarray, " edits"]
    nll: Float[np.ndarray, " edits"]


class RowScores(NamedTuple):
    """What a model says to each of some rows.

    Attributes:
        right: the share of the target's tokens that are the likeliest at their positions.
        nll: the mean of `-log P` over the target.
        next: the likeliest token where the target begins.
    """

    right: Float[np.ndarray, " rows"]
    nll: Float[np.ndarray, " rows"]
    next: Int[np.ndarray, " rows"]


def prepare_probe(request: EditRequest, tokenizer: Tokenizer, *, pad_to: int) -> Probe:
    """The paraphrases and neighbours of a request as arrays.

    Raises:
        ValueError: see `scored`.
    """

    def rows(texts: Sequence[str]) -> Scored:
        if not texts:
            return Scored(*(np.zeros(shape, np.int32) for shape in ((0, pad_to), (0, pad_to), (0,))))
        return scored(texts, [request.target] * len(texts), tokenizer, pad_to=pad_to)

    return Probe(rows(request.paraphrases), rows(request.neighbours))


def evaluate(
    net: Net,
    params: Weights,
    edits: Sequence[PreparedEdit],
    *,
    probes: Sequence[Probe] | None = None,
    before: Weights | None = None,
) -> Scores:
    """How every edit fares in one model.

    Args:
        net: a GPT-2 or Llama network.
        params: the edited weights.
        edits: prepared edits of one shape.
        probes: one for each edit, for `paraphrase` and `locality`.
        before: the weights before the edit, for `locality`.

    Raises:
        ValueError: there are not as many probes as edits.

    Example:
        >>> evaluate(net, apply_delta(params, delta), [edit]).free
        array([1.])
    """
    if probes is not None and len(probes) != len(edits):
        raise ValueError(f"There are {len(edits)} edits but {len(probes)} probes; give one for each.")
    rows = len(edits[0].tokens)
    own = score_rows(net, params, _joined([Scored(e.tokens, e.targets, e.lengths) for e in edits]))
    right, nll = own.right.reshape(-1, rows), own.nll.reshape(-1, rows)
    nothing = np.full(len(edits), np.nan)
    paraphrase = locality = nothing
    if probes is not None:
        others = [probe.paraphrases for probe in probes]
        paraphrase = _means(score_rows(net, params, _joined(others)).right, others)
    if probes is not None and before is not None:
        others = [probe.neighbours for probe in probes]
        now, then = (score_rows(net, weights, _joined(others)).next for weights in (params, before))
        locality = _means(now == then, others)
    prefixed = right[:, 1:].mean(axis=1) if rows > 1 else nothing
    free = free_running(net, params, edits)
    return Scores(right[:, 0], prefixed, free, paraphrase, locality, nll[:, 0])


def evaluate_each(
    net: Net,
    params: Weights,
    deltas: Sequence[Delta],
    edits: Sequence[PreparedEdit],
    *,
    probes: Sequence[Probe] | None = None,
) -> Scores:
    """How every edit fares in the model that has this edit alone; see `evaluate`.

    Args:
        net: a GPT-2 or Llama network.
        params: the weights before any edit.
        deltas: one for each edit, as `edit_independent` returns them.
        edits: prepared edits of one shape.
        probes: one for each edit.
    """
    found = [
        evaluate(net, apply_delta(params, delta), [edit], probes=probes and [probes[i]], before=params)
        for i, (delta, edit) in enumerate(zip(deltas, edits, strict=True))
    ]
    return Scores(*map(np.concatenate, zip(*found, strict=True)))


def score_rows(net: Net, params: Weights, rows: Scored) -> RowScores:
    """What a model says to rows of tokens with targets."""
    count = len(rows.tokens)
    filled = _filled(rows.tokens), _filled(rows.targets)
    pieces = [_score(net.apply, params, *(part[i : i + _ROWS] for part in filled)) for i in range(0, count, _ROWS)]
    if not pieces:
        return RowScores(np.zeros(0), np.zeros(0), np.zeros(0, np.int32))
    return RowScores(*(np.concatenate(parts)[:count] for parts in zip(*pieces, strict=True)))


@partial(jax.jit, static_argnums=0)
def _score(apply: Callable, params: Weights, tokens: Array, targets: Array) -> tuple[Array, Array, Array]:
    logits = widen(apply(params, tokens))
    likeliest = jnp.argmax(logits, axis=-1)
    right = jnp.sum(likeliest == targets, axis=-1) / jnp.sum(targets >= 0, axis=-1)
    first = jnp.argmax(targets >= 0, axis=-1)
    here = jnp.take_along_axis(likeliest, first[:, None], axis=1)[:, 0]
    return right, target_nll(logits, targets), here


def free_running(net: Net, params: Weights, edits: Sequence[PreparedEdit]) -> Float[np.ndarray, " edits"]:
    """1 for each edit whose target the model writes by itself after the bare prompt, token by token; else 0."""
    tokens, targets = (np.stack(part) for part in zip(*((e.tokens[0], e.targets[0]) for e in edits), strict=True))
    counts = (targets >= 0).sum(axis=1)
    prompts = (targets >= 0).argmax(axis=1) + 1
    written = np.zeros(len(edits))
    for count in np.unique(counts):
        mine = np.flatnonzero(counts == count)
        wanted = targets[mine][targets[mine] >= 0].reshape(-1, count)
        said = _written(net, params, tokens[mine], prompts[mine].astype(np.int32), int(count))
        written[mine] = (said == wanted).all(axis=1)
    return written


def _written(net: Net, params: Weights, tokens: Any, lengths: Any, steps: int) -> Int[np.ndarray, "rows steps"]:
    pieces = [
        generate(net, params, *(part[i : i + _ROWS] for part in (_filled(tokens), _filled(lengths))), steps=steps)
        for i in range(0, len(tokens), _ROWS)
    ]
    return np.concatenate([np.asarray(piece) for piece in pieces])[: len(tokens)]


def _filled(rows: Any) -> Any:
    """Rows up to a multiple of those of a pass, the first one again."""
    return np.concatenate([rows, np.repeat(rows[:1], -len(rows) % _ROWS, axis=0)])


def _joined(parts: Sequence[Scored]) -> Scored:
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def _means(scores: np.ndarray, parts: Sequence[Scored]) -> Float[np.ndarray, " edits"]:
    """The mean score of the rows of each part; NaN for a part without rows."""
    ends = np.cumsum([len(part.tokens) for part in parts])
    return np.asarray([piece.mean() if piece.size else np.nan for piece in np.split(scores, ends[:-1])])
