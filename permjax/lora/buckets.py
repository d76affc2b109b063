"""One compiled program for all modules of one shape."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits


def each(f: Callable[..., Any], *stacked: Any) -> Any:
    """Apply a function to every slice of the leading axis: side by side on an accelerator, one by one on a CPU.

    On a CPU, batches gain nothing: LAPACK works on one matrix at a time. And in jaxlib 0.10 two batches of QR in one
    program may wait for each other forever.
    """
    with jax.default_matmul_precision("highest"):
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda slices: f(*slices), stacked)
        return jax.vmap(f)(*stacked)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let LAPACK use one thread: matrices are small here, and threads cost it up to a hundred times what they gain."""
    with threadpool_limits(1, "blas"):
        yield


def mapped(f: Callable[[Any], Any], modules: Mapping[str, Any]) -> dict[str, Any]:
    """Apply a function to every module: modules alike in structure, shapes and dtypes together, mapped and compiled.

    Args:
        f: a pure function of one pytree; compiled once for every shape as long as it is the same object.
        modules: name -> pytree of arrays.

    Returns:
        Module name -> what the function returns for it, as NumPy arrays, in the order of `modules`.
    """
    buckets: dict[Any, list[str]] = {}
    for name, module in modules.items():
        leaves, structure = jax.tree.flatten(module)
        kind = (structure, tuple((x.shape, x.dtype) for x in leaves))
        buckets.setdefault(kind, []).append(name)
    found: dict[str, Any] = {}
    for names in buckets.values():
        stacked = jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *(modules[name] for name in names))
        with one_thread():
            values = jax.device_get(_mapped(f, jax.tree.map(jnp.asarray, stacked)))
        found |= {name: jax.tree.map(lambda x, i=i: x[i], values) for i, name in enumerate(names)}
    return {name: found[name] for name in modules}


@partial(jax.jit, static_argnums=0)
def _mapped(f: Callable[[Any], Any], stacked: Any) -> Any:
    return each(f, stacked)
