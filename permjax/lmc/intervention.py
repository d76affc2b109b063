"""Models of which only some singular directions are kept, or aligned: what carries a barrier?"""

from typing import NamedTuple

from jaxtyping import PyTree

from permjax import tree
from permjax.lmc.matrices import Patterns, Triplets, decompose, matrices, part, with_matrices
from permjax.symmetry.spec import PermutationSpec


class Split(NamedTuple):
    """Two models that complement each other in singular directions.

    Attributes:
        top: the model of the k largest singular directions of every matrix.
        rest: the model of all others.
    """

    top: PyTree
    rest: PyTree


def truncate(spec: PermutationSpec, model: PyTree, k: int, leaves: Patterns = "*") -> Split:
    """The model cut between its singular directions: W = [sum_{i<=k} s_i u_i v_i^T] + [sum_{i>k} s_i u_i v_i^T].

    Permuting units commutes with the cut. So the models can be matched by one part alone, and the permutation found
    applied to the whole model, whose function it keeps: an intervention on matching, with barriers as usual.

    Args:
        spec: the symmetry.
        model: a pytree.
        k: directions of every matrix to keep in `top`; a matrix that has no more goes there whole.
        leaves: patterns of the leaves that are cut (`fnmatch`); all others, biases among them, are in both parts whole.

    Raises:
        ValueError: k is negative, or what `matrices` refuses.

    Example:
        >>> tops = [truncate(spec, model, 16).top for model in (a, b)]
        >>> plan = weight_matching(spec, tops, key=key).plan
        >>> aligned = permute(spec, plan.permutations(1), b)
    """
    found = _decomposed(spec, model, k, leaves)
    top = {name: part(triplets, 0, k) for name, triplets in found.items()}
    rest = {name: part(triplets, k, None) for name, triplets in found.items()}
    return Split(*(with_matrices(spec, model, new, leaves) for new in (top, rest)))


def intervene(spec: PermutationSpec, b: PyTree, aligned: PyTree, k: int, leaves: Patterns = "*") -> Split:
    """Mix a model with its own permuted copy: only the k largest singular directions aligned, or only the others.

    With s_i u_i v_i^T the triplets of W_b, and P, Q the permutations of its rows and columns:

    - top:  W = sum_{i<=k} s_i (P u_i)(Q v_i)^T + sum_{i>k} s_i u_i v_i^T
    - rest: W = sum_{i<=k} s_i u_i v_i^T + sum_{i>k} s_i (P u_i)(Q v_i)^T

    All other leaves, biases among them, are those of the aligned model in both. At k = 0 `top` has the matrices of b
    and `rest` is the aligned model; from k = the largest rank on it is the other way round. In between, neither has
    the function of b: the two parts speak of units in different orders, and the singular values of the sum are no
    longer those of b. So compare the loss half way from a to such a model with the mean loss of a and b, not with that
    of its own ends; an intervention that keeps the function is `truncate`.

    Args:
        spec: the symmetry.
        b: the model in its own order.
        aligned: the same model, permuted.
        k: directions of every matrix that are swapped.
        leaves: patterns of the leaves that are mixed (`fnmatch`).

    Raises:
        ValueError: k is negative, the two models differ in structure, or what `matrices` refuses.
    """
    tree.check_same_structure([b, aligned])
    own, other = (_decomposed(spec, model, k, leaves) for model in (b, aligned))
    top = {name: part(other[name], 0, k) + part(own[name], k, None) for name in own}
    rest = {name: part(own[name], 0, k) + part(other[name], k, None) for name in own}
    return Split(*(with_matrices(spec, aligned, new, leaves) for new in (top, rest)))


def _decomposed(spec: PermutationSpec, model: PyTree, k: int, leaves: Patterns) -> dict[str, Triplets]:
    if k < 0:
        raise ValueError(f"k counts singular directions from the largest on, so it cannot be {k}.")
    return {name: decompose(w) for name, w in matrices(spec, model, leaves).items()}
