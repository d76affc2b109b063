"""The pieces that the convolutional networks share."""

from typing import Literal

from flax import linen as nn
from jaxtyping import Array, Float

Norm = Literal["none", "layer", "batch"]

MOMENTUM = 0.9
"""Share of the old running statistics that BatchNorm keeps at every training step."""


def normalise(x: Float[Array, "batch ..."], norm: Norm, *, train: bool) -> Float[Array, "batch ..."]:
    """A new normalisation layer of the enclosing linen module, applied; over channels at each position for `layer`."""
    if norm == "batch":
        return nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(x)
    return nn.LayerNorm()(x) if norm == "layer" else x


def with_channel(x: Float[Array, "batch ..."]) -> Float[Array, "batch height width channels"]:
    """Grey images [batch, height, width] get their channel axis; images that have one are left alone."""
    return x[..., None] if x.ndim == 3 else x
