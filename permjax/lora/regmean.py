"""A merge that knows the inputs of the modules: least squares between outputs, within the span of the adapters."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from permjax.lora.base import Base
from permjax.lora.core import Core, core_of, lifted, matmul, truncated, updates
from permjax.lora.kernels import directed
from permjax.lora.pool import Factors, Merged, Pool


@dataclass(frozen=True)
class RegMean(Base):
    """The update of its rank whose outputs are nearest to those of every adapter on the adapter's own inputs.

    `min_D sum_t |w_t| (|X_t (D - dW_t)^T|_F^2 + e |D - dW_t|_F^2)` over the updates D of some rank in the span of the
    adapters (columns of all b, rows of all a), where `X_t` are the inputs and e is the ridge. Without a limit on the
    rank the solution is `(sum_t |w_t| M_t H_t) (sum_t |w_t| H_t)^-1` in the core, `H_t` the Gram matrix of the inputs
    there, ridge included; with it, the best approximation of that in the norm of `sum_t |w_t| H_t`. Solved by one QR of
    all inputs, which does not square their condition as Gram matrices do.

    Weights are those of the objective: a common factor changes nothing. A negative one negates the adapter. One
    adapter, and T equal ones, give that adapter.

    Attributes:
        ridge: in parts of the mean diagonal entry of `H_t` over all adapters.

    Source:
        Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023, equation 2. The span,
        the rank and the ridge (in place of smaller off-diagonal entries) are ours.
    """

    needs_inputs: ClassVar[bool] = True
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        if self.ridge <= 0:
            raise ValueError(f"ridge must be positive, not {self.ridge}: inputs may have fewer rows than ranks.")

    def __call__(
        self, pool: Pool, weights: Float[Array, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module; `inputs` are `[adapters, rows, in]`."""
        del key
        pool, root = directed(pool, weights), jnp.sqrt(jnp.abs(jnp.asarray(weights, pool.a.dtype)))
        core = core_of(pool)
        rows = self._rows(core, jnp.asarray(inputs, pool.a.dtype)) * root[:, None, None]
        targets = matmul(rows, updates(core, pool).swapaxes(1, 2))
        basis, half = jnp.linalg.qr(jnp.concatenate([*rows], 0))
        found = truncated(matmul(basis.T, jnp.concatenate([*targets], 0)).T, rank)
        a = jax.scipy.linalg.solve_triangular(half, found.a.T).T
        return Merged(*lifted(core, Factors(a, found.b)))

    def _rows(self, core: Core, inputs: Float[Array, "adapters rows in"]) -> Float[Array, "adapters more q"]:
        """Return the inputs of all adapters in the core, and rows that stand for the ridge."""
        rows = matmul(inputs, core.right)
        adapters, _, size = rows.shape
        level = jnp.sum(rows**2) / (adapters * size)
        level = jnp.sqrt(self.ridge * jnp.where(level > 0, level, 1.0))
        ridge = jnp.broadcast_to(level * jnp.eye(size, dtype=rows.dtype), (adapters, size, size))
        return jnp.concatenate([rows, ridge], 1)
