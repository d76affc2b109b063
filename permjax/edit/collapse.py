"""Collapse measured: many candidate edits beside one model, states of a sequence, and a knob that makes edits fail."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from permjax.edit.base import Editor, EditResult, Statistics
from permjax.edit.delta import Delta, side_path
from permjax.edit.evaluate import score_rows
from permjax.edit.prepare import PreparedEdit, Scored
from permjax.edit.values import Value, check_edits, stacked
from permjax.merge.perplexity import (
    Convention,
    Losses,
    Probe,
    candidate_losses,
    compared,
    group_losses,
    joined,
    perplexity_of,
)
from permjax.nets.base import Net
from permjax.nets.gpt import GPT2Config
from permjax.nets.language import Hook, Weights, unchanged

SHIFT = "first_token_shift"
"""The leaf with what is added at the first token, where the model has no table of positions."""


class Efficacy(NamedTuple):
    """Whether edits took, each in the model that has it alone; see `permjax.edit.evaluate.Scores`.

    Attributes:
        bare: the share of the target's tokens that are right after the bare prompt, those before them given.
        prefixed: the same with a prefix before the prompt, in the mean over prefixes.
        free: 1 where the model writes the whole target by itself. For greedy decoding this is where all its tokens are
            right when those before them are given, and it is computed so.
    """

    bare: Float[np.ndarray, " edits"]
    prefixed: Float[np.ndarray, " edits"]
    free: Float[np.ndarray, " edits"]


# candidates


def candidate_edits(
    editor: Editor,
    net: Net,
    params: Weights,
    edits: Sequence[PreparedEdit],
    statistics: Statistics,
    values: Value | None,
) -> list[EditResult]:
    """What an editor makes of each edit by itself, from values that were found before.

    `edit_independent` finds the values, too; here several editors may share them.

    Args:
        editor: such as `Rome(layer=1)`.
        net: a GPT-2 or Llama network.
        params: its weights, which no edit changes.
        edits: prepared edits of one shape.
        statistics: of these parameters.
        values: what `editor.solve` gives on these parameters.
    """
    return [
        editor(net, params, [edit], covariances=statistics, values=None if values is None else values.one(i))
        for i, edit in enumerate(edits)
    ]


def stacked_deltas(deltas: Sequence[Delta]) -> Any:
    """Deltas of the same leaves as one, with the candidates on the first axis of every array."""
    return jax.tree.map(lambda *parts: np.stack(parts), *deltas)


def side_losses(
    net: Net, params: Weights, deltas: Sequence[Delta], probe: Probe, *, chunk: int = 8
) -> dict[str, Losses]:
    """The losses of every sentence in each of many edited models, of which no copies are made.

    Args:
        net: a GPT-2 or Llama network.
        params: its weights before any edit.
        deltas: one for each candidate.
        probe: group -> batches of sentences.
        chunk: how many candidates are computed side by side.

    Returns:
        Group -> losses `[candidates, sentences]`.
    """
    every, apply = stacked_deltas(deltas), _beside(net)
    return {
        name: joined([candidate_losses(apply, params, every, batch, chunk=chunk) for batch in batches])
        for name, batches in probe.items()
    }


def side_kl(
    net: Net, params: Weights, deltas: Sequence[Delta], probe: Probe, *, chunk: int = 8
) -> dict[str, np.ndarray]:
    """KL(before || after) per predicted token of each group, for each of many edited models; see `side_losses`."""
    every, apply = stacked_deltas(deltas), _beside(net)
    found = {}
    for name, batches in probe.items():
        parts = [_divergences(apply, chunk, params, every, batch) for batch in batches]
        total, count = (np.sum([np.asarray(part[i]) for part in parts], axis=0) for i in (0, 1))
        found[name] = total / count
    return found


def side_efficacy(
    net: Net, params: Weights, deltas: Sequence[Delta], edits: Sequence[PreparedEdit], *, chunk: int = 8
) -> Efficacy:
    """Whether each edit took in the model that has it alone, on side paths.

    Args:
        net: a GPT-2 or Llama network.
        params: its weights before any edit.
        deltas: one for each edit.
        edits: prepared edits of one shape.
        chunk: how many candidates are computed side by side.
    """
    check_edits(edits)
    asked = stacked(edits)
    right = _rights(_beside(net), chunk, params, stacked_deltas(deltas), asked.tokens, asked.targets)
    share = _shares(np.asarray(right), asked.targets)
    return Efficacy(share[:, 0], share[:, 1:].mean(axis=1), np.asarray(share[:, 0] == 1, np.float64))


def side_scores(
    net: Net, params: Weights, deltas: Sequence[Delta], tasks: Mapping[str, Scored], *, chunk: int = 8
) -> dict[str, np.ndarray]:
    """Exact match on every task in each of many edited models.

    Args:
        net: a GPT-2 or Llama network.
        params: its weights before any edit.
        deltas: one for each candidate.
        tasks: name -> questions with answers.
        chunk: how many candidates are computed side by side.

    Returns:
        Task -> scores from 0 to 1 `[candidates]`.
    """
    every, apply = stacked_deltas(deltas), _beside(net)
    return {
        name: (_shares(np.asarray(_task_rights(apply, chunk, params, every, *task[:2])), task.targets) == 1).mean(
            axis=1
        )
        for name, task in tasks.items()
    }


@lru_cache(maxsize=16)
def _beside(net: Net) -> Callable[..., Array]:
    """`apply(params, delta, tokens)`; the same function for the same network, as it is compiled once."""
    return lambda params, delta, tokens: net.apply(params, tokens, hook=side_path(net, delta))


@partial(jax.jit, static_argnums=(0, 1))
def _divergences(apply: Callable, chunk: int, params: Weights, candidates: Any, batch: Any) -> tuple[Array, Array]:
    """The sum of the divergences of all tokens for each candidate, and how many tokens there are."""
    nothing = jax.tree.map(lambda x: jnp.zeros_like(x[0]), candidates)

    def one(candidate: Any) -> tuple[Array, Array]:
        found = compared(lambda delta, tokens: apply(params, delta, tokens), nothing, candidate, batch)
        return found.kl.sum(-1), found.before.predicted.sum(-1)

    return jax.lax.map(one, candidates, batch_size=chunk)


@partial(jax.jit, static_argnums=(0, 1))
def _rights(
    apply: Callable, chunk: int, params: Weights, candidates: Any, tokens: Array, targets: Array
) -> Bool[Array, "candidates rows t"]:
    """Where the likeliest token is the target, each candidate with rows of its own."""

    def one(asked: tuple[Any, Array, Array]) -> Array:
        candidate, tokens, targets = asked
        return jnp.argmax(apply(params, candidate, tokens), axis=-1) == targets

    return jax.lax.map(one, (candidates, tokens, targets), batch_size=chunk)


@partial(jax.jit, static_argnums=(0, 1))
def _task_rights(
    apply: Callable, chunk: int, params: Weights, candidates: Any, tokens: Array, targets: Array
) -> Bool[Array, "candidates rows t"]:
    """The same with one set of rows for all."""

    def one(candidate: Any) -> Array:
        return jnp.argmax(apply(params, candidate, tokens), axis=-1) == targets

    return jax.lax.map(one, candidates, batch_size=chunk)


def _shares(right: Bool[np.ndarray, "*n t"], targets: Int[np.ndarray, "*m t"]) -> Float[np.ndarray, "*n"]:
    """The share of the targets of each row that are right."""
    return np.sum(right & (targets >= 0), axis=-1) / np.sum(targets >= 0, axis=-1)


# one model


class State(NamedTuple):
    """What a model can do.

    Attributes:
        perplexity: by group of sentences.
        tasks: exact match by task, from 0 to 1.
    """

    perplexity: dict[str, float]
    tasks: dict[str, float]

    def retained(self, base: "State") -> float:
        """The mean over tasks of the score as a share of that of the base."""
        return float(retained(self.tasks, base.tasks))


def retained(scores: Mapping[str, Any], base: Mapping[str, float]) -> Any:
    """The mean over tasks of scores as shares of those of the base; tasks at which the base fails do not count.

    Args:
        scores: task -> score, or scores of many models `[candidates]`.
        base: task -> score of the model before.

    Raises:
        ValueError: the base fails at all of them.
    """
    known = [name for name, score in base.items() if score > 0]
    if not known:
        raise ValueError("The base has no right answer in any task, so that nothing can be retained; train it longer.")
    return np.mean([np.asarray(scores[name]) / base[name] for name in known], axis=0)


def state_of(
    net: Net, params: Weights, probe: Probe, tasks: Mapping[str, Scored], *, convention: Convention = "token"
) -> State:
    """What a model can do.

    Args:
        net: a GPT-2 or Llama network.
        params: its weights.
        probe: group -> batches of sentences.
        tasks: name -> questions with answers.
        convention: of perplexity; see `perplexity_of`.
    """
    losses = group_losses(net.apply, params, probe)
    return State(
        {name: float(perplexity_of(one, convention)) for name, one in losses.items()},
        {name: float(np.mean(score_rows(net, params, task).right == 1)) for name, task in tasks.items()},
    )


# the knob


def unit_direction(width: int, seed: int) -> Float[np.ndarray, " width"]:
    """A random vector of length one."""
    drawn = np.random.default_rng(seed).standard_normal(width)
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


def shift_first_token(
    net: Net, params: Weights, direction: Float[np.ndarray, " width"], strength: float
) -> tuple[Net, dict[str, Any]]:
    """A model whose first token is set apart: `strength` times a vector is added at position 0.

    It imposes what makes ROME fail in large models, where it is learned: the key of a subject at the very start is far
    from that of the same subject behind other words. In the GPT-2 layout it is added to the embedding of position 0;
    Llama has none, so there it is added to the residual stream before the first block, by a network whose parameters
    have one leaf more. Apply it to a trained model, or to the one that this function gave, which adds up.

    Args:
        net: a GPT-2 or Llama network.
        params: its weights.
        direction: of the vector, `[width]`.
        strength: the factor.

    Returns:
        The network, and its parameters; the same network for every direction and strength.
    """
    vector = jnp.asarray(strength * direction, jnp.float32)
    if isinstance(net.config, GPT2Config):
        name = f"{net.config.prefix}wpe.weight"
        return net, {**params, name: jnp.asarray(params[name]).at[0].add(vector)}
    shifted = net if SHIFT in params else _shifted(net)
    return shifted, {**params, SHIFT: params.get(SHIFT, 0.0) + vector}


@lru_cache(maxsize=16)
def _shifted(net: Net) -> Net:
    def apply(params: Weights, tokens: Array, *, hook: Hook = unchanged, **context: Any) -> Array:
        positions = context.get("positions")
        places = jnp.arange(tokens.shape[1])[None] if positions is None else positions

        def shift(name: str, x: Array) -> Array:
            if name == "embed":
                x = x + jnp.where(places == 0, 1, 0)[..., None] * params[SHIFT][None, None, :]
            return hook(name, x)

        return net.apply(params, tokens, hook=shift, **context)

    return net._replace(apply=apply)
