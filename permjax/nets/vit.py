"""Vision transformers with a class token and norms before the branches (Dosovitskiy et al., 2021)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from permjax.nets.base import Architecture, Net
from permjax.nets.layers import with_channel
from permjax.nets.linen import from_linen


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer: patches, class token, learned positions, pre-norm blocks, one dense head."""

    model_type: ClassVar[str] = "vit"
    input_shape: tuple[int, ...] = (32, 32, 3)
    patch: int = 4
    width: int = 192
    depth: int = 6
    heads: int = 3
    mlp: int = 768
    classes: int = 10

    def __post_init__(self) -> None:
        """Refuse images that are no whole number of patches, and widths that are no whole number of heads."""
        if any(size % self.patch for size in self.input_shape[:2]):
            raise ValueError(f"'patch' is {self.patch}, which does not divide the image {self.input_shape[:2]}.")
        if self.width % self.heads:
            raise ValueError(f"'heads' is {self.heads}, which does not divide the width {self.width}.")


class ViT(nn.Module):
    """The linen module behind `ViTConfig`."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch classes"]:
        """Logits of a batch of images."""
        config, small = self.config, nn.initializers.normal(0.02)
        patch = (config.patch, config.patch)
        x = nn.Conv(config.width, patch, patch, padding="VALID", name="embedding")(with_channel(x))
        x = x.reshape(x.shape[0], -1, config.width)
        token = self.param("class_token", small, (1, 1, config.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, config.width)), x], axis=1)
        x = x + self.param("positions", small, (1, *x.shape[1:]))
        for _ in range(config.depth):
            x = Block(config.heads, config.mlp)(x)
        return nn.Dense(config.classes, name="head")(nn.LayerNorm()(x[:, 0]))


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and added to the stream."""

    heads: int
    mlp: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """The stream after the block."""
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        hidden = jax.nn.gelu(nn.Dense(self.mlp)(nn.LayerNorm()(x)), approximate=False)
        return x + nn.Dense(x.shape[-1])(hidden)


def build(config: ViTConfig) -> Net:
    """The network of a configuration."""
    return from_linen(config, ViT(config), config.input_shape)


ARCHITECTURE = Architecture(ViTConfig, build)
