"""The guard as a step: a pipeline goes on only with models that are not much worse than those it was given."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from permjax import tree
from permjax.merge.block_apply import BlockApply
from permjax.merge.guard import GuardRefusedError
from permjax.merge.perplexity import Sentences, group_losses, perplexity_of
from permjax.steps import MergeState

_ALL = "eval_data"  # the one group of data without groups


class GuardInfo(NamedTuple):
    """What a guard saw.

    Attributes:
        before: group -> perplexity of every model that the pipeline was given.
        after: group -> perplexity of every model now.
        ratio: group -> perplexity of every model as a multiple of that before: of its own one where there are as many
            models as before, else of the best one.
        accepted: whether each model is within the limit in all groups.
    """

    before: dict[str, Float[np.ndarray, " given"]]
    after: dict[str, Float[np.ndarray, " models"]]
    ratio: dict[str, Float[np.ndarray, " models"]]
    accepted: Bool[np.ndarray, " models"]


@dataclass(frozen=True)
class Guard:
    """Step that refuses models which have collapsed: in no group may perplexity rise above `limit` times that before.

    What it compares with are the models that the pipeline was given, `state.parents`: each model with its own one
    while there are as many as before (a permuted copy has ratio 1), and a merged one with the best of them. Perplexity
    is measured on `state.eval_data`: batches of `Sentences`, or a mapping of groups to such batches. What is not finite
    is always refused.

    Attributes:
        metric: `"perplexity"` of a language model, or `"loss"`: exp of the mean over batches of `state.loss`, for a
            loss in nats such as cross entropy.
        limit: the largest ratio.
        convention: of perplexity; see `perplexity_of`.
        otherwise: `"raise"` a `GuardRefusedError`, or `"return"` the given models themselves: all of them while
            there are as many as before, else the first one.

    Example:
        >>> pipeline = chain(WeightMatching(), Average(), Guard(limit=1.2))
    """

    metric: str = "perplexity"
    limit: float | int = 1.5
    convention: str = "sentence_mean"
    otherwise: str = "raise"

    def __call__(self, state: MergeState) -> MergeState:
        """Return the state with what was seen, and without models that are refused.

        Raises:
            GuardRefusedError: a model is above the limit, or not finite, and `otherwise` is `"raise"`.
            ValueError: the state lacks what is measured, or an attribute has no such value.
        """
        info = self._seen(state)
        if bool(info.accepted.all()):
            return replace(state, infos=(*state.infos, info))
        if self.otherwise == "raise":
            raise GuardRefusedError(refusal(info, self.limit))
        models = state.parents if len(state.models) == len(state.parents) else state.parents[:1]
        return replace(_unwidened(state, models[0]), models=models, plan=None, infos=(*state.infos, info))

    def _seen(self, state: MergeState) -> GuardInfo:
        _check(self.metric, ("perplexity", "loss"), "metric")
        _check(self.otherwise, ("raise", "return"), "otherwise")
        measure = self._measure(state)
        return compare([measure(p) for p in state.parents], [measure(m) for m in state.models], self.limit)

    def _measure(self, state: MergeState) -> Callable[[Any], dict[str, float]]:
        data = state.need("eval_data", "Guard")
        if self.metric == "loss":
            loss = jax.jit(state.need("loss", "Guard(metric='loss')"))
            return lambda params: {_ALL: _exp(float(np.mean([loss(params, batch) for batch in data])))}
        probe = {name: list(some) for name, some in (data if isinstance(data, Mapping) else {_ALL: data}).items()}
        _check_probe(probe)
        state.need("apply", "Guard")
        return lambda params: perplexities(_unwidened(state, params).apply, params, probe, self.convention)


def perplexities(apply: Any, params: Any, probe: Mapping[str, Any], convention: str) -> dict[str, float]:
    """The perplexity of every group, as a number of the host."""
    return {name: float(perplexity_of(one, convention)) for name, one in group_losses(apply, params, probe).items()}


def compare(before: list[dict[str, float]], after: list[dict[str, float]], limit: float) -> GuardInfo:
    """Compare perplexities by group of some models with those of the models that they come from; see `GuardInfo`."""
    old, new = ({name: np.asarray([one[name] for one in some]) for name in some[0]} for some in (before, after))
    paired = len(before) == len(after)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        ratio = {name: value / (old[name] if paired else old[name].min()) for name, value in new.items()}
    passed = [np.isfinite(value) & (value <= limit) for value in ratio.values()]
    return GuardInfo(old, new, ratio, np.all(passed, axis=0))


def refusal(info: GuardInfo, limit: float) -> str:
    """One sentence on what is worst in models that were refused."""
    model, name = max(
        ((model, name) for name, values in info.ratio.items() for model in range(len(values))),
        key=lambda place: np.nan_to_num(info.ratio[place[1]][place[0]], nan=np.inf),
    )
    old, new = info.before[name], info.after[name][model]
    base = old[model] if len(old) == len(info.after[name]) else old.min()
    which = f"model {model}" if len(info.accepted) > 1 else "the result"
    return (
        f"The guard refuses {which}: the perplexity of {name} is {new:.4g} where {base:.4g} was given, "
        f"{info.ratio[name][model]:.4g} times it, and the limit is {limit:g}."
    )


def _unwidened(state: MergeState, params: Any) -> MergeState:
    """The state with the spec and the function of a model from before it was merged to one of other widths."""
    while isinstance(state.apply, BlockApply) and not _fits(state.apply, params):
        state = replace(state, spec=state.apply.wide.spec, apply=state.apply.applies[0])
    return state


def _fits(network: BlockApply, params: Any) -> bool:
    spec = network.wide.wide_spec
    return all(np.shape(leaf) == spec.leaf(name).shape for name, leaf in tree.flatten(params).items())


def _check_probe(probe: Mapping[str, list[Any]]) -> None:
    if (
        not probe
        or not all(probe.values())
        or any(not isinstance(b, Sentences) for some in probe.values() for b in some)
    ):
        message = "Guard needs batches of Sentences as `eval_data`, or a mapping of groups to such batches; "
        raise ValueError(message + "make them by permjax.merge.perplexity.padded, or take metric='loss'.")


def _check(value: str, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise ValueError(f"Guard has no {what} {value!r}; known are {', '.join(known)}.")


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
