"""VGG: stacks of 3 x 3 convolutions with pools, and a dense head (Simonyan and Zisserman, 2015)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from permjax.nets.base import Architecture, Net
from permjax.nets.layers import Norm, normalise, with_channel
from permjax.nets.linen import from_linen

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


@dataclass(frozen=True)
class VGGConfig:
    """A VGG network: `layers` of convolutions, `"M"` for a 2 x 2 max pool, then flatten, dense layers, head."""

    model_type: ClassVar[str] = "vgg"
    input_shape: tuple[int, ...] = (32, 32, 3)
    layers: tuple[int | str, ...] = VGG16
    hidden: tuple[int, ...] = (512, 512)
    classes: int = 10
    norm: Norm = "layer"

    def __post_init__(self) -> None:
        """Refuse layers that are neither a width nor a pool."""
        for layer in self.layers:
            if isinstance(layer, str) and layer != "M":
                raise ValueError(f"'layers' holds {layer!r}; give numbers of channels, and 'M' for a pool.")


class VGG(nn.Module):
    """The linen module behind `VGGConfig`."""

    config: VGGConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."], train: bool = False) -> Float[Array, "batch classes"]:
        """Logits of a batch of images."""
        x = with_channel(x)
        for layer in self.config.layers:
            if isinstance(layer, str):
                x = nn.max_pool(x, (2, 2), (2, 2))
            else:
                x = jax.nn.relu(normalise(nn.Conv(layer, (3, 3))(x), self.config.norm, train=train))
        x = x.reshape(x.shape[0], -1)
        for width in self.config.hidden:
            x = jax.nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.config.classes)(x)


def build(config: VGGConfig) -> Net:
    """The network of a configuration."""
    return from_linen(config, VGG(config), config.input_shape, running=config.norm == "batch")


ARCHITECTURE = Architecture(VGGConfig, build)
