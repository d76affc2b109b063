"""Rules made exactly: relations that keep a rule because of what they are as elements of a group.

In a group of bijections some rules are identities of elements; `inverse`, `compose` and `involution` make them exact:

    identity      r(x, x):                        r = identity
    inverse       q(x, y) is r(y, x):             q = r^-1
    symmetry      r(x, y) implies r(y, x):        r r = identity
    antisymmetry  r(x, y) excludes r(y, x):       r r moves x
    composition   p(x, y), q(y, z) imply r(x, z): r = q p, in this order where the group is not commutative

A hierarchy or an intersection is none: a bijection relates every x to exactly one y, so that p implies r only where
p = r, and relations with several tails hold only nearly. The same goes for an exclusion, which is a matter of margins:
no element excludes another one, it only gives the other's tails lower scores. `permjax.kge.rules` measures
these by scores.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from permjax.kge.base import Family
from permjax.kge.flows import Nfe1Sigma
from permjax.kge.groups import AffineMaps, ComplexScalings, Element, Quaternions, Scalings, SpreadAffineMaps


def involution(family: Family, element: Element) -> dict[str, Any]:
    """An element that is its own inverse, so that its relation is symmetric: `g s g^-1` with s the reflection at 0.

    Of affine maps this is x -> 2 m - x with m the shift of g; in commutative groups it is s itself. It keeps distances
    of points, of laws under W2 (of several pieces: in the mode `exact`), and inner products, so that there (h, r, t)
    and (t, r, h) have equal scores for all h and t. Under a divergence, that is so only where t is r(h).

    Args:
        family: the family.
        element: any element g.

    Raises:
        ValueError: the group has no involution but the identity (translations, scalings of centred laws, and NFE-3 in
            the mode `exact`, whose scales are positive).
    """
    reflection = _reflection(family, family.identity(element))
    return family.compose(element, family.compose(reflection, family.inverse(element)))


def _reflection(family: Family, identity: dict[str, Any]) -> dict[str, Any]:
    positive = getattr(family, "mode", "") == "exact" and isinstance(family, SpreadAffineMaps)
    turned = {AffineMaps: "scale", Scalings: "scale", ComplexScalings: "real", Quaternions: "r"}
    part = next((part for group, part in turned.items() if isinstance(family, group)), None)
    centred = isinstance(family, Nfe1Sigma)
    if part is None or positive or centred:
        message = f"the only element of {type(family).__name__} that is its own inverse is the identity; "
        raise ValueError(message + "a symmetric relation is no more than that here.")
    return {**identity, part: -identity[part]}


def as_row(family: Family, element: Element) -> dict[str, Any]:
    """The row of the relation table that stands for an element: `family.relation(row)` is the element.

    Args:
        family: the family.
        element: one or several elements.

    Raises:
        ValueError: no row stands for it, as for a composition in NFE-3 of the mode `published`, whose table ties the
            scale of deviations to that of means, and for a quaternion or rotation of another length than one.
    """
    if family.relation_parts == ("phase",):
        row: dict[str, Any] = {"phase": jnp.arctan2(element["imag"], element["real"])}
    elif isinstance(family, SpreadAffineMaps):
        row = {"scale": jnp.log(jnp.expm1(element["spread"])), "shift": element["shift"]}
    else:
        row = dict(element)
    found = family.relation(row)
    if not all(np.allclose(found[part], element[part], rtol=1e-4, atol=1e-6) for part in element):
        name = type(family).__name__
        raise ValueError(f"no row of the relation table of {name} stands for this element; the table holds fewer.")
    return row
