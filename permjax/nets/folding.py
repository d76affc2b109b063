"""Language models with the gains and biases of their norms folded into the linear maps behind them.

What is left are plain norms, which any orthogonal map of the residual stream passes through (for LayerNorm any that
keeps the all-ones direction), so that the stream may be turned and not only permuted.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from permjax.nets.base import Net
from permjax.nets.gpt import GPT2Config
from permjax.nets.llama import LlamaConfig
from permjax.nets.registry import build


def fold_norms(net: Net, params: Mapping[str, Any]) -> tuple[Net, dict[str, Any]]:
    """Fold the gains and biases of all norms into the linear maps that read them; the function stays the same.

    Gains become one and the head gets its own weight, as the token embedding cannot take the gain of the last norm.
    In GPT-2 also what is written into the residual stream loses its mean, which no LayerNorm sees, and so does what
    reads it. Biases become zero, but for the last one: the head has no bias into which to fold it, so it becomes the
    all-ones vector and the head's mean carries what it did.

    Args:
        net: a network of the GPT-2 or Llama layout.
        params: its weights, NumPy or JAX, in any precision.

    Returns:
        The network with an untied head, and its weights.

    Raises:
        ValueError: another architecture, or weights of another one; names it, or the weight that is missing.

    Example:
        >>> folded, weights = fold_norms(net, params)
        >>> jnp.allclose(folded.apply(weights, tokens), net.apply(params, tokens), atol=1e-4)
        True

    Source:
        Ashkboos et al., "SliceGPT", ICLR 2024, which folds norms in the same way.
    """
    kind = type(net.config).model_type
    if kind not in _FOLDS:
        message = f"Norms can be folded in the layouts {' and '.join(_FOLDS)}, not in '{kind}'; "
        raise ValueError(message + "write down its norms and the maps that read them in permjax/nets/folding.py.")
    if missing := sorted(jax.eval_shape(net.init, jax.random.key(0)).keys() - params.keys()):
        raise ValueError(f"The weights lack '{missing[0]}' of this {kind}; give the parameters of the network.")
    folded = build(replace(net.config, tie_word_embeddings=False))
    return folded, _FOLDS[kind](net.config, dict(params))


def _fold_gpt2(config: GPT2Config, params: dict[str, Any]) -> dict[str, Any]:
    def at(name: str) -> str:
        return config.prefix + name

    head = params[at("wte.weight")] if config.tie_word_embeddings else params["lm_head.weight"]
    readers = {f"h.{i}.{norm}": f"h.{i}.{reader}" for i in range(config.n_layer) for norm, reader in _GPT2.items()}
    for norm, reader in readers.items():
        gain, bias, weight = (params[at(name)] for name in (f"{norm}.weight", f"{norm}.bias", f"{reader}.weight"))
        params[at(f"{reader}.bias")] = params[at(f"{reader}.bias")] + bias @ weight
        params[at(f"{reader}.weight")] = _centred(gain[:, None] * weight, 0)
        params |= {at(f"{norm}.weight"): 0 * gain + 1, at(f"{norm}.bias"): 0 * bias}
    writers = [f"h.{i}.{part}.c_proj.{kind}" for i in range(config.n_layer) for part, kind in _WRITERS]
    for name in map(at, ("wte.weight", "wpe.weight", *writers)):
        params[name] = _centred(params[name], -1)
    gain, bias = params[at("ln_f.weight")], params[at("ln_f.bias")]
    offset = head @ bias / config.n_embd
    params["lm_head.weight"] = _centred(head * gain[None, :], -1) + offset[:, None]
    return params | {at("ln_f.weight"): 0 * gain + 1, at("ln_f.bias"): 0 * bias + 1}


def _fold_llama(config: LlamaConfig, params: dict[str, Any]) -> dict[str, Any]:
    embedding = params["model.embed_tokens.weight"]
    params = {"lm_head.weight": embedding} | params if config.tie_word_embeddings else params
    blocks = [f"model.layers.{i}." for i in range(config.num_hidden_layers)]
    readers = {b + norm: [b + name for name in names] for b in blocks for norm, names in _LLAMA.items()}
    for norm, names in (readers | {"model.norm": ["lm_head"]}).items():
        gain = params[f"{norm}.weight"]
        params |= {f"{name}.weight": params[f"{name}.weight"] * gain[None, :] for name in names}
        params[f"{norm}.weight"] = 0 * gain + 1
    return params


def _centred(x: Float[Array | np.ndarray, "..."], axis: int) -> Float[Array | np.ndarray, "..."]:
    return x - x.mean(axis=axis, keepdims=True)


_GPT2 = {"ln_1": "attn.c_attn", "ln_2": "mlp.c_fc"}
_WRITERS = [(part, kind) for part in ("attn", "mlp") for kind in ("weight", "bias")]
_LLAMA = {
    "input_layernorm": [f"self_attn.{kind}_proj" for kind in "qkv"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
}
_FOLDS: Mapping[str, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {"gpt2": _fold_gpt2, "llama": _fold_llama}
