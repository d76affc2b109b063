"""What is measured for one seed: every method, and what happens to it under other ranks, gauges and controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from permjax.experiments.lora_tasks_controls import change, permuted, random_like, regauged
from permjax.experiments.lora_tasks_rows import ABLATION, PERMUTED, Trial, swept_ranks
from permjax.experiments.lora_tasks_scores import Judge, Score
from permjax.lora.lego import LoraLego
from permjax.lora.merge import Method, factors_of, merge_loras
from permjax.lora.methods import lora_method as named
from permjax.lora.pool import Adapter, Factors


@dataclass(frozen=True)
class Bench:
    """What all rows of one seed share.

    Attributes:
        judge: scores adapters.
        adapters: one for each task.
        inputs: of every module, for methods that use data.
        methods: to compare.
        swept: those of them that are run at several ranks.
        sigma: standard deviation of the logarithms of the scales that a change of gauge moves.
        seed: of gauges, controls and methods that draw.
    """

    judge: Judge
    adapters: Sequence[Adapter]
    inputs: Mapping[str, Any]
    methods: tuple[str, ...]
    swept: tuple[str, ...]
    sigma: float
    seed: int

    @property
    def ranks(self) -> list[int]:
        """The rank of every adapter."""
        return [next(iter(adapter.values())).a.shape[0] for adapter in self.adapters]

    def merge(self, method: Method, adapters: Sequence[Adapter] | None = None, rank: int | None = None) -> Adapter:
        """Merge the adapters of the tasks, or others, with equal weights."""
        some = self.adapters if adapters is None else adapters
        key = jax.random.key(self.seed)
        inputs = self.inputs if method.needs_inputs else None
        return jax.device_get(factors_of(merge_loras(some, method, rank=rank, key=key, inputs=inputs)))


def measure(bench: Bench, progress: Any) -> Trial:
    """Measure all rows but `individual`, `joint` and `base`."""
    scores, changes = {}, {}
    for name in bench.methods:
        progress.step(1, method=name)
        found, moved = _method(bench, name)
        scores |= found
        changes |= moved
    for rows in (_sweep, _ablation, _interference):
        progress.step(1, method=rows.__name__.strip("_"))
        found, moved = rows(bench)
        scores |= found
        changes |= moved
    return Trial(scores, changes)


def steps(methods: Sequence[str]) -> int:
    """How often `measure` tells its progress."""
    return len(methods) + 3


# rows

_Rows = tuple[dict[str, Score], dict[str, float]]


def _method(bench: Bench, name: str) -> _Rows:
    """A method as it is, on adapters with another gauge, and on random ones."""
    method, rng = named(name), np.random.default_rng(bench.seed)
    merged = bench.merge(method)
    scores = {name: bench.judge.score(merged)}
    attacked = bench.merge(method, [regauged(adapter, rng, bench.sigma) for adapter in bench.adapters])
    scores[f"{name}_regauged"] = bench.judge.score(attacked, scores[name].factor)
    drawn = bench.merge(method, [random_like(adapter, rng) for adapter in bench.adapters])
    if name == "lora_lego":
        scores["random_control"] = bench.judge.score(drawn)
    scores[f"{name}_random"] = bench.judge.score(drawn, scores[name].factor)
    return scores, {f"{name}_gauge_change": change(merged, attacked)}


def _sweep(bench: Bench) -> _Rows:
    """Some methods at other ranks."""
    return {
        f"{name}_rank_{rank}": bench.judge.score(bench.merge(named(name), rank=rank))
        for name in bench.swept
        for rank in swept_ranks(bench.ranks)
    }, {}


def _ablation(bench: Bench) -> _Rows:
    """The paper's form without one or both of its reweightings, or with the other public one.

    The output scale is a factor of the whole update, so that of the paper's form is exchanged for another one.
    """
    merged = {flag: bench.merge(LoraLego(parameter_reweighting=flag)) for flag in (True, False)}
    mean = np.mean(bench.ranks)
    above = {"sqrt_r_over_k": mean, "sqrt_n_over_k": sum(bench.ranks), "none": max(bench.ranks)}
    scores = {}
    for name, (flag, scale) in ABLATION.items():
        factor = float(np.sqrt(above[scale] / mean))
        scores[name] = bench.judge.score({module: Factors(f.a, factor * f.b) for module, f in merged[flag].items()})
    return scores, {}


def _interference(bench: Bench) -> _Rows:
    """Merging before and after ranks change places, which changes no adapter's function.

    The adapter of the largest rank is merged with itself and with its permuted copy; and all adapters are merged.
    """
    rng = np.random.default_rng(bench.seed)
    largest = int(np.argmax(bench.ranks))
    one = bench.adapters[largest]
    pairs = {"self": ([one, one], [one, permuted(one, rng)])}
    pairs[""] = list(bench.adapters), [permuted(adapter, rng) for adapter in bench.adapters]
    scores, changes = {}, {}
    for name in (name for name in PERMUTED if name in bench.methods):
        for kind, (before, after) in pairs.items():
            stem = f"{name}_{kind}" if kind else name
            first, second = bench.merge(named(name), before), bench.merge(named(name), after)
            changes[f"{stem}_permuted_change"] = change(first, second)
            found = {stem: bench.judge.score(first), f"{stem}_permuted": bench.judge.score(second)}
            scores |= {row: _only(score, largest) if kind else score for row, score in found.items()}
    return scores, changes


def _only(score: Score, task: int) -> Score:
    """The score with the accuracy on one task for that on every task."""
    tasks, scaled = (np.full_like(values, values[task]) for values in (score.tasks, score.scaled))
    return score._replace(tasks=tasks, scaled=scaled)
