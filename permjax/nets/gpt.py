"""GPT-2 as a pure function over a flat dict with Hugging Face names and layouts (Radford et al., 2019)."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from permjax.nets.base import Architecture, Net
from permjax.nets.language import (
    IGNORED_KEYS,
    Hook,
    Weights,
    check_length,
    language_model,
    masked_softmax,
    unchanged,
    widen,
)


@dataclass(frozen=True)
class GPT2Config:
    """GPT-2 with the field names of its `config.json`.

    Attributes:
        vocab_size: number of tokens.
        n_positions: longest sequence.
        n_embd: width of the residual stream.
        n_layer: number of blocks.
        n_head: number of heads.
        n_inner: hidden width of a block's MLP; four times `n_embd` by default.
        layer_norm_epsilon: added to variances.
        tie_word_embeddings: whether the head is the token embedding; else there is `lm_head.weight`.
        prefix: what stands before the names of all other weights: `""`, or `"transformer."` as a saved model with a
            head has it.
    """

    model_type: ClassVar[str] = "gpt2"
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    prefix: str = ""

    def __post_init__(self) -> None:
        """Refuse widths that are no whole number of heads, and foreign prefixes."""
        if self.n_embd % self.n_head:
            raise ValueError(f"'n_head' is {self.n_head}, which does not divide 'n_embd', {self.n_embd}.")
        if self.prefix not in ("", "transformer."):
            raise ValueError(f"'prefix' must be '' or 'transformer.', not {self.prefix!r}.")

    @property
    def positions(self) -> int:
        """Longest sequence."""
        return self.n_positions

    @property
    def inner(self) -> int:
        """Hidden width of a block's MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


def shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by name."""
    width, inner = config.n_embd, config.inner
    table = {"wte.weight": (config.vocab_size, width), "wpe.weight": (config.n_positions, width)}
    for i in range(config.n_layer):
        table |= _norm(f"h.{i}.ln_1", width) | _dense(f"h.{i}.attn.c_attn", width, 3 * width)
        table |= _dense(f"h.{i}.attn.c_proj", width, width) | _norm(f"h.{i}.ln_2", width)
        table |= _dense(f"h.{i}.mlp.c_fc", width, inner) | _dense(f"h.{i}.mlp.c_proj", inner, width)
    table |= _norm("ln_f", width)
    head = {} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, width)}
    return {config.prefix + name: shape for name, shape in table.items()} | head


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _dense(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}


def apply(
    config: GPT2Config,
    params: Weights,
    tokens: Int[Array, "batch tokens"],
    *,
    positions: Int[Array, "batch tokens"] | None = None,
    visible: Bool[Array, "batch tokens keys"] | None = None,
    hook: Hook = unchanged,
) -> Float[Array, "batch predicted vocabulary"]:
    """Logits of the next token at each position.

    Args:
        config: the configuration.
        params: the weights by name.
        tokens: numbers of tokens.
        positions: the position of each token, less than the length; 0, 1, 2 ... by default. Where several documents
            share a row, the place in its own one.
        visible: which token (third axis) each token (second axis) may attend to; by default all but later ones.
        hook: is given named activations and returns what is used in their place: the residual stream before the first
            block, "embed" [batch, tokens, features], "h.{i}.attn:key" and "h.{i}.attn:value"
            [batch, tokens, heads, width of a head], which it may make longer or shorter if `visible` fits,
            "h.{i}.mlp.c_proj:in" and "h.{i}.mlp.c_proj:out" [batch, tokens, features], and the residual stream after a
            block, "h.{i}", of which it may keep some tokens only after the last block, so that only these are
            predicted. Names have no prefix.
    """
    check_length(tokens, config.n_positions)

    def weight(name: str) -> Array:
        return params[config.prefix + name]

    norm = functools.partial(_layer_norm, weight, epsilon=config.layer_norm_epsilon)
    places = jnp.take(weight("wpe.weight"), jnp.arange(tokens.shape[1]) if positions is None else positions, axis=0)
    x = hook("embed", jnp.take(weight("wte.weight"), tokens, axis=0) + (places[None] if positions is None else places))
    for i in range(config.n_layer):
        x = x + _attention(config, weight, f"h.{i}.attn", norm(f"h.{i}.ln_1", x), visible, hook)
        x = hook(f"h.{i}", x + _mlp(weight, f"h.{i}.mlp", norm(f"h.{i}.ln_2", x), hook))
    head = weight("wte.weight") if config.tie_word_embeddings else params["lm_head.weight"]
    return jnp.einsum("btd,vd->btv", norm("ln_f", x), head)


def _attention(
    config: GPT2Config, weight: Callable[[str], Array], name: str, x: Array, visible: Array | None, hook: Hook
) -> Array:
    batch, tokens, width = x.shape
    heads = (batch, tokens, config.n_head, width // config.n_head)
    query, key, value = (part.reshape(heads) for part in jnp.split(_conv1d(weight, f"{name}.c_attn", x), 3, axis=-1))
    key, value = hook(f"{name}:key", key), hook(f"{name}:value", value)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(heads[-1])
    mixed = jnp.einsum("bhqk,bkhd->bqhd", masked_softmax(scores, visible), value)
    return _conv1d(weight, f"{name}.c_proj", mixed.reshape(batch, tokens, width))


def _mlp(weight: Callable[[str], Array], name: str, x: Array, hook: Hook) -> Array:
    hidden = hook(f"{name}.c_proj:in", jax.nn.gelu(_conv1d(weight, f"{name}.c_fc", x), approximate=True))
    return hook(f"{name}.c_proj:out", _conv1d(weight, f"{name}.c_proj", hidden))


def _conv1d(weight: Callable[[str], Array], name: str, x: Array) -> Array:
    return x @ weight(f"{name}.weight") + weight(f"{name}.bias")[None, None, :]


def _layer_norm(weight: Callable[[str], Array], name: str, x: Array, *, epsilon: float) -> Array:
    wide = widen(x)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    normal = (centred * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)
    return normal * weight(f"{name}.weight")[None, None, :] + weight(f"{name}.bias")[None, None, :]


def build(config: GPT2Config) -> Net:
    """The network of a configuration; what is added to the residual stream starts smaller with depth."""

    def scale(name: str) -> float:
        return 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02

    return language_model(config, apply, shapes(config), positions=config.n_positions, scale=scale)


ARCHITECTURE = Architecture(
    GPT2Config,
    build,
    ignored=IGNORED_KEYS
    | {"attn_pdrop", "embd_pdrop", "n_ctx", "output_past", "resid_pdrop", "summary_activation"}
    | {"summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"},
    fixed={
        "activation_function": ("gelu_new",),
        "add_cross_attention": (False,),
        "reorder_and_upcast_attn": (False,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "scale_attn_weights": (True,),
    },
)
