"""One compiled program for all modules of one shape."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from permjax.permutation import is_traced


def mapped(f: Callable[[Any], Any], modules: Mapping[str, Any], *, fetch: bool = True) -> dict[str, Any]:
    """Apply a function to every module: modules alike in structure, shapes and dtypes together, mapped and compiled.

    Args:
        f: a pure function of one pytree; compiled once for every structure and shape as long as it is the same object.
        modules: name -> pytree of arrays; they may be traced if nothing is fetched.
        fetch: whether to return NumPy arrays, else JAX arrays.

    Returns:
        Module name -> what the function returns for it, in the order of `modules`.
    """
    buckets: dict[Any, list[str]] = {}
    for name, module in modules.items():
        leaves, structure = jax.tree.flatten(module)
        kind = (structure, tuple((x.shape, x.dtype) for x in leaves))
        buckets.setdefault(kind, []).append(name)
    found: dict[str, Any] = {}
    for names in buckets.values():
        values = _run(f, jax.tree.map(_stacked, *(modules[name] for name in names)))
        values = jax.device_get(values) if fetch else values
        found |= {name: jax.tree.map(lambda x, i=i: x[i], values) for i, name in enumerate(names)}
    return {name: found[name] for name in modules}


def _stacked(*arrays: Any) -> Any:
    """Arrays stacked where they are: on the host in one copy, on the device otherwise."""
    on_host = all(isinstance(x, np.ndarray) for x in arrays)
    return jnp.asarray(np.stack(arrays)) if on_host else jnp.stack(arrays)


def _run(f: Callable[[Any], Any], stacked: Any) -> Any:
    """Let LAPACK use one thread: matrices are small here, and threads cost it up to a hundred times what they gain."""
    if is_traced(*jax.tree.leaves(stacked)):
        return _mapped(f, stacked)
    with threadpool_limits(1, "blas"):
        return jax.block_until_ready(_mapped(f, stacked))


@partial(jax.jit, static_argnums=0)
def _mapped(f: Callable[[Any], Any], stacked: Any) -> Any:
    """Apply a function to every slice of the leading axis: side by side on an accelerator, one by one on a CPU.

    On a CPU, batches gain nothing: LAPACK works on one matrix at a time. And in jaxlib 0.10 two batches of QR in one
    program may wait for each other forever.
    """
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(f, stacked) if jax.default_backend() == "cpu" else jax.vmap(f)(stacked)
