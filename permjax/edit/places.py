"""Where an edit writes: the second matrix of a block's MLP, with its layout and the names of what goes in and out."""

from dataclasses import dataclass
from typing import Any, Literal

from permjax.nets.gpt import GPT2Config
from permjax.nets.llama import LlamaConfig


@dataclass(frozen=True)
class MlpPlace:
    """The second matrix of one MLP, which maps keys to values.

    Attributes:
        weight: the name of the leaf in the parameters.
        orientation: `"in_out"` if the leaf is [key, value] (GPT-2), `"out_in"` if it is [value, key] (Llama). It is
            never guessed from the shape: the matrix may be square.
        key: the hook name of the matrix's input.
        value: the hook name of its output, a bias included.
        block: the hook name of the residual stream after the block.
    """

    weight: str
    orientation: Literal["in_out", "out_in"]
    key: str
    value: str
    block: str


def layer_count(config: Any) -> int:
    """How many blocks the model of a configuration has.

    Raises:
        ValueError: the configuration is not one of GPT-2 or Llama.
    """
    match config:
        case GPT2Config():
            return config.n_layer
        case LlamaConfig():
            return config.num_hidden_layers
    message = f"A model of type {getattr(config, 'model_type', type(config).__name__)!r} cannot be edited: "
    raise ValueError(message + "the editors know the MLPs of 'gpt2' and 'llama'.")


def mlp_place(config: Any, layer: int) -> MlpPlace:
    """The place of one layer.

    Args:
        config: a `GPT2Config` or `LlamaConfig`.
        layer: 0 is the first block.

    Raises:
        ValueError: there is no such layer, or the model has no such MLP.

    Example:
        >>> mlp_place(GPT2Config(), 3).weight
        'h.3.mlp.c_proj.weight'
    """
    count = layer_count(config)
    if not 0 <= layer < count:
        message = f"Layer {layer} is to be edited, but the model has {count} layers; "
        raise ValueError(message + f"choose one of 0 to {count - 1}.")
    if isinstance(config, GPT2Config):
        block, name, orientation, prefix = f"h.{layer}", "c_proj", "in_out", config.prefix
    else:
        block, name, orientation, prefix = f"layers.{layer}", "down_proj", "out_in", "model."
    matrix = f"{block}.mlp.{name}"
    return MlpPlace(f"{prefix}{matrix}.weight", orientation, f"{matrix}:in", f"{matrix}:out", block)
