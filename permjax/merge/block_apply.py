"""Running a merged network: every model's own program on its view, every weight used once, on the blocks that exist."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.merge.contraction import contraction
from permjax.merge.wide import Wide, groups_of
from permjax.plan import Plan
from permjax.symmetry.program import Program, Ref, Survey, Use, steps, survey
from permjax.symmetry.spec import PermutationSpec

Apply: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class BlockApply:
    """A merged network as a function, at its block-sparse cost: `block_apply(...)(params, *inputs)`.

    Attributes:
        wide: the geometry.
        applies: the function of every model.
        joined: how the outputs of the views become one: `"mean"`, `"concatenate"` along the last axis (heads of
            different label spaces), or `"tuple"`.
    """

    wide: Wide
    applies: tuple[Apply, ...]
    joined: str = "mean"

    def __call__(self, params: Any, *inputs: Any) -> Any:
        """Return the outputs of the merged network; traceable.

        Args:
            params: the wide parameters, named as those of the models.
            *inputs: inputs as the models take them.

        Raises:
            ValueError: parameters that do not fit, or an architecture whose groups cannot be widened so.
        """
        outputs = self.views(params, *inputs)
        if self.wide.widened:
            self.check(survey(self.applies[0], self.like(0, params), *inputs))
        if self.joined == "tuple":
            return outputs if len(outputs) == self.wide.models else outputs * self.wide.models
        if len(outputs) == 1:
            return outputs[0]
        if self.joined == "concatenate":
            return jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *outputs)
        return jax.tree.map(lambda *x: sum(x[1:], start=x[0]) / jnp.asarray(len(x), x[0].dtype), *outputs)

    def views(self, params: Any, *inputs: Any) -> tuple[Any, ...]:
        """Return the outputs in the view of every model; of the first alone if the views are all the same."""
        return self._run(params, inputs, {})

    def last_features(self, params: Any, *inputs: Any) -> Any:
        """Return the input of the last contraction (the head), `[..., features]`; traceable."""
        seen: dict[str, Any] = {}
        self._run(params, inputs, seen)
        return list(seen.values())[-1]

    def _run(self, params: Any, inputs: Sequence[Any], seen: dict[str, Any]) -> tuple[Any, ...]:
        named = tree.flatten(params)
        self.wide.wide_spec.validate({n: np.shape(leaf) for n, leaf in named.items()}, "the merged model")
        models = self.wide.views
        memo: dict[Any, Any] = {}
        programs = [self.start(m, params, inputs, named, memo) for m in models]

        def answer(uses: Sequence[Use]) -> list[Any]:
            found = contraction(self.wide, uses[0])
            x = found.inputs([use.other for use in uses], models)
            seen[uses[0].ref.leaf] = x
            y = found.multiply(x, named[uses[0].ref.leaf])
            memo.clear()
            return found.results(y, models)

        outputs = together(programs, answer)
        structure = [jax.tree.structure(jax.eval_shape(self.applies[m], self.like(m, params), *inputs)) for m in models]
        return tuple(jax.tree.unflatten(s, o) for s, o in zip(structure, outputs, strict=True))

    def start(
        self, model: int, params: Any, inputs: Sequence[Any], named: Mapping[str, Any], memo: dict[Any, Any]
    ) -> Program:
        """Return the program of one model on its view of the wide leaves `named`, which are read as it comes to them.

        Of `params` only the structure is used; programs on the same inputs share a `memo`.
        """

        def fetch(ref: Ref) -> Any:
            return self.wide.view(ref.leaf, model, named[ref.leaf])

        return steps(
            self.applies[model], self.like(model, params), *inputs, fetch=fetch, derived=self.refuse, memo=memo
        )

    def like(self, model: int, params: Any) -> Any:
        """Return the parameters of one model as shapes."""
        spec = self.wide.sources[model]
        return tree.map_named(lambda n, leaf: jax.ShapeDtypeStruct(spec.leaf(n).shape, jnp.result_type(leaf)), params)

    def check(self, used: Survey) -> None:
        """Refuse leaves whose widened units are read in different ways: their blocks would have to differ in scale."""
        self.refuse(used.derived)
        ways: dict[str, set[frozenset[int]]] = {name: {frozenset()} for name in used.fetched}
        for use in used.uses:
            ways.setdefault(use.ref.leaf, set()).add(frozenset(use.contracted))
        for name, seen in ways.items():
            for place, axis in enumerate(self.wide.spec.leaf(name).axes):
                group = min(groups_of(axis) & self.wide.widened, default=None)
                if group is not None and len({place in way for way in seen}) > 1:
                    message = (
                        f"leaf '{name}' is summed over group '{group}' at one place and used without that at another "
                        f"(as a tied embedding is), so no wider leaf can be both; keep group '{group}' whole (ratio 0)."
                    )
                    raise ValueError(message)

    def refuse(self, leaves: frozenset[str]) -> None:
        """Refuse leaves that are computed with before they are contracted, if they hold widened units."""
        for name in sorted(leaves):
            if any(self.wide.touches(axis) for axis in self.wide.spec.leaf(name).axes):
                message = (
                    f"leaf '{name}' is computed with before it is contracted, so its blocks cannot be told apart; keep "
                    "the groups on its axes whole (ratio 0)."
                )
                raise ValueError(message)


def block_apply(
    spec: PermutationSpec, plan: Plan, apply: Apply | Sequence[Apply], *, joined: str = "mean"
) -> BlockApply:
    """Return the function of the network that `plan` makes of aligned models.

    Args:
        spec: the symmetry of the models.
        plan: the units of the merged network, over aligned models.
        apply: `apply(params, *inputs) -> outputs` of the models, or one function for each (heads of unlike sizes).
        joined: `"mean"` of the views' outputs (equal anyway but for rounding where a head is shared), `"concatenate"`
            along the last axis for heads of their own, or `"tuple"`.

    Raises:
        ValueError: a plan that does not fit, or another `joined`.

    Example:
        >>> merged = block_apply(spec, result.plan, apply)
        >>> jax.jit(merged)(result.models[0], x)
    """
    if joined not in ("mean", "concatenate", "tuple"):
        raise ValueError(f"outputs can be joined by 'mean', 'concatenate' or 'tuple', not {joined!r}.")
    wide = Wide(spec, plan)
    applies = (apply,) * wide.models if callable(apply) else tuple(apply)
    if len(applies) != wide.models:
        raise ValueError(f"the plan is for {wide.models} models, but {len(applies)} functions were given.")
    return BlockApply(wide, applies, joined)


def together(programs: Sequence[Program], answer: Callable[[Sequence[Use]], Sequence[Any]]) -> list[list[Any]]:
    """Run programs of one architecture side by side and return their outputs; `answer` gives the results of each use.

    Raises:
        ValueError: the programs use different leaves.
    """
    outputs: list[Any] = [None] * len(programs)
    replies: Sequence[Any] = [None] * len(programs)
    while True:
        uses = [
            _next(program, reply, outputs, i) for i, (program, reply) in enumerate(zip(programs, replies, strict=True))
        ]
        found = [use for use in uses if use is not None]
        if not found:
            return outputs
        if len(found) < len(uses) or any(use.ref != found[0].ref for use in found):
            seen = sorted({"the end" if use is None else f"leaf '{use.ref.leaf}'" for use in uses})
            raise ValueError(f"the models run different programs: at one place they come to {' and '.join(seen)}.")
        replies = answer(found)


def _next(program: Program, reply: Any, outputs: list[Any], place: int) -> Use | None:
    try:
        return program.send(reply)
    except StopIteration as stop:
        outputs[place] = stop.value
        return None
