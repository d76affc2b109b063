"""Training low-rank updates of a model's matrices in the place of the matrices (Hu et al., ICLR 2022)."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from permjax.lora.pool import Factors
from permjax.nets.base import Net, stateless

Weights = Mapping[str, Array]


def lora_net(net: Net, params: Weights, *, rank: int = 8, alpha: float = 16.0, targets: str = "*") -> Net:
    """A network that learns `W + alpha / rank * b a` for each matrix `W` whose name fits.

    Its `init(key) -> {name: Factors}` draws `a` and leaves `b` zero, so that nothing changes at the start; its
    `apply(updates, tokens, frozen=params, **context)` gives logits. `permjax.reversal.training.train` trains it, given
    the model as `frozen`.

    Args:
        net: a language model.
        params: its weights, of which only names and shapes count.
        rank: of the updates.
        alpha: `alpha / rank` is their scale.
        targets: a pattern for names, such as `*attn*`; embeddings and heads never fit.

    Raises:
        ValueError: no name fits, or the rank is not positive.
    """
    shapes = {name: leaf.shape for name, leaf in params.items() if _fits(name, leaf, targets)}
    if not shapes or rank < 1:
        matrices = [name for name, leaf in params.items() if _fits(name, leaf, "*")]
        message = f"No update of rank {rank} is possible for names like {targets!r}; give a rank of 1 or more, and "
        raise ValueError(message + f"a pattern of names such as {matrices[0] if matrices else 'none'!r}.")

    def init(key: Array) -> dict[str, Factors]:
        keys = jax.random.split(key, len(shapes))
        return {
            name: Factors(
                jax.random.normal(one, (rank, columns)) / math.sqrt(columns), jnp.zeros((rows, rank), jnp.float32)
            )
            for one, (name, (rows, columns)) in zip(keys, shapes.items(), strict=True)
        }

    def apply(updates: Mapping[str, Factors], tokens: Array, *, frozen: Weights, **context: Any) -> Array:
        return net.apply(with_updates(frozen, updates, alpha / rank), tokens, **context)

    return stateless((net.config, targets, rank, alpha), init, apply, net.example_inputs)


def with_updates(params: Weights, updates: Mapping[str, Factors], scale: float) -> dict[str, Array]:
    """The weights with `scale * b a` added where there is an update, in the layout and dtype of each leaf.

    Args:
        params: the weights by name.
        updates: factors `a [rank, columns]`, `b [rows, rank]` for leaves `[rows, columns]`.
        scale: of all.
    """
    changed = {
        name: (params[name] + scale * jnp.matmul(one.b, one.a).astype(params[name].dtype)).astype(params[name].dtype)
        for name, one in updates.items()
    }
    return {**params, **changed}


def peft_modules(updates: Mapping[str, Factors], scale: float, *, transposed: bool) -> dict[str, Factors]:
    """The updates as modules of a PEFT adapter of scale 1: `b a` is `[out, in]`, as for `torch.nn.Linear`.

    Args:
        updates: by the names of leaves.
        scale: theirs.
        transposed: whether leaves are `[in, out]`, as GPT-2 has them.
    """
    found = {}
    for name, one in updates.items():
        a, b = (one.b.T, one.a.T) if transposed else (one.a, one.b)
        found[name.removesuffix(".weight")] = Factors(a, scale * b)
    return found


def _fits(name: str, leaf: Any, targets: str) -> bool:
    inner = not any(part in name for part in ("wte", "wpe", "embed", "lm_head"))
    return leaf.ndim == 2 and inner and fnmatchcase(name, targets)
