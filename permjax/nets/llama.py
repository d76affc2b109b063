"""Llama as a pure function over a flat dict with Hugging Face names and layouts (Touvron et al., 2023)."""

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from permjax.config import ConfigError
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
class LlamaConfig:
    """Llama with the field names of its `config.json`.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        intermediate_size: hidden width of a block's gated MLP.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads; as many as query heads by default.
        head_dim: width of a head; `hidden_size / num_attention_heads` by default.
        max_position_embeddings: longest sequence.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to mean squares.
        attention_bias: whether the four projections of attention have biases.
        tie_word_embeddings: whether the head is the token embedding; else there is `lm_head.weight`.
    """

    model_type: ClassVar[str] = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Refuse heads that do not divide."""
        heads = self.num_attention_heads
        if heads % self.kv_heads:
            message = f"'num_key_value_heads' is {self.kv_heads}, which does not divide "
            raise ValueError(message + f"'num_attention_heads', {heads}.")
        if self.head_dim is None and self.hidden_size % heads:
            message = f"'num_attention_heads' is {heads}, which does not divide 'hidden_size', {self.hidden_size}; "
            raise ValueError(message + "give 'head_dim'.")
        if self.head_width % 2:
            raise ValueError(f"The head width is {self.head_width}; rotary positions need an even one.")

    @property
    def positions(self) -> int:
        """Longest sequence."""
        return self.max_position_embeddings

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by name."""
    width, inner = config.hidden_size, config.intermediate_size
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for i in range(config.num_hidden_layers):
        block = f"model.layers.{i}"
        table |= _attention_shapes(config, f"{block}.self_attn")
        table |= {f"{block}.mlp.{name}.weight": (inner, width) for name in ("gate_proj", "up_proj")}
        table |= {f"{block}.mlp.down_proj.weight": (width, inner)}
        table |= {f"{block}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    table["model.norm.weight"] = (width,)
    return table | ({} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, width)})


def _attention_shapes(config: LlamaConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    width = config.hidden_size
    queries = config.num_attention_heads * config.head_width
    keys = config.kv_heads * config.head_width
    sizes = {
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
    }
    biases = {f"{prefix}.{name}.bias": shape[:1] for name, shape in sizes.items() if config.attention_bias}
    return {f"{prefix}.{name}.weight": shape for name, shape in sizes.items()} | biases


def apply(
    config: LlamaConfig,
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
            block, "embed" [batch, tokens, features], "layers.{i}.self_attn:key" (rotated) and
            "layers.{i}.self_attn:value" [batch, tokens, heads, width of a head], which it may make longer or shorter if
            `visible` fits, "layers.{i}.mlp.down_proj:in" and "layers.{i}.mlp.down_proj:out" [batch, tokens, features],
            and the residual stream after a block, "layers.{i}", of which it may keep some tokens only after the last
            block, so that only these are predicted.
    """
    check_length(tokens, config.max_position_embeddings)
    norm = functools.partial(_rms_norm, params, epsilon=config.rms_norm_eps)
    x = hook("embed", jnp.take(params["model.embed_tokens.weight"], tokens, axis=0))
    rotary = _rotary(config, tokens.shape[1], positions, x.dtype)
    for i in range(config.num_hidden_layers):
        block = f"layers.{i}"
        normal = norm(f"model.{block}.input_layernorm", x)
        x = x + _attention(config, params, f"{block}.self_attn", normal, rotary, visible, hook)
        x = hook(block, x + _mlp(params, f"{block}.mlp", norm(f"model.{block}.post_attention_layernorm", x), hook))
    head = params["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return jnp.einsum("btd,vd->btv", norm("model.norm", x), head)


def _attention(
    config: LlamaConfig,
    params: Weights,
    name: str,
    x: Array,
    rotary: tuple[Array, ...],
    visible: Array | None,
    hook: Hook,
) -> Array:
    batch, tokens, _ = x.shape
    kv, width = config.kv_heads, config.head_width
    linear = functools.partial(_linear, params, bias=config.attention_bias)
    query = linear(f"model.{name}.q_proj", x).reshape(batch, tokens, kv, -1, width)
    key = linear(f"model.{name}.k_proj", x).reshape(batch, tokens, kv, width)
    value = hook(f"{name}:value", linear(f"model.{name}.v_proj", x).reshape(batch, tokens, kv, width))
    query, key = _rotate(query, rotary), hook(f"{name}:key", _rotate(key, rotary))
    scores = jnp.einsum("bqngd,bknd->bngqk", query, key) / math.sqrt(width)
    mixed = jnp.einsum("bngqk,bknd->bqngd", masked_softmax(scores, visible), value)
    return linear(f"model.{name}.o_proj", mixed.reshape(batch, tokens, -1))


def _rotary(config: LlamaConfig, tokens: int, positions: Array | None, dtype: Any) -> tuple[Array, Array]:
    """Cosine and sine of position times frequency, each [1 or batch, tokens, head_width / 2]."""
    frequencies = config.rope_theta ** (-np.arange(0, config.head_width, 2) / config.head_width)
    if positions is None:
        angles = np.arange(tokens)[None, :, None] * frequencies[None, None, :]
        return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)
    turns = positions[:, :, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None, :]
    return jnp.cos(turns).astype(dtype), jnp.sin(turns).astype(dtype)


def _rotate(x: Float[Array, "batch tokens *heads width"], rotary: tuple[Array, ...]) -> Array:
    """Rotate each pair (i, i + width / 2) by the angle of its position and frequency."""
    cos, sin = (table.reshape(*table.shape[:2], *(1,) * (x.ndim - 3), -1) for table in rotary)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _mlp(params: Weights, name: str, x: Array, hook: Hook) -> Array:
    gate = jax.nn.silu(_linear(params, f"model.{name}.gate_proj", x))
    hidden = hook(f"{name}.down_proj:in", gate * _linear(params, f"model.{name}.up_proj", x))
    return hook(f"{name}.down_proj:out", _linear(params, f"model.{name}.down_proj", hidden))


def _linear(params: Weights, name: str, x: Array, *, bias: bool = False) -> Array:
    y = jnp.einsum("bti,oi->bto", x, params[f"{name}.weight"])
    return y + params[f"{name}.bias"][None, None, :] if bias else y


def _rms_norm(params: Weights, name: str, x: Array, *, epsilon: float) -> Array:
    wide = widen(x)
    normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + epsilon)
    return normal.astype(x.dtype) * params[f"{name}.weight"][None, None, :]


def _translate(values: dict[str, Any]) -> dict[str, Any]:
    """Newer configurations keep the rotary base in `rope_parameters`."""
    rope = values.pop("rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or rope.keys() - {"rope_type", "rope_theta"}:
        message = f"The llama configuration: 'rope_parameters' is {rope!r}, but only 'rope_theta' "
        raise ConfigError(message + "and the 'rope_type' 'default' are supported.")
    return values | {key: value for key, value in rope.items() if key == "rope_theta"}


def build(config: LlamaConfig) -> Net:
    """The network of a configuration."""
    positions = config.max_position_embeddings
    return language_model(config, apply, shapes(config), positions=positions, scale=lambda _: 0.02)


ARCHITECTURE = Architecture(
    LlamaConfig,
    build,
    ignored=IGNORED_KEYS | {"attention_dropout"},
    fixed={
        "hidden_act": ("silu",),
        "mlp_bias": (False,),
        "pretraining_tp": (1,),
        "rope_scaling": (None,),
    },
    translate=_translate,
)
