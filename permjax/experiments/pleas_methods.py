"""Every method of a PLeaS run: from two parents and unlabelled inputs to a merged network of a given cost."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.experiments.distillation import distill
from permjax.experiments.pleas_calibration import Calibration
from permjax.match.activations import activation_matching
from permjax.match.weights import weight_matching
from permjax.merge.block_apply import BlockApply, block_apply
from permjax.merge.block_repair import block_repair
from permjax.merge.budget import Cost, cost
from permjax.merge.heads import Heads, own_heads
from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.norms import statistics_of_views, wide_statistics
from permjax.merge.planning import pleas_plan
from permjax.merge.pleas import pleas
from permjax.merge.scores import unit_scores
from permjax.merge.wide import Wide
from permjax.merge.zipping import zip_plan
from permjax.nets.base import Net
from permjax.nets.linen import batch_statistics
from permjax.plan import Plan
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.work import contractions


class Recipe(NamedTuple):
    """How a method makes its network.

    Attributes:
        order: how the parents are aligned: `"identity"`, or by `"weights"`, `"distance"` or `"correlation"`.
        metric: by what the units to be merged are chosen.
        fit: `"none"`, `"repair"`, a mode of `pleas`, or `"distill_merged"` or `"distill_scratch"`.
        owner: whether the samples' owners are the targets.
        free: whether it sees foreign data only.
    """

    order: str = "correlation"
    metric: str = "correlation"
    fit: str = "none"
    owner: bool = False
    free: bool = False


RECIPES = {
    "average": Recipe("identity", "distance"),
    "permutation_weights": Recipe("weights", "weights"),
    "permutation_distance": Recipe("distance", "distance"),
    "permutation_correlation": Recipe(),
    "repair": Recipe(fit="repair"),
    "regmean": Recipe("identity", "distance", "separate"),
    "zip": Recipe("identity", "zip"),
    "pleas_parallel": Recipe(fit="parallel"),
    "pleas_sequential": Recipe(fit="sequential"),
    "pleas_owner": Recipe(fit="sequential", owner=True),
    "pleas_free": Recipe(fit="parallel", free=True),
    "lstsq_identity_parallel": Recipe("identity", "distance", "parallel"),
    "lstsq_identity_owner": Recipe("identity", "distance", "sequential", owner=True),
    "distill_merged": Recipe(fit="distill_merged", owner=True),
    "distill_scratch": Recipe(fit="distill_scratch", owner=True),
}


@dataclass(frozen=True)
class Distillation:
    """Hyper-parameters of the distillation controls.

    Attributes:
        steps: of Adam.
        batch_size: calibration inputs per step.
        learning_rate: at the start; it falls to zero.
    """

    steps: int = 400
    batch_size: int = 50
    learning_rate: float = 2e-3


class Merged(NamedTuple):
    """A merged network.

    Attributes:
        params: its parameters.
        network: the function that takes them; gives the concatenated logits of own heads, or those of a shared one.
        cost: what it costs.
        seconds: time to make it, alignment included.
        residuals: layer -> relative residual before and after the fit.
    """

    params: Any
    network: BlockApply
    cost: Cost
    seconds: float
    residuals: dict[str, tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Merger:
    """Two parents and what the methods may use.

    Attributes:
        net: the parents' network.
        spec: its symmetry.
        models: the parents.
        seen: calibration inputs, with owners.
        foreign: other inputs for PLeaS-free, if any.
        batch_size: calibration inputs at a time.
        own: whether the heads are own ones.
        refit: whether own heads are fitted too, or reused.
        key: random key.
        shape: how budgets are spread over groups.
        ridge: of the fits.
        positions: of every image that count in the fits.
        distillation: hyper-parameters of the controls.
    """

    net: Net
    spec: PermutationSpec
    models: tuple[Any, ...]
    seen: Calibration
    foreign: Calibration | None
    batch_size: int
    own: bool
    refit: bool
    key: jax.Array
    shape: str = "uniform"
    ridge: Any = "auto"
    positions: int | None = None
    distillation: Distillation = Distillation()

    def __post_init__(self) -> None:
        object.__setattr__(self, "_known", {})

    @cached_property
    def heads(self) -> Heads:
        """The spec in which own heads are units, or the plain one."""
        x = jnp.asarray(self.seen.x[:2])
        return own_heads(self.spec, self.net.apply, self.models[0], x) if self.own else Heads(self.spec, (), ())

    @cached_property
    def statistics(self) -> Callable | None:
        """BatchNorm's statistics of a batch, where the network has some."""
        has = any(leaf.role == "statistic" for leaf in self.spec.leaves)
        return partial(batch_statistics, self.net) if has else None

    def parent_cost(self) -> Cost:
        """Return what one parent costs."""
        return self._cost(self.spec, Plan.from_permutations(self.spec, [self._identity()] * 2))

    def merge(self, method: str, budget: int) -> Merged:
        """Return the network of a method at a budget, in percent of one parent's FLOPs."""
        recipe = RECIPES[method]
        data = self.foreign if recipe.free and self.foreign is not None else self.seen
        (spent, models), start = self._align(recipe.order, data), time.perf_counter()
        scored, kernels = self._scores(recipe, models, data)
        spent, start = spent + scored, time.perf_counter()
        plan = self._plan(recipe, models, data, budget / 100, kernels)
        network = block_apply(self.heads.spec, plan, self.net.apply, joined="concatenate" if self.own else "mean")
        params, residuals = self._fit(recipe, models, plan, network, data)
        seconds = spent + time.perf_counter() - start
        return Merged(params, network, self._cost(self.heads.spec, plan), seconds, residuals)

    # -- parts -----------------------------------------------------------------------------------------------------

    def _once(self, what: tuple, make: Callable[[], Any]) -> tuple[float, Any]:
        """Return something that several methods use, and the seconds that it took when it was made."""
        known = self._known  # pyright: ignore[reportAttributeAccessIssue]
        if what not in known:
            start = time.perf_counter()
            made = make()
            known[what] = time.perf_counter() - start, made
        return known[what]

    def _scores(self, recipe: Recipe, models: tuple, data: Calibration) -> tuple[float, Any]:
        metric = "distance" if recipe.metric == "zip" else recipe.metric
        options: dict[str, Any] = {"apply": self.net.apply, "data": self._batches(data), "metric": metric}
        what = ("scores", recipe.order, metric, data.source)
        return self._once(what, lambda: unit_scores(self.heads.spec, models, **options))

    def _align(self, order: str, data: Calibration) -> tuple[float, tuple[Any, ...]]:
        """Return the aligned parents."""
        if order == "identity":
            return 0.0, self.models
        if order == "weights":
            return self._once((order,), lambda: weight_matching(self.spec, self.models, key=self.key).models)
        options: dict[str, Any] = {"apply": self.net.apply, "data": self._batches(data)}
        options["statistic"] = "moment" if order == "distance" else "correlation"
        what = (order, data.source)
        return self._once(what, lambda: activation_matching(self.spec, self.models, **options).models)

    def _plan(self, recipe: Recipe, models: tuple, data: Calibration, budget: float, kernels: Any) -> Plan:
        spec, batches = self.heads.spec, self._batches(data)
        options: dict[str, Any] = {"apply": self.net.apply, "data": batches}
        metric = "distance" if recipe.metric == "zip" else recipe.metric
        sizes: dict[str, Any] = {"budget": budget, "shape": self.shape, "apart": self.heads.groups}
        plan = pleas_plan(spec, models, metric=metric, kernels=kernels, **sizes, **options)
        if recipe.metric != "zip":
            return plan
        zipped = zip_plan(self.spec, models, widths={g.name: plan.widths[g.name] for g in self.spec.groups}, **options)
        apart = {g: plan.labels[g] for g in self.heads.groups}
        widths = {g: plan.widths[g] for g in self.heads.groups}
        return Plan({**zipped.labels, **apart}, {**zipped.widths, **widths}, plan.per)

    def _fit(self, recipe: Recipe, models: tuple, plan: Plan, network: BlockApply, data: Calibration):
        spec, batches = self.heads.spec, self._batches(data)
        if recipe.fit in ("none", "repair", "distill_merged", "distill_scratch"):
            if recipe.fit == "repair" and self.statistics is None:
                return block_repair(spec, models, plan, apply=self.net.apply, data=batches).models[0], {}
            params = self._averaged(models, plan, batches)
            if recipe.fit.startswith("distill"):
                params = self._distilled(recipe.fit, params, network)
            return params, {}
        fit: dict[str, Any] = {"mode": recipe.fit, "ridge": self.ridge, "batch_statistics": self.statistics}
        fit |= {"positions": self.positions, "key": self.key}
        if recipe.owner:
            fit |= {"targets": "owner", "owners": self._owners(data)}
        keep = () if self.refit else self.heads.leaves
        found = pleas(spec, models, plan, apply=self.net.apply, data=batches, keep=keep, **fit)
        info = found.info
        errors = zip(info.before.tolist(), info.after.tolist(), strict=True)
        return found.models[0], dict(zip(info.layers, errors, strict=True))

    def _averaged(self, models: tuple, plan: Plan, batches: list) -> Any:
        wide = Wide(self.heads.spec, plan)
        params = wide_average(wide, models, contracted_axes(self.net.apply, models[0], batches[0]))
        if self.statistics is None:
            return params
        return wide_statistics(wide, params, (self.statistics,) * len(models), [(x,) for x in batches])

    def _distilled(self, start: str, params: Any, network: BlockApply) -> Any:
        """Return the network distilled from the parents on the calibration inputs.

        Own heads learn their parent's logits on all inputs, a shared head those of each input's owner.
        """
        size, data = self.distillation.batch_size, self.seen
        batches = [jnp.asarray(data.x[i : i + size]) for i in range(0, len(data.x) - size + 1, size)]
        taught = jax.jit(lambda x: [self.net.apply(model, x) for model in self.models])
        targets = []
        for i, x in enumerate(batches):
            logits = taught(x)
            who = None if data.owner is None else jnp.asarray(data.owner[i * size : (i + 1) * size])
            targets.append(jnp.concatenate(logits, -1) if self.own else _owned(logits, who))
        if start == "distill_scratch":
            params = _fresh(self.net, network.wide, self.key)
        train = replace(network, applies=(self.net.apply_train,) * len(self.models), joined="tuple")
        hyper = {"steps": self.distillation.steps, "learning_rate": self.distillation.learning_rate}
        frozen = [leaf.name for leaf in self.spec.leaves if leaf.role == "statistic"]
        if not frozen:
            return distill(network, params, targets, batches, key=self.key, **hyper)[0]

        def step(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            outputs, views = zip(*train.views(params, x), strict=True)
            joined = jnp.concatenate(outputs, -1) if self.own else jnp.mean(jnp.stack(outputs), 0)
            return joined, statistics_of_views(network.wide, params, views)

        return distill(step, params, targets, batches, key=self.key, frozen=frozen, stateful=True, **hyper)[0]

    # -- details ---------------------------------------------------------------------------------------------------

    def _batches(self, data: Calibration) -> list[jax.Array]:
        return [jnp.asarray(part) for part in _cut(data.x, self.batch_size)]

    def _owners(self, data: Calibration) -> list[np.ndarray]:
        if data.owner is None:
            raise ValueError(
                f"methods with owner targets need to know whose domain a sample is from; {data.source} do not."
            )
        return _cut(data.owner, self.batch_size)

    def _cost(self, spec: PermutationSpec, plan: Plan) -> Cost:
        works = contractions(self.net.apply, spec, self.models[0], jnp.asarray(self.seen.x[:1]))
        return cost(works, spec, plan)

    def _identity(self) -> dict[str, np.ndarray]:
        return {g.name: np.broadcast_to(np.arange(g.size), self.spec.shape(g.name)) for g in self.spec.groups}


def _cut(values: np.ndarray, size: int) -> list[np.ndarray]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _owned(logits: Sequence[Any], owner: Any) -> Any:
    """Return for every sample the logits of its owner, or the mean without owners."""
    stacked = jnp.stack(list(logits))
    return stacked.mean(0) if owner is None else stacked[owner, jnp.arange(stacked.shape[1])]


def _fresh(net: Net, wide: Wide, key: jax.Array) -> Any:
    """Return random weights for the blocks of a merged network, of the spread with which the parents' are drawn."""
    drawn = [net.init(jax.random.fold_in(key, m)) for m in range(wide.models)]
    mean = wide_average(wide, drawn, contracted_axes(net.apply, drawn[0], *net.example_inputs(1)))

    def spread(name: str, leaf: Any) -> Any:
        if leaf.ndim < 2:
            return leaf
        owners = [wide.owners(axis) for axis in wide.spec.leaf(name).axes]
        both = sum(reduce(np.multiply.outer, (o[m] for o in owners)) for m in range(wide.models))
        return leaf * jnp.asarray(np.sqrt(np.maximum(both, 1)), leaf.dtype)

    return tree.map_named(spread, mean)
