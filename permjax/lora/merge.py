"""Merging adapters: modules of one shape are merged together, one compiled program for every shape."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.lora.buckets import mapped
from permjax.lora.pool import Adapter, Factors, Merged, Pool, module_names
from permjax.permutation import is_traced


@runtime_checkable
class Method(Protocol):
    """A way to merge one module: a frozen dataclass of hyper-parameters.

    Attributes:
        on_host: whether it works on concrete NumPy arrays, one module after the other; otherwise it is a pure function
            of JAX arrays, compiled and mapped over all modules of one shape.
        needs_inputs: whether it is also given the inputs of the module, `[adapters, rows, in]`.
    """

    on_host: ClassVar[bool]
    needs_inputs: ClassVar[bool]

    def natural_rank(self, ranks: tuple[int, ...]) -> int:
        """The rank of the result where none is asked for."""
        ...

    def __call__(self, pool: Pool, weights: Any, rank: int, key: Any, inputs: Any = None) -> Merged:
        """Return the merged module, of exactly this rank."""
        ...


@partial(
    jax.tree_util.register_dataclass, data_fields=["pool", "weights", "key", "inputs"], meta_fields=["method", "rank"]
)
@dataclass(frozen=True)
class _Job:
    """One module to be merged: programs are compiled for a method, a rank and the shapes of the arrays."""

    method: Method
    rank: int
    pool: Pool
    weights: Any
    key: Any
    inputs: Any


def merge_loras(
    adapters: Sequence[Adapter],
    method: Method,
    *,
    rank: int | Mapping[str, int] | None = None,
    weights: Any = None,
    key: Any = None,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Merged]:
    """Merge T adapters into one, module by module; the base model is not needed.

    The result stands for the weighted sum of the updates, `sum_t w_t b_t a_t`. An adapter without a module adds nothing
    to it. Under `jit` all methods but those with `on_host` can be traced.

    Args:
        adapters: one or more; a module has the same sizes in all of them, ranks may differ.
        method: an object of `permjax.lora.methods.METHODS`.
        rank: of all modules of the result, or of each; what is natural for the method by default. Updates of lower rank
            are filled up with zeros.
        weights: T numbers, negative ones too; 1 / T by default.
        key: for methods that draw; every module has its own stream, by its name. `jax.random.key(0)` by default.
        inputs: for methods that use data: module -> `[T, rows, in]`, the inputs of the module on each adapter's own
            data, or any other matrices with the same `X_t^T X_t`.

    Returns:
        Module name -> `Merged`, in the order in which the adapters have them.

    Raises:
        ValueError: no adapter, or weights, sizes, ranks or inputs that do not fit; names the module.

    Example:
        >>> merged = merge_loras([first, second], LoraLego(), rank=8)
    """
    weights = checked_weights(weights, len(adapters))
    key = jax.random.key(0) if key is None else key
    jobs = {}
    for name in module_names(adapters):
        pool = pool_of(name, adapters)
        size = _rank(name, pool, method, rank)
        rows = _inputs(name, pool, inputs) if method.needs_inputs else None
        jobs[name] = _Job(method, size, pool, weights, module_key(key, name), rows)
    if method.on_host:
        return {name: _merged(replace(job, pool=jax.device_get(job.pool))) for name, job in jobs.items()}
    return mapped(_merged, jobs, fetch=False)


def module_key(key: Any, name: str) -> Any:
    """The random key of one module."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def pool_of(name: str, adapters: Sequence[Adapter]) -> Pool:
    """The pieces of one module of all adapters.

    Raises:
        ValueError: the adapters do not agree on the sizes of the module.
    """
    found = [adapter.get(name) for adapter in adapters]
    first = next(one for one in found if one is not None)
    size_in, size_out = first.a.shape[1], first.b.shape[0]
    for number, one in enumerate(found):
        shapes = one and (one.a.shape, one.b.shape)
        if one is not None and shapes != ((one.a.shape[0], size_in), (size_out, one.a.shape[0])):
            message = (
                f"module {name!r}: adapter {number} has a of shape {one.a.shape} and b of shape {one.b.shape}, where "
                f"[rank, {size_in}] and [{size_out}, rank] are needed; merge adapters of one base model."
            )
            raise ValueError(message)
    kept = [one for one in found if one is not None]
    xp = jnp if any(isinstance(x, jax.Array) for one in kept for x in one) else np
    a, b = xp.concatenate([one.a for one in kept], 0), xp.concatenate([one.b for one in kept], 1)
    wide = np.result_type(np.float32, a.dtype, b.dtype)
    return Pool(a.astype(wide), b.astype(wide), tuple(0 if one is None else one.a.shape[0] for one in found))


def _rank(name: str, pool: Pool, method: Method, rank: Any) -> int:
    wanted = rank.get(name) if isinstance(rank, Mapping) else rank
    wanted = method.natural_rank(pool.ranks) if wanted is None else wanted
    if wanted < 1:
        raise ValueError(f"module {name!r} was to get rank {wanted}; a rank is at least 1.")
    return int(wanted)


def _inputs(name: str, pool: Pool, inputs: Mapping[str, Any] | None) -> Any:
    if inputs is None:
        raise ValueError("this method uses data: give the inputs of every module for each adapter as `inputs`.")
    if name not in inputs:
        raise ValueError(f"the inputs of module {name!r} are missing{tree.nearest(name, inputs)}; give all modules'.")
    rows, shape = inputs[name], np.shape(inputs[name])
    if len(shape) != 3 or (shape[0], shape[2]) != (len(pool.ranks), pool.a.shape[1]):
        message = (
            f"the inputs of module {name!r} have shape {shape} where [{len(pool.ranks)}, rows, {pool.a.shape[1]}] is "
            "needed: one matrix of rows for each adapter."
        )
        raise ValueError(message)
    return rows


def checked_weights(weights: Any, count: int) -> Any:
    """The weights of some adapters, 1 / T by default; traced ones are not checked.

    Raises:
        ValueError: there is no adapter, or the weights are not as many finite numbers, not all zero.
    """
    if count == 0:
        raise ValueError("there is no adapter to merge; give at least one.")
    if weights is None:
        return np.full(count, 1 / count, np.float32)
    if is_traced(weights):
        return weights
    values = np.asarray(weights, np.float32)
    if values.shape != (count,) or not np.isfinite(values).all() or not values.any():
        message = f"{count} adapters need as many finite weights, not all zero, but the weights are {weights}."
        raise ValueError(message)
    return values


def _merged(job: _Job) -> Merged:
    return job.method(job.pool, job.weights, job.rank, job.key, job.inputs)


def factors_of(merged: Mapping[str, Merged]) -> dict[str, Factors]:
    """The merged modules as an adapter."""
    return {name: Factors(one.a, one.b) for name, one in merged.items()}
