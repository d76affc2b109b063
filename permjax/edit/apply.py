"""Three ways to apply an editor to many edits: all at once, one after the other, or each by itself."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from permjax.edit.base import Editor, EditResult, Statistics
from permjax.edit.covariance import Covariance
from permjax.edit.delta import Delta, apply_delta
from permjax.edit.prepare import PreparedEdit
from permjax.nets.base import Net
from permjax.nets.language import Weights


class Batch(NamedTuple):
    """All edits in one model, written together.

    Attributes:
        params: the edited parameters.
        delta: the one change.
        info: what the editor says of it.
    """

    params: Weights
    delta: Delta
    info: Any


class Step(NamedTuple):
    """The model after some edits of a sequence.

    Attributes:
        count: how many edits are in it.
        params: the parameters with all of them.
        delta: the change of this step alone.
        info: what the editor says of it.
    """

    count: int
    params: Weights
    delta: Delta
    info: Any


class Independent(NamedTuple):
    """Edits that do not know of each other, for the same model; there is no edited model.

    Attributes:
        deltas: one change for each edit.
        infos: what the editor says of each.
    """

    deltas: tuple[Delta, ...]
    infos: tuple[Any, ...]


Covariances = Mapping[int, Covariance] | Statistics | None


def edit_batch(
    editor: Editor,
    net: Net,
    params: Weights,
    edits: Sequence[PreparedEdit],
    *,
    covariances: Covariances = None,
    chunk: int = 1,
) -> Batch:
    """Write all edits at once; the values of all are searched in the model as it is.

    ROME has no batches: it writes the sum of the changes for the single edits.

    Args:
        editor: such as `Memit(layers=(3, 4))`.
        net: a GPT-2 or Llama network.
        params: its weights.
        edits: prepared edits of one shape.
        covariances: layer -> `E[k k^T]` of these parameters, or statistics; None for the identity.
        chunk: how many values are searched side by side; see `solve_values`.

    Example:
        >>> edited = edit_batch(Memit(layers=(3, 4)), net, params, edits, covariances=covariances).params
    """
    values = editor.solve(net, params, edits, chunk=chunk)
    result = editor(net, params, edits, covariances=covariances, values=values)
    return Batch(apply_delta(params, result.delta), result.delta, result.info)


def edit_sequence(
    editor: Editor,
    net: Net,
    params: Weights,
    edits: Sequence[PreparedEdit],
    *,
    size: int = 1,
    covariances: Covariances = None,
) -> Iterator[Step]:
    """Write edits one after the other, each into the model that the ones before it left.

    Covariances stay those of the model before the first edit; what an editor remembers goes from step to step.

    Args:
        editor: such as `Rome(layer=5)`.
        net: a GPT-2 or Llama network.
        params: its weights.
        edits: prepared edits, in order.
        size: how many edits each step writes together.
        covariances: layer -> `E[k k^T]` of these parameters, or statistics; None for the identity.

    Yields:
        A `Step` after each; the last one holds all edits.
    """
    statistics, cache = Statistics.of(net, params, covariances), None
    for start in range(0, len(edits), size):
        group = edits[start : start + size]
        result: EditResult = editor(net, params, group, covariances=statistics, cache=cache)
        params, cache = apply_delta(params, result.delta), result.cache
        yield Step(start + len(group), params, result.delta, result.info)


def edit_independent(
    editor: Editor,
    net: Net,
    params: Weights,
    edits: Sequence[PreparedEdit],
    *,
    covariances: Covariances = None,
    chunk: int = 1,
) -> Independent:
    """Write each edit by itself into the same model.

    Args:
        editor: such as `Rome(layer=5)`.
        net: a GPT-2 or Llama network.
        params: its weights, which no edit changes.
        edits: prepared edits of one shape.
        covariances: layer -> `E[k k^T]` of these parameters, or statistics; None for the identity.
        chunk: how many values are searched side by side; see `solve_values`.
    """
    statistics = Statistics.of(net, params, covariances)
    values = editor.solve(net, params, edits, chunk=chunk)
    results = [
        editor(net, params, [edit], covariances=statistics, values=None if values is None else values.one(i))
        for i, edit in enumerate(edits)
    ]
    return Independent(tuple(result.delta for result in results), tuple(result.info for result in results))
