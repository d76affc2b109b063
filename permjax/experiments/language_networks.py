"""Small language models of the two layouts that experiments train themselves."""

from dataclasses import dataclass
from typing import Literal

from permjax.nets.base import Net
from permjax.nets.gpt import GPT2Config
from permjax.nets.llama import LlamaConfig
from permjax.nets.registry import build

Layout = Literal["gpt2", "llama"]


@dataclass(frozen=True)
class SizeConfig:
    """The size of a model, whatever its layout.

    Attributes:
        layers: number of blocks.
        width: of the residual stream.
        heads: number of query heads.
        kv_heads: number of key and value heads, of the Llama layout.
        hidden: width of a block's MLP.
    """

    layers: int = 2
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 512


def language_network(size: SizeConfig, layout: Layout, vocabulary: int, positions: int, *, tied: bool = False) -> Net:
    """A network of a layout for so many tokens and positions.

    Args:
        size: of the model.
        layout: of its weights.
        vocabulary: number of tokens.
        positions: longest sequence.
        tied: one table of tokens for input and output; the GPT-2 layout always has one.
    """
    if layout == "gpt2":
        return build(GPT2Config(vocabulary, positions, size.width, size.layers, size.heads, size.hidden))
    parts = (vocabulary, size.width, size.hidden, size.layers, size.heads, size.kv_heads)
    return build(LlamaConfig(*parts, max_position_embeddings=positions, tie_word_embeddings=tied))
