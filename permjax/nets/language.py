"""What the language models share: pure functions over flat dicts with Hugging Face names."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from permjax.nets.base import Net, stateless
from permjax.tree import nearest

Weights = Mapping[str, Array]

Hook: TypeAlias = Callable[[str, Array], Array]
"""`hook(name, activation)` returns what the model goes on with: the same to look at it, another to inject it."""

CACHED = (":key", ":value")
"""How the names of keys and values of attention end; a hook that puts earlier ones before them is a cache."""

# Keys of Hugging Face configurations that leave the logits of evaluation mode alone.
IGNORED_KEYS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "_num_labels",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "max_length",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_cache",
    }
)

_EXAMPLE_TOKENS = 16  # at most, in `example_inputs`


def language_model(
    config: Any,
    apply: Callable[..., Array],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    positions: int,
    scale: Callable[[str], float],
) -> Net:
    """A language model as a network.

    Args:
        config: the configuration to keep; its `vocab_size` bounds the example tokens.
        apply: `apply(config, params, tokens) -> logits`; what it takes by keyword, the network's `apply` takes as well.
        shapes: the shape of every weight by name.
        positions: the longest sequence of tokens.
        scale: the standard deviation of a weight of two axes at the start, by name; other weights start at one, and
            biases at zero.
    """

    def init(key: Array) -> dict[str, Array]:
        drawn = [name for name, shape in shapes.items() if len(shape) > 1]
        ends = np.cumsum([np.prod(shapes[name]) for name in drawn])
        pieces = dict(zip(drawn, jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1]), strict=True))
        return {
            name: scale(name) * pieces[name].reshape(shape)
            if name in pieces
            else jnp.full(shape, 0.0 if name.endswith("bias") else 1.0, jnp.result_type(float))
            for name, shape in shapes.items()
        }

    def example_inputs(batch: int) -> tuple[Array]:
        length = min(_EXAMPLE_TOKENS, positions)
        return (jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length) % config.vocab_size,)

    def apply_config(params: Weights, tokens: Array, **context: Any) -> Array:
        return apply(config, params, tokens, **context)

    return stateless(config, init, apply_config, example_inputs)


def unchanged(name: str, value: Array) -> Array:
    """The hook that leaves every activation as it is."""
    del name
    return value


def record(
    apply: Callable[..., Array],
    params: Weights,
    tokens: Int[Array, "batch tokens"],
    names: Collection[str] | None = None,
    *,
    hook: Hook = unchanged,
    **context: Any,
) -> tuple[Float[Array, "batch predicted vocabulary"], dict[str, Array]]:
    """Logits, and activations by name.

    Args:
        apply: of a language model.
        params: the weights by name.
        tokens: numbers of tokens.
        names: the activations that are asked for; the `apply` of each architecture says which there are. By default
            all of them.
        hook: is called before; what it returns is recorded.
        **context: what else `apply` takes.

    Raises:
        ValueError: the model has no activation of that name.

    Example:
        >>> logits, seen = record(net.apply, params, tokens, ["h.0"])
        >>> seen["h.0"].shape
        (2, 16, 768)
    """
    seen: dict[str, Array] = {}

    def see(name: str, value: Array) -> Array:
        seen[name] = hook(name, value)
        return seen[name]

    logits = apply(params, tokens, hook=see, **context)
    asked = seen if names is None else names
    for name in asked:
        if name not in seen:
            raise ValueError(f"The model has no activation {name!r}{nearest(name, seen)}.")
    return logits, {name: seen[name] for name in asked}


def check_length(tokens: Int[Array, "batch tokens"], positions: int) -> None:
    """Refuse sequences that are longer than the positions the model knows."""
    if tokens.shape[1] > positions:
        message = f"The sequences have {tokens.shape[1]} tokens, but the model has {positions} positions; "
        raise ValueError(message + "cut them into shorter pieces.")


def masked_softmax(
    scores: Float[Array, "batch *heads queries keys"], visible: Bool[Array, "batch queries keys"] | None = None
) -> Float[Array, "batch *heads queries keys"]:
    """Attention weights in which a query sees the keys that are visible to it: by default, no later one."""
    if visible is None:
        visible = jnp.tri(*scores.shape[-2:], dtype=bool)[None]
    visible = visible.reshape((len(visible), *(1,) * (scores.ndim - 3), *visible.shape[1:]))
    return jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(scores.dtype).min), axis=-1)


def widen(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Half precision to float32, wider floats as they are: for statistics over a long axis."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
