"""The statistics of all layers of a merge: what owners of data can share in its place."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from permjax.merge.gram import Gram, load_grams, save_grams

Grams: TypeAlias = dict[str, tuple[Gram, ...]]
"""Layer -> its statistics: one for all models, or one for each model's own inputs and results."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What `pleas_statistics` collects; those of several data sets add up, `a + b`.

    Attributes:
        grams: layer -> its statistics.
        inputs: shapes and dtypes of one batch of inputs.
    """

    grams: Grams
    inputs: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def samples(self) -> int:
        """Number of calibration samples."""
        return max((sum(int(g.samples) for g in grams[:1]) for grams in self.grams.values()), default=0)

    def __add__(self, other: "Statistics") -> "Statistics":
        """Return the statistics of both data sets.

        Raises:
            ValueError: they are of other layers.
        """
        if self.grams.keys() != other.grams.keys():
            odd = sorted(self.grams.keys() ^ other.grams.keys())[0]
            raise ValueError(f"only one of the two statistics has the layer '{odd}'; collect both with the same plan.")
        return Statistics({n: summed(grams, other.grams[n]) for n, grams in self.grams.items()}, self.inputs)

    def save(self, path: str | Path) -> None:
        """Write the statistics as safetensors; the old file survives a failure."""
        flat = {f"{m}/{name}": gram for name, grams in self.grams.items() for m, gram in enumerate(grams)}
        shapes = [{"shape": list(x.shape), "dtype": str(x.dtype)} for x in self.inputs]
        save_grams(path, flat, {"inputs": json.dumps(shapes), "layers": json.dumps(list(self.grams))})

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read statistics written by `save`.

        Raises:
            ValueError: names the file that holds none.
        """
        flat, metadata = load_grams(path)
        try:
            shapes, layers = json.loads(metadata["inputs"]), json.loads(metadata["layers"])
            found = {name: _of(flat, name) for name in layers}
            inputs = tuple(jax.ShapeDtypeStruct(tuple(s["shape"]), jnp.dtype(s["dtype"])) for s in shapes)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' holds Grams, but not those of a whole merge ({error}).") from error
        return cls(found, inputs)


def summed(a: Sequence[Any], b: Sequence[Any]) -> tuple[Any, ...]:
    """Return the sums of the statistics of one layer, of whatever kind."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _of(flat: dict[str, Any], name: str) -> tuple[Gram, ...]:
    count = sum(key.partition("/")[2] == name for key in flat)
    return tuple(flat[f"{m}/{name}"] for m in range(count))
