"""How a merged adapter is scored: accuracy on every task, as it is and at the best common factor."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from permjax.experiments.lora_tasks_data import Examples
from permjax.experiments.lora_tasks_training import Model, adapted, modules
from permjax.lora.pool import Adapter, Factors, padded
from permjax.nets.base import Net
from permjax.symmetry.capture import capture
from permjax.symmetry.spec import PermutationSpec


class Score(NamedTuple):
    """Accuracies in percent.

    Attributes:
        tasks: on each task.
        kept: on the words that no task changes.
        factor: of the update, where the accuracy on other questions is best.
        scaled: on each task at this factor.
        scaled_kept: on the words that no task changes at this factor.
    """

    tasks: Float[np.ndarray, " tasks"]
    kept: float
    factor: float
    scaled: Float[np.ndarray, " tasks"]
    scaled_kept: float


class Judge(NamedTuple):
    """Scores adapters of one base model.

    Attributes:
        model: the base model.
        validation: questions of every task and of the untouched words, by which the factor is chosen.
        test: others, on which the accuracies are measured.
        factors: to choose from.
        rank: the largest rank of an adapter; all are filled up to it, so that one program scores them all.
    """

    model: Model
    validation: Examples
    test: Examples
    factors: tuple[float, ...]
    rank: int

    def score(self, adapter: Adapter, factor: float | None = None) -> Score:
        """The score of an adapter, at a factor that was chosen before, or at the best one."""
        if factor is None:
            means = self.accuracies(adapter, self.factors, self.validation)[:, :-1].mean(1)
            factor = self.factors[int(means.argmax())]
        plain, scaled = self.accuracies(adapter, (1.0, factor), self.test)
        return Score(plain[:-1], float(plain[-1]), factor, scaled[:-1], float(scaled[-1]))

    def accuracies(
        self, adapter: Adapter, factors: Sequence[float], examples: Examples
    ) -> Float[np.ndarray, "factors sets"]:
        """In percent, of the base model with multiples of an adapter's updates."""
        full = {name: padded(*f, self.rank) for name, f in adapter.items()}
        run = _program(self.model.net)
        return 100 * np.asarray(run(self.model.params, full, jnp.asarray(factors), *examples))


@cache
def _program(net: Net) -> Callable[..., Array]:
    """The compiled accuracies `[factors, sets]` of questions `[sets, n, tokens]`."""

    def accuracies(params: Any, adapter: Mapping[str, Factors], factors: Array, x: Array, y: Array) -> Array:
        def at(factor: Array) -> Array:
            logits = net.apply(adapted(params, adapter, factor), x.reshape(-1, x.shape[-1]))
            return (logits.argmax(-1).reshape(y.shape) == y).mean(1)

        return jax.lax.map(at, factors)

    return jax.jit(accuracies)


def module_inputs(model: Model, adapters: Sequence[Adapter], lessons: Sequence[Examples], count: int) -> dict[str, Any]:
    """The inputs of every module `[tasks, rows, in]` on some questions of each task, with the task's adapter."""
    run = _inputs_program(model.net)
    pairs = zip(adapters, lessons, strict=True)
    found = [run(adapted(model.params, adapter), jnp.asarray(examples.x[:count])) for adapter, examples in pairs]
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


@cache
def _inputs_program(net: Net) -> Callable[..., dict[str, Array]]:
    """The compiled inputs `[rows, in]` of every module, one row for each token."""

    def inputs(params: Any, x: Array) -> dict[str, Array]:
        fixed = PermutationSpec.from_axes({name: leaf.shape for name, leaf in params.items()}, {})
        leaves = capture(net.apply, fixed, params, x).leaves
        found = {name: leaves[f"{name}.weight"].input for name in modules(net)}
        return {name: rows.reshape(-1, rows.shape[-1]) for name, rows in found.items()}

    return jax.jit(inputs)
