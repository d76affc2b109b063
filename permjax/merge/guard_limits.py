"""How much a guard lets pass, said by hand or learnt from changes that are known to be safe."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float

Signal: TypeAlias = tuple[str, str]
"""Kind of a signal (energy, perplexity, kl or task) and what it is of (a leaf, a group or a task)."""
Limit: TypeAlias = float | int | Mapping[str, float | int]

_FLOOR = 1e-4  # excesses below this are rounding
_MARGIN = 1 + 1e-6  # so that the change which makes a limit is within it in float32


@dataclass(frozen=True)
class Limits:
    """The most that a guard lets pass: one number, or one for each group or task. What is not finite never passes.

    Attributes:
        energy: energy of the change of a leaf.
        perplexity: perplexity of a group after a change as a multiple of that before.
        kl: KL divergence of the predictions from those before, in nats per token.
        task: share of its score that a task may lose.
    """

    energy: Limit = math.inf
    perplexity: Limit = 1.5
    kl: Limit = math.inf
    task: Limit = math.inf

    def of(self, signal: Signal) -> float:
        """The limit of one signal.

        Raises:
            ValueError: there are limits for other groups or tasks only.
        """
        kind, name = signal
        limit = getattr(self, kind)
        if not isinstance(limit, Mapping):
            return float(limit)
        if name not in limit:
            message = f"There is no limit of {kind} for {name!r}, only for {', '.join(limit)}; "
            raise ValueError(message + "calibrate with the same groups and tasks.")
        return float(limit[name])


class TooMuch(NamedTuple):
    """A signal that is above its limit, or not a number."""

    signal: Signal
    value: float
    limit: float

    @property
    def rank(self) -> float:
        """For an order with the worst first."""
        if not math.isfinite(self.value):
            return -math.inf
        return -self.value / self.limit if self.limit > 0 else -math.inf

    def __str__(self) -> str:
        kind, name = self.signal
        if kind == "weights":
            return "weights are not finite"
        unit = {"energy": "", "perplexity": " times that before", "kl": " nats per token", "task": " lost"}[kind]
        what = {
            "energy": "the energy of the change of",
            "perplexity": "the perplexity of",
            "kl": "the KL divergence on",
        }
        return f"{what.get(kind, 'the score of')} {name} is {self.value:.4g}{unit}, above {self.limit:.4g}"


@runtime_checkable
class Report(Protocol):
    """What limits are learnt from: a `GuardReport` of one change, or of several."""

    @property
    def finite(self) -> Any:
        """Whether the weights are."""
        ...

    def signals(self) -> Mapping[Signal, Any]:
        """Numbers of which more is worse."""
        ...


def calibrate_limits(reports: Sequence[Report], *, quantile: float = 0.99, slack: float = 1.0) -> Limits:
    """Limits within which the given share of safe changes stays, all signals taken together.

    Every signal x_j is measured in units of its own quantile s_j (log of the ratio for perplexities); a change counts
    by its worst signal, max_j x_j / s_j, and the quantile f of these numbers makes the limits f s_j, times the slack.
    So one number decides, and several signals do not add up their false alarms: of new changes of the same kind, about
    1 - quantile + 1 / (n + 1) are refused, and fewer with slack. Few changes say little of how far their tail reaches.

    Args:
        reports: of n changes known to be safe, other ones than those to be judged, with the same groups and tasks.
        quantile: the share of them that passes, at least.
        slack: how many times that much is let pass, at least 1.

    Returns:
        One limit of energy for all leaves, and one of the others for each group and task.

    Raises:
        ValueError: no reports, reports of different groups, a report that is not finite, or no share.

    Example:
        >>> limits = calibrate_limits([check_change(apply, params, edit(params), probe) for edit in safe])
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"The quantile must be above 0 and at most 1, not {quantile}.")
    if not 1 <= slack < math.inf:
        raise ValueError(f"The slack must be a number from 1 on, not {slack}.")
    signals, excess = _excesses(reports)
    scale = np.maximum(np.quantile(excess, quantile, axis=1, method="higher"), _FLOOR)
    factor = max(1.0, float(np.quantile((excess / scale[:, None]).max(axis=0), quantile, method="higher")))
    found: dict[str, dict[str, float]] = {}
    for (kind, name), value in zip(signals, (slack * factor * scale).tolist(), strict=True):
        found.setdefault(kind, {})[name] = _MARGIN * (math.exp(value) if kind == "perplexity" else value)
    limits: dict[str, Any] = {kind: found.get(kind, math.inf) for kind in ("perplexity", "kl", "task")}
    return Limits(energy=found.get("energy", {}).get("", math.inf), **limits)


def _excesses(reports: Sequence[Report]) -> tuple[list[Signal], Float[np.ndarray, "signals changes"]]:
    """What every change has too much of, in numbers that are 0 for no change."""
    every = [_numbers(report) for report in reports]
    if not every or not every[0]:
        raise ValueError("There are no reports with signals to learn limits from; give those of some safe changes.")
    for number, one in enumerate(every):
        if one.keys() != every[0].keys():
            odd = sorted(one.keys() ^ every[0].keys())[0]
            raise ValueError(f"Report {number} and report 0 differ: only one has {odd[0]} of {odd[1]!r}.")
    table = np.stack([np.concatenate([one[signal] for one in every]) for signal in every[0]])
    if not (np.isfinite(table).all() and all(np.all(report.finite) for report in reports)):
        raise ValueError("A report tells of weights or signals that are not finite; such a change is not safe.")
    return list(every[0]), table


def _numbers(report: Report) -> dict[Signal, Float[np.ndarray, " changes"]]:
    found: dict[Signal, np.ndarray] = {}
    for (kind, name), value in report.signals().items():
        numbers = np.atleast_1d(np.asarray(value, np.float64))
        if kind == "energy":
            found["energy", ""] = np.maximum(found.get(("energy", ""), -np.inf), numbers)
        else:
            with np.errstate(invalid="ignore", divide="ignore"):
                found[kind, name] = np.log(numbers) if kind == "perplexity" else numbers
    return found
