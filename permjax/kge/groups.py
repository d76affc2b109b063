"""Groups that act coordinate by coordinate; an element is a dict of arrays `[..., d]`, leading axes are a batch.

`compose(second, first)` is the element that acts like `first` and then `second`.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from permjax.permutation import is_traced

Element: TypeAlias = Mapping[str, Float[Array, "*batch d"]]
"""An element of a group, or a batch of them."""


class Translations:
    """The group (R^d, +): x -> x + shift."""

    def compose(self, second: Element, first: Element) -> dict[str, Any]:
        """The element that acts like `first`, then `second`."""
        return {"shift": second["shift"] + first["shift"]}

    def inverse(self, element: Element) -> dict[str, Any]:
        """The element that undoes this one."""
        return {"shift": -element["shift"]}

    def identity(self, like: Element) -> dict[str, Any]:
        """The element that moves nothing, of the shapes of `like`."""
        return {"shift": jnp.zeros_like(like["shift"])}


class Scalings:
    """The group (R without 0)^d: x -> scale x. A coordinate that is 0 has no inverse."""

    def compose(self, second: Element, first: Element) -> dict[str, Any]:
        """The element that acts like `first`, then `second`."""
        return {"scale": second["scale"] * first["scale"]}

    def inverse(self, element: Element) -> dict[str, Any]:
        """The element that undoes this one.

        Raises:
            ValueError: a scale is 0 (not checked under a trace).
        """
        return {"scale": 1 / _invertible(element["scale"])}

    def identity(self, like: Element) -> dict[str, Any]:
        """The element that moves nothing, of the shapes of `like`."""
        return {"scale": jnp.ones_like(like["scale"])}


class AffineMaps:
    """The group Aff(1)^d: x -> scale x + shift with scale != 0. It is not commutative."""

    def compose(self, second: Element, first: Element) -> dict[str, Any]:
        """The element that acts like `first`, then `second`: s3 = s2 s1 and m3 = s2 m1 + m2."""
        shift = second["scale"] * first["shift"] + second["shift"]
        return {"scale": second["scale"] * first["scale"], "shift": shift}

    def inverse(self, element: Element) -> dict[str, Any]:
        """The element that undoes this one, (1 / s, -m / s).

        Raises:
            ValueError: a scale is 0 (not checked under a trace).
        """
        scale = _invertible(element["scale"])
        return {"scale": 1 / scale, "shift": -element["shift"] / scale}

    def identity(self, like: Element) -> dict[str, Any]:
        """The element that moves nothing, of the shapes of `like`."""
        return {"scale": jnp.ones_like(like["scale"]), "shift": jnp.zeros_like(like["shift"])}


class SpreadAffineMaps(AffineMaps):
    """Aff(1)^d times (0, inf)^d: means move by x -> scale x + shift, deviations by x -> spread x."""

    def compose(self, second: Element, first: Element) -> dict[str, Any]:
        """The element that acts like `first`, then `second`."""
        return {**super().compose(second, first), "spread": second["spread"] * first["spread"]}

    def inverse(self, element: Element) -> dict[str, Any]:
        """The element that undoes this one.

        Raises:
            ValueError: a scale or spread is 0 (not checked under a trace).
        """
        return {**super().inverse(element), "spread": 1 / _invertible(element["spread"])}

    def identity(self, like: Element) -> dict[str, Any]:
        """The element that moves nothing, of the shapes of `like`."""
        return {**super().identity(like), "spread": jnp.ones_like(like["spread"])}


class ComplexScalings:
    """The group (C without 0)^d: x -> (real + i imag) x; unit numbers, U(1)^d, are the rotations in it."""

    def compose(self, second: Element, first: Element) -> dict[str, Any]:
        """The element that acts like `first`, then `second`."""
        a, b = second, first
        real = a["real"] * b["real"] - a["imag"] * b["imag"]
        return {"real": real, "imag": a["real"] * b["imag"] + a["imag"] * b["real"]}

    def inverse(self, element: Element) -> dict[str, Any]:
        """The element that undoes this one.

        Raises:
            ValueError: a number is 0 (not checked under a trace).
        """
        size = _invertible(element["real"] ** 2 + element["imag"] ** 2)
        return {"real": element["real"] / size, "imag": -element["imag"] / size}

    def identity(self, like: Element) -> dict[str, Any]:
        """The element that moves nothing, of the shapes of `like`."""
        return {"real": jnp.ones_like(like["real"]), "imag": jnp.zeros_like(like["imag"])}


class Quaternions:
    """The group (H without 0)^d under the Hamilton product, x -> g x. It is not commutative."""

    def compose(self, second: Element, first: Element) -> dict[str, Any]:
        """The element that acts like `first`, then `second`: the Hamilton product."""
        a, b, c, d = (second[part] for part in "rijk")
        e, f, g, h = (first[part] for part in "rijk")
        return {
            "r": a * e - b * f - c * g - d * h,
            "i": a * f + b * e + c * h - d * g,
            "j": a * g - b * h + c * e + d * f,
            "k": a * h + b * g - c * f + d * e,
        }

    def inverse(self, element: Element) -> dict[str, Any]:
        """The element that undoes this one, the conjugate over the squared norm.

        Raises:
            ValueError: a quaternion is 0 (not checked under a trace).
        """
        size = _invertible(sum(element[part] ** 2 for part in "rijk"))
        return {part: (element[part] if part == "r" else -element[part]) / size for part in "rijk"}

    def identity(self, like: Element) -> dict[str, Any]:
        """The element that moves nothing, of the shapes of `like`."""
        return {part: jnp.full_like(like[part], float(part == "r")) for part in "rijk"}


def _invertible(x: Any) -> Any:
    if not is_traced(x) and not np.all(x):
        raise ValueError("an element with a coordinate 0 is no bijection and has no inverse; move it off 0.")
    return x
