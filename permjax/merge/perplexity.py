"""Perplexity of language models: the three conventions in use, for groups of sentences padded to a few shapes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Convention: TypeAlias = Literal["sentence_mean", "token", "input_token"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

_SHORTEST = 8  # the length of the shortest sentences after padding


class Sentences(NamedTuple):
    """Sentences side by side, padded on the right.

    Attributes:
        tokens: numbers of tokens, any at all where there is padding.
        mask: where there is none; a row may be empty.
    """

    tokens: Int[Array | np.ndarray, "sentences t"]
    mask: Bool[Array | np.ndarray, "sentences t"]


Probe: TypeAlias = Mapping[str, Sequence[Sentences]]
"""Group of sentences -> its batches, as `padded` makes them."""


class Losses(NamedTuple):
    """What a model makes of sentences: all that any convention needs.

    Attributes:
        total: sum of -log p over the tokens of a sentence but its first one, which nothing foretells.
        predicted: how many they are.
        inputs: the tokens of a sentence.
    """

    total: Float[Array, "*models sentences"]
    predicted: Float[Array, "*models sentences"]
    inputs: Float[Array, "*models sentences"]


class Compared(NamedTuple):
    """What two models make of sentences.

    Attributes:
        before: losses of the first model.
        after: losses of the second one.
        kl: sum of KL(before || after) over the same tokens.
    """

    before: Losses
    after: Losses
    kl: Float[Array, "*models sentences"]


def padded(sentences: Iterable[Sequence[int]], *, rows: int = 16, longest: int = 1024) -> tuple[Sentences, ...]:
    """Batches of as few shapes as possible: all have `rows` rows, and their lengths are powers of two.

    Args:
        sentences: tokens; sentences of fewer than two, in which nothing is foretold, are left out.
        rows: sentences of a batch; the last ones may be empty.
        longest: what is longer is cut at this length.

    Raises:
        ValueError: no sentence is left, or a number is below what makes sense.

    Example:
        >>> probe = {"text": padded([[5, 2, 7], [1, 2]], rows=4)}
    """
    if rows < 1 or longest < 2:
        raise ValueError(f"rows must be at least 1 and longest at least 2, not {rows} and {longest}.")
    cut = sorted((ids[:longest] for ids in sentences if len(ids) > 1), key=len)
    if not cut:
        raise ValueError("There is no sentence of two tokens or more to foretell; give a text with some.")
    widths = groupby(cut, key=lambda ids: min(max(_SHORTEST, 1 << (len(ids) - 1).bit_length()), longest))
    return tuple(batch for width, alike in widths for batch in _batches(list(alike), rows, width))


def _batches(sentences: Sequence[Sequence[int]], rows: int, width: int) -> Iterator[Sentences]:
    for start in range(0, len(sentences), rows):
        yield _batch(sentences[start : start + rows], rows, width)


def _batch(sentences: Sequence[Sequence[int]], rows: int, width: int) -> Sentences:
    tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for row, ids in enumerate(sentences):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return Sentences(tokens, mask)


def sentence_losses(apply: Callable[..., Array], params: Any, sentences: Sentences) -> Losses:
    """The loss of every sentence; traceable. What stands in the padding has no effect, whatever it is.

    Args:
        apply: `apply(params, tokens) -> logits [sentences, t, vocabulary]` of a causal model.
        params: of the model.
        sentences: tokens and mask `[sentences, t]`.
    """
    return _losses(_log_probabilities(apply, params, sentences), sentences)


def compared(apply: Callable[..., Array], before: Any, after: Any, sentences: Sentences) -> Compared:
    """The losses of two models, and how far the second one's predictions are from the first one's; traceable."""
    old, new = (_log_probabilities(apply, params, sentences) for params in (before, after))
    share = jnp.exp(old)
    each = jnp.where(share > 0, share * (old - new), jnp.zeros_like(old)).sum(-1)
    kl = jnp.where(sentences.mask[:, 1:], each, jnp.zeros_like(each)).sum(-1)
    return Compared(_losses(old, sentences), _losses(new, sentences), kl)


def _log_probabilities(
    apply: Callable[..., Array], params: Any, sentences: Sentences
) -> Float[Array, "sentences predicted vocabulary"]:
    logits = apply(params, jnp.asarray(sentences.tokens))[:, :-1]
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)


def _losses(log_p: Float[Array, "sentences predicted vocabulary"], sentences: Sentences) -> Losses:
    tokens, mask = (jnp.asarray(part) for part in sentences)
    chosen = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    total = -jnp.where(mask[:, 1:], chosen, jnp.zeros_like(chosen)).sum(-1)
    return Losses(total, mask[:, 1:].sum(-1).astype(total.dtype), mask.sum(-1).astype(total.dtype))


def perplexity_of(losses: Losses, convention: str = "sentence_mean") -> Float[Array, "*models"]:
    """The perplexity that losses amount to, by one of the conventions in use.

    Args:
        losses: of sentences along the last axis; those of which nothing was foretold do not count.
        convention: `"sentence_mean"`: the mean over sentences of exp(mean loss of a token), as for ME-PPL, in which a
            few exploding sentences dominate; `"token"`: exp(total loss / number of foretold tokens), the usual one;
            `"input_token"`: the same over the number of all tokens, first ones included, as older scripts have it.

    Raises:
        ValueError: another convention.

    Source:
        Yang et al., "The Butterfly Effect of Model Editing", Findings of ACL 2024, and its published script.
    """
    total, predicted, inputs = losses
    if convention == "sentence_mean":
        counts = predicted > 0
        each = jnp.where(counts, jnp.exp(total / jnp.where(counts, predicted, jnp.ones_like(predicted))), 0.0)
        return each.sum(-1) / counts.sum(-1).astype(total.dtype)
    if convention in ("token", "input_token"):
        return jnp.exp(total.sum(-1) / (predicted if convention == "token" else inputs).sum(-1))
    raise ValueError(f"There is no convention {convention!r} of perplexity; known are {', '.join(CONVENTIONS)}.")


@partial(jax.jit, static_argnames=("apply", "convention"))
def perplexity(
    apply: Callable[..., Array],
    params: Any,
    tokens: Int[Array | np.ndarray, "sentences t"],
    mask: Bool[Array | np.ndarray, "sentences t"],
    convention: Convention = "sentence_mean",
) -> Float[Array, ""]:
    """The perplexity of one batch of sentences; see `perplexity_of`.

    Args:
        apply: `apply(params, tokens) -> logits [sentences, t, vocabulary]`; every new function is compiled anew.
        params: of the model.
        tokens: padded on the right.
        mask: where there is no padding.
        convention: see `perplexity_of`.

    Example:
        >>> perplexity(net.apply, params, tokens, mask, "token")
    """
    return perplexity_of(sentence_losses(apply, params, Sentences(tokens, mask)), convention)


_jitted_losses = partial(jax.jit, static_argnames="apply")(sentence_losses)
_jitted_compared = partial(jax.jit, static_argnames="apply")(compared)


def group_losses(apply: Callable[..., Array], params: Any, probe: Probe) -> dict[str, Losses]:
    """The losses of all sentences of every group; one compiled program for each shape of a batch."""
    return {name: joined([_jitted_losses(apply, params, batch) for batch in some]) for name, some in probe.items()}


def group_compared(apply: Callable[..., Array], before: Any, after: Any, probe: Probe) -> dict[str, Compared]:
    """What two models make of all sentences of every group."""
    return {
        name: joined([_jitted_compared(apply, before, after, batch) for batch in some]) for name, some in probe.items()
    }


def joined(parts: Sequence[Any]) -> Any:
    """Losses, or what was compared, of several batches as one."""
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=-1), *parts)


@partial(jax.jit, static_argnames=("apply", "chunk"))
def candidate_losses(
    apply: Callable[..., Array], params: Any, candidates: Any, sentences: Sentences, *, chunk: int = 8
) -> Losses:
    """The losses of many models that differ from one in little, such as by an edit of low rank on a side path.

    Args:
        apply: `apply(params, candidate, tokens) -> logits`, such as
            `lambda params, delta, tokens: net.apply(params, tokens, hook=side_path(net, delta))`; keep the function,
            because every new one is compiled anew.
        params: of the one model, of which no copies are made.
        candidates: a pytree whose leaves have the candidates on their first axis.
        sentences: tokens and mask `[sentences, t]`.
        chunk: how many candidates are computed side by side.
    """

    def one(candidate: Any) -> Losses:
        return sentence_losses(lambda params, tokens: apply(params, candidate, tokens), params, sentences)

    return jax.lax.map(one, candidates, batch_size=chunk)
