"""A guard against collapse: what a change does to a model, from the cheapest sign to the dearest, and whether it may.

Level 0: are the weights finite? 1: how much of what layers compute is disturbed, from moments of their inputs alone.
2: perplexity and KL divergence on a few sentences of every group. 3: tasks.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from permjax import tree
from permjax.merge.energy import InputMoment, energies
from permjax.merge.guard_limits import Limits, Signal, TooMuch
from permjax.merge.perplexity import Compared, Convention, Probe, group_compared, perplexity_of

Task = Callable[[Any], Any]
"""`task(params) -> score`, which is larger for a better model."""


class GuardRefusedError(RuntimeError):
    """A guard refused a result; the message says what got how much worse."""


class GroupChange(NamedTuple):
    """What a change does to the sentences of one group.

    Attributes:
        before: perplexity.
        after: perplexity.
        kl: mean KL(before || after) of the predictions of a token.
    """

    before: Float[Array, "*models"]
    after: Float[Array, "*models"]
    kl: Float[Array, "*models"]


class TaskChange(NamedTuple):
    """The scores of a task before and after a change."""

    before: Float[Array, "*models"]
    after: Float[Array, "*models"]


class GuardReport(NamedTuple):
    """What a change does, level by level; nothing stands in the levels that were not looked at.

    Attributes:
        finite: whether all weights are finite after it.
        energy: leaf -> energy of its change; see `energies`.
        groups: group of sentences -> what happens to it.
        tasks: task -> its scores.
    """

    finite: Bool[Array, "*models"]
    energy: dict[str, Float[Array, "*models"]]
    groups: dict[str, GroupChange]
    tasks: dict[str, TaskChange]

    def signals(self) -> dict[Signal, Float[Array, "*models"]]:
        """All that is measured as numbers of which more is worse, by kind and name.

        They are the energy of every leaf, the perplexity of every group as a multiple of that before, its KL
        divergence, and the share of its score that every task lost.
        """
        found: dict[Signal, Any] = {("energy", name): value for name, value in self.energy.items()}
        found |= {("perplexity", name): jnp.divide(group.after, group.before) for name, group in self.groups.items()}
        found |= {("kl", name): group.kl for name, group in self.groups.items()}
        found |= {("task", name): _lost(*task) for name, task in self.tasks.items()}
        return {signal: jnp.asarray(value) for signal, value in found.items()}


def _lost(before: Any, after: Any) -> Float[Array, "*models"]:
    has = before > 0
    share = jnp.subtract(before, after) / jnp.where(has, before, jnp.ones_like(before))
    return jnp.where(has, share, jnp.multiply(after, 0.0))  # a score that is not finite stays so


def check_change(
    apply: Callable[..., Array],
    before: Any,
    after: Any,
    probe: Probe | None = None,
    *,
    moments: Mapping[str, InputMoment] | None = None,
    tasks: Mapping[str, Task] | None = None,
    convention: Convention = "sentence_mean",
    limits: Limits | None = None,
) -> GuardReport:
    """Tell what a change does to a model; the same for edits, merges, adapters and pruning.

    Without `limits` it is traceable, so that `jax.vmap` reports on many candidates for `after`.

    Args:
        apply: `apply(params, tokens) -> logits`; only called where there is a probe.
        before: the parameters before.
        after: the parameters after; NaN and Inf in them are reported.
        probe: group -> batches of sentences; see `padded`. Take other text than that of the moments and the edits.
        moments: leaf -> second moments of its inputs in the model before; see `input_moments` and `energies`.
        tasks: name -> `task(params) -> score`.
        convention: of perplexity.
        limits: look no further than to the first level that these refuse; only for concrete parameters.

    Raises:
        ValueError: the models differ in structure, or moments do not fit them.

    Example:
        >>> report = check_change(net.apply, params, edited, {"text": padded(sentences)})
        >>> bool(accepted(report, Limits(perplexity=1.05)))
    """
    tree.check_same_structure([before, after])
    report = GuardReport(_all_finite(after), {}, {}, {})
    levels: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"energy": energies(before, after, moments or {})},
        lambda: {"groups": _groups(group_compared(apply, before, after, probe or {}), convention)},
        lambda: {"tasks": {name: TaskChange(*_scores(task, before, after)) for name, task in (tasks or {}).items()}},
    )
    for level in levels:
        if limits is not None and not bool(accepted(report, limits)):
            break
        report = report._replace(**level())
    return report


@jax.jit
def _all_finite(params: Any) -> Bool[Array, ""]:
    floating = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(leaf)) for leaf in floating]))


def _groups(found: Mapping[str, Compared], convention: Convention) -> dict[str, GroupChange]:
    def change(one: Compared) -> GroupChange:
        old, new = (perplexity_of(losses, convention) for losses in (one.before, one.after))
        return GroupChange(old, new, one.kl.sum(-1) / one.before.predicted.sum(-1))

    return {name: change(one) for name, one in found.items()}


def _scores(task: Task, *models: Any) -> tuple[Array, ...]:
    return tuple(jnp.asarray(task(params), jnp.float32) for params in models)


def accepted(report: GuardReport, limits: Limits) -> Bool[Array, "*models"]:
    """Whether a change is within the limits; traceable. What is not finite is refused, whatever the limits.

    Args:
        report: of one change, or of many (from `jax.vmap`).
        limits: see `Limits`.

    Raises:
        ValueError: the limits name other groups or tasks than the report.
    """
    passed = report.finite
    for signal, value in report.signals().items():
        passed = passed & _passes(value, limits.of(signal))
    return passed


def _passes(value: Float[Array, "*models"], limit: float) -> Bool[Array, "*models"]:
    """Whether a number is one, and not above its limit: NaN and Inf never pass."""
    return jnp.isfinite(value) & (value <= jnp.asarray(limit, value.dtype))


def excesses(report: GuardReport, limits: Limits) -> tuple[TooMuch, ...]:
    """What one change has too much of, the worst first; nothing where it is accepted."""
    found = [] if bool(report.finite) else [TooMuch(("weights", ""), float("nan"), 0.0)]
    for signal, value in report.signals().items():
        if not bool(_passes(value, limits.of(signal))):
            found.append(TooMuch(signal, float(value), limits.of(signal)))
    return tuple(sorted(found, key=lambda one: one.rank))
