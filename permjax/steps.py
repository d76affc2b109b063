"""Results and steps: every method returns a `Result`; a pipeline is a chain of steps on a `MergeState`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from permjax.plan import Plan
from permjax.symmetry.spec import PermutationSpec


class Result(NamedTuple):
    """What a method returns: the models it made, the plan it found or used, and a NamedTuple of diagnostics."""

    models: tuple[Any, ...]
    plan: Plan | None
    info: Any


@runtime_checkable
class Step(Protocol):
    """A map `MergeState -> MergeState`; steps of this library are frozen dataclasses of hyper-parameters."""

    def __call__(self, state: "MergeState") -> "MergeState":
        """Return the state after this step."""
        ...


@dataclass(frozen=True)
class MergeState:
    """What a pipeline carries, on the host.

    Attributes:
        spec: the symmetry of the models.
        models: pytrees with the spec's leaves; the first is the anchor.
        plan: the plan that a matching step found, if any.
        data: batches as a re-iterable (a list or a loader), as `apply` takes them.
        labelled: batches as `loss` takes them, to be fitted.
        eval_data: batches kept for measuring.
        apply: `apply(params, *inputs) -> outputs`.
        loss: `loss(params, batch) -> scalar`.
        key: random key; every step that draws takes a fresh one through `split`.
        infos: one record for each step that ran.
        parents: the models as the pipeline was given them, which steps that change models leave alone.
    """

    spec: PermutationSpec
    models: tuple[Any, ...]
    key: jax.Array
    plan: Plan | None = None
    data: Iterable | None = None
    labelled: Iterable | None = None
    eval_data: Iterable | None = None
    apply: Callable | None = None
    loss: Callable | None = None
    infos: tuple[Any, ...] = ()
    parents: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        """A pipeline begins with the models it is given."""
        if not self.parents:
            object.__setattr__(self, "parents", self.models)

    @classmethod
    def create(cls, spec: PermutationSpec, models: Iterable, *, key: jax.Array, **rest: Any) -> "MergeState":
        """Return the start of a pipeline.

        Args:
            spec: the symmetry of the models.
            models: two or more pytrees.
            key: random key.
            rest: `data`, `labelled`, `eval_data`, `apply`, `loss` for the steps that need them.
        """
        return cls(spec, tuple(models), key, **rest)

    def split(self) -> tuple["MergeState", jax.Array]:
        """Return the state with a new key, and a key to use now."""
        key, use = jax.random.split(self.key)
        return replace(self, key=key), use

    def need(self, name: str, step: str) -> Any:
        """Return the named field, or raise a ValueError that tells which step asks for it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{step} needs `{name}`; give it to MergeState.create(..., {name}=...).")
        return value

    def after(self, result: Result) -> "MergeState":
        """Return the state that follows from a step's result; a result without a plan keeps the old one."""
        plan = self.plan if result.plan is None else result.plan
        return replace(self, models=result.models, plan=plan, infos=(*self.infos, result.info))


@dataclass(frozen=True)
class Chain:
    """Several steps as one."""

    steps: tuple[Step, ...]

    def __call__(self, state: MergeState) -> MergeState:
        """Run the steps in order."""
        for step in self.steps:
            state = step(state)
        return state


def chain(*steps: Step) -> Chain:
    """Return the step that runs `steps` in order; nested chains are flattened, so chaining is associative.

    Example:
        >>> pipeline = chain(WeightMatching(), Average())
        >>> merged = pipeline(MergeState.create(spec, [a, b], key=key)).models[0]
    """
    flat: list[Step] = []
    for step in steps:
        flat.extend(step.steps if isinstance(step, Chain) else [step])
    return Chain(tuple(flat))
