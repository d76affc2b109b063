"""Changes under guard: several ways to make one are tried in turn, and what is refused leaves the model as it was."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax

from permjax.merge.energy import InputMoment
from permjax.merge.guard import GuardReport, Task, check_change, excesses
from permjax.merge.guard_limits import Limits, TooMuch
from permjax.merge.perplexity import Convention, Probe

Attempts: TypeAlias = Mapping[str, Callable[[Any], Any]]
"""Name of a way to make a change -> `change(params) -> params`, the best one first."""


@dataclass(frozen=True, eq=False)
class Watch:
    """What a guard looks at, and what it lets pass; see `check_change` and `Limits`.

    Attributes:
        apply: `apply(params, tokens) -> logits`.
        probe: group -> batches of sentences.
        moments: leaf -> second moments of its inputs in the base model.
        tasks: name -> `task(params) -> score`.
        convention: of perplexity.
        each: limits of one change, against the model just before it.
        total: limits of all changes together, against the base model.
    """

    apply: Callable[..., jax.Array]
    probe: Probe
    moments: Mapping[str, InputMoment] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)
    convention: Convention = "sentence_mean"
    each: Limits = Limits()
    total: Limits = Limits()

    def report(self, before: Any, after: Any, limits: Limits) -> GuardReport:
        """What a change does, up to the level that refuses it, with NumPy arrays."""
        found = check_change(
            self.apply,
            before,
            after,
            self.probe,
            moments=self.moments,
            tasks=self.tasks,
            convention=self.convention,
            limits=limits,
        )
        return jax.device_get(found)


class Attempt(NamedTuple):
    """One way to make a change, as a guard saw it.

    Attributes:
        name: of the way.
        accepted: whether it was within all limits.
        each: what it does to the model just before it.
        total: what all changes together do to the base model; None where `each` was refused.
        excesses: what is too much, the worst first.
    """

    name: str
    accepted: bool
    each: GuardReport
    total: GuardReport | None
    excesses: tuple[TooMuch, ...]


class Guarded(NamedTuple):
    """A change under guard.

    Attributes:
        params: after the first way that was accepted; the very object that was given where all were refused.
        attempts: what was tried, in order.
    """

    params: Any
    attempts: tuple[Attempt, ...]

    @property
    def accepted(self) -> str | None:
        """The name of the way that was taken, if any."""
        return next((one.name for one in self.attempts if one.accepted), None)


def guarded_apply(watch: Watch, params: Any, attempts: Attempts, *, base: Any = None) -> Guarded:
    """Make a change in the first of several ways that the guard accepts, or leave the model as it is.

    Nothing is undone by arithmetic: a model that is refused is dropped, and the one before is still there.

    Args:
        watch: what to look at, and the limits.
        params: the model now.
        attempts: name -> `change(params) -> params`, tried in order; later ones are not made once one is accepted.
        base: the model before all changes; `params` by default.

    Example:
        >>> ways = {"rome": lambda p: apply_delta(p, rome(net, p, [edit]).delta), "c_rome": ...}
        >>> params, attempts = guarded_apply(watch, params, ways, base=base)
    """
    seen: list[Attempt] = []
    for name, change in attempts.items():
        after = change(params)
        seen.append(_judged(watch, name, params if base is None else base, params, after))
        if seen[-1].accepted:
            return Guarded(after, tuple(seen))
    return Guarded(params, tuple(seen))


def _judged(watch: Watch, name: str, base: Any, before: Any, after: Any) -> Attempt:
    each = watch.report(before, after, watch.each)
    found = excesses(each, watch.each)
    if found:
        return Attempt(name, False, each, None, found)
    total = each if base is before and watch.total == watch.each else watch.report(base, after, watch.total)
    found = excesses(total, watch.total)
    return Attempt(name, not found, each, total, found)


class GuardedRun(NamedTuple):
    """Many changes under guard.

    Attributes:
        params: after all that were accepted.
        changes: the attempts at each of them.
    """

    params: Any
    changes: tuple[tuple[Attempt, ...], ...]

    @property
    def accepted(self) -> tuple[str | None, ...]:
        """For every change, the way that was taken, if any."""
        return tuple(next((one.name for one in attempts if one.accepted), None) for attempts in self.changes)


def guarded_sequence(watch: Watch, base: Any, changes: Iterable[Attempts]) -> GuardedRun:
    """Make changes one after the other, each in the first way that the guard accepts.

    Args:
        watch: what to look at, and the limits of each change and of all together.
        base: the model before all of them, to which all together are compared.
        changes: for each the ways to make it; see `guarded_apply`.
    """
    params, seen = base, []
    for attempts in changes:
        params, tried = guarded_apply(watch, params, attempts, base=base)
        seen.append(tried)
    return GuardedRun(params, tuple(seen))
