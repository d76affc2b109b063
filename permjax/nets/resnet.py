"""Residual networks (He et al., 2016): the small ones of CIFAR and the bottleneck ones of ImageNet."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from permjax.nets.base import Architecture, Net
from permjax.nets.layers import normalise, with_channel
from permjax.nets.linen import from_linen

_EXPANSION = 4  # of a bottleneck block


@dataclass(frozen=True)
class ResNetConfig:
    """A residual network; the default is ResNet-20 for CIFAR.

    ResNet-50 is `ResNetConfig(input_shape=(224, 224, 3), channels=(64, 128, 256, 512), blocks=(3, 4, 6, 3),
    classes=1000, norm="batch", block="bottleneck", stem="imagenet")`.

    Attributes:
        input_shape: of one image.
        channels: per stage, before the width multiplier; stages after the first halve the image.
        blocks: per stage.
        width: multiplies all channels.
        classes: number of logits.
        norm: LayerNorm over channels at each position, or BatchNorm.
        block: two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1 with four times the channels at the end.
        stem: one 3 x 3 convolution (`cifar`), the same with stride 2 (`strided`), or 7 x 7 with stride 2 and a pool
            (`imagenet`).
    """

    model_type: ClassVar[str] = "resnet"
    input_shape: tuple[int, ...] = (32, 32, 3)
    channels: tuple[int, ...] = (16, 32, 64)
    blocks: tuple[int, ...] = (3, 3, 3)
    width: int = 1
    classes: int = 10
    norm: Literal["layer", "batch"] = "layer"
    block: Literal["basic", "bottleneck"] = "basic"
    stem: Literal["cifar", "strided", "imagenet"] = "cifar"

    def __post_init__(self) -> None:
        """Refuse stages without channels or blocks."""
        if len(self.channels) != len(self.blocks):
            message = f"'channels' names {len(self.channels)} stages and 'blocks' {len(self.blocks)}; "
            raise ValueError(message + "give one number per stage in both.")


class ResNet(nn.Module):
    """The linen module behind `ResNetConfig`."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."], train: bool = False) -> Float[Array, "batch classes"]:
        """Logits of a batch of images."""
        config = self.config
        block = BasicBlock if config.block == "basic" else Bottleneck
        x = self._stem(with_channel(x), train)
        for stage, (channels, blocks) in enumerate(zip(config.channels, config.blocks, strict=True)):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                x = block(channels * config.width, stride, config.norm)(x, train)
        return nn.Dense(config.classes)(x.mean(axis=(1, 2)))

    def _stem(self, x: Array, train: bool) -> Array:
        channels = self.config.channels[0] * self.config.width
        if self.config.stem != "imagenet":
            stride = 2 if self.config.stem == "strided" else 1
            return jax.nn.relu(normalise(nn.Conv(channels, (3, 3), stride)(x), self.config.norm, train=train))
        x = nn.Conv(channels, (7, 7), 2, padding=3)(x)
        x = jax.nn.relu(normalise(x, self.config.norm, train=train))
        return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]


class Residual(nn.Module):
    """What both kinds of block have in common: the shortcut, the sum and the last ReLU."""

    channels: int
    stride: int
    norm: Literal["layer", "batch"]

    def _conv(self, x: Array, channels: int, size: int, stride: int, train: bool) -> Array:
        return normalise(nn.Conv(channels, (size, size), stride)(x), self.norm, train=train)

    def _join(self, x: Array, branch: Array, train: bool) -> Array:
        if x.shape != branch.shape:
            x = self._conv(x, branch.shape[-1], 1, self.stride, train)
        return jax.nn.relu(x + branch)


class BasicBlock(Residual):
    """Two 3 x 3 convolutions."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """The block's output for its input."""
        branch = jax.nn.relu(self._conv(x, self.channels, 3, self.stride, train))
        return self._join(x, self._conv(branch, self.channels, 3, 1, train), train)


class Bottleneck(Residual):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, the last with four times the channels."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """The block's output for its input."""
        branch = jax.nn.relu(self._conv(x, self.channels, 1, 1, train))
        branch = jax.nn.relu(self._conv(branch, self.channels, 3, self.stride, train))
        return self._join(x, self._conv(branch, _EXPANSION * self.channels, 1, 1, train), train)


def build(config: ResNetConfig) -> Net:
    """The network of a configuration."""
    return from_linen(config, ResNet(config), config.input_shape, running=config.norm == "batch")


ARCHITECTURE = Architecture(ResNetConfig, build)
