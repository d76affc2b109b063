"""Multilayer perceptrons."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from permjax.nets.base import Architecture, Net
from permjax.nets.linen import from_linen


@dataclass(frozen=True)
class MLPConfig:
    """An MLP: flatten, then dense (LayerNorm) ReLU per hidden width, then the dense head."""

    model_type: ClassVar[str] = "mlp"
    input_shape: tuple[int, ...] = (8, 8)
    hidden: tuple[int, ...] = (512, 512, 512)
    classes: int = 10
    norm: Literal["none", "layer"] = "none"


class MLP(nn.Module):
    """The linen module behind `MLPConfig`."""

    config: MLPConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch classes"]:
        """Logits of a batch of inputs of any shape."""
        x = x.reshape(x.shape[0], -1)
        for width in self.config.hidden:
            x = nn.Dense(width)(x)
            if self.config.norm == "layer":
                x = nn.LayerNorm()(x)
            x = jax.nn.relu(x)
        return nn.Dense(self.config.classes)(x)


def build(config: MLPConfig) -> Net:
    """The network of a configuration."""
    return from_linen(config, MLP(config), config.input_shape)


ARCHITECTURE = Architecture(MLPConfig, build)
