"""Second moments of the keys of MLPs, collected from running text, each tied to the parameters that made it."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from permjax import tree
from permjax.edit.places import mlp_place
from permjax.files import atomic_path
from permjax.nets.base import Net
from permjax.nets.language import Weights, record

# A named axis would be one size for all batches of a list: a text comes in several.
Batch = tuple[Int[Array | np.ndarray, "_ _"], Bool[Array | np.ndarray, "_ _"]]

_HEADER = "permjax-covariances"


@dataclass(frozen=True)
class Covariance:
    """The uncentred second moment E[k k^T] of the keys of one layer.

    Attributes:
        matrix: the moment, in float64 on the host.
        count: the number of keys.
        layer: whose keys.
        fingerprint: of the parameters of the model that gave the keys.
    """

    matrix: Float[np.ndarray, "m m"]
    count: int
    layer: int
    fingerprint: str


def fingerprint(params: Any) -> str:
    """A hash of the names, types, shapes and bytes of all leaves: it changes when any value of any leaf does.

    The order of leaves, and whether they are arrays of JAX or NumPy, does not matter.
    """
    whole = hashlib.blake2b(digest_size=16)
    for name, leaf in sorted(tree.flatten(params).items()):
        array = np.ascontiguousarray(leaf)
        whole.update(f"{name} {array.dtype} {array.shape} ".encode())
        whole.update(array.reshape(-1).view(np.uint8).data)
    return whole.hexdigest()


def collect_covariances(
    net: Net, params: Weights, batches: Iterable[Batch], layers: Sequence[int]
) -> dict[int, Covariance]:
    """E[k k^T] of the inputs k of each layer's second MLP matrix, over all tokens of a text.

    The text is streamed: only sums are kept, in float64. Batches of one shape compile once.

    Args:
        net: a language model.
        params: its weights.
        batches: pairs of tokens and whether each token counts, both [n, t]; padding does not.
        layers: whose keys.

    Returns:
        The moment of each layer.

    Raises:
        ValueError: there is no such layer, or no token counts.
    """
    names = {layer: mlp_place(net.config, layer).key for layer in layers}
    sums: dict[int, Any] = dict.fromkeys(layers, 0.0)
    count = 0
    for tokens, mask in batches:
        products = _products(net.apply, tuple(names.values()), params, jnp.asarray(tokens), jnp.asarray(mask))
        sums = {layer: sums[layer] + np.asarray(products[name], np.float64) for layer, name in names.items()}
        count += int(np.sum(mask))
    if count == 0:
        raise ValueError("The text for the covariances has no token that counts; give texts of at least one token.")
    mark = fingerprint(params)
    return {layer: Covariance(total / count, count, layer, mark) for layer, total in sums.items()}


@functools.partial(jax.jit, static_argnames=("apply", "names"))
def _products(
    apply: Callable[..., Array], names: tuple[str, ...], params: Weights, tokens: Array, mask: Array
) -> dict[str, Float[Array, "m m"]]:
    _, seen = record(apply, params, tokens, names)
    products = {}
    with jax.enable_x64(True):
        for name, keys in seen.items():
            wide = jnp.where(mask[:, :, None], keys, 0).astype(jnp.float64)
            products[name] = jnp.einsum("btm,btn->mn", wide, wide)
    return products


def check(covariance: Covariance, params: Any) -> None:
    """Refuse a covariance of other parameters than these: of another model, or of this one before a change.

    Args:
        covariance: what was collected.
        params: what is to be edited.

    Raises:
        ValueError: they do not belong together.
    """
    if covariance.fingerprint != (mark := fingerprint(params)):
        message = f"The covariance of layer {covariance.layer} was collected with other parameters (fingerprint "
        message += f"{covariance.fingerprint}) than those of this model ({mark}); "
        raise ValueError(message + "collect it again with the model that is to be edited.")


def save_covariances(path: str | os.PathLike[str], covariances: Mapping[int, Covariance]) -> None:
    """Write covariances to a safetensors file, which `load_covariances` reads.

    Args:
        path: the file.
        covariances: layer -> covariance.
    """
    heads = {str(layer): [one.count, one.fingerprint] for layer, one in covariances.items()}
    arrays = {str(layer): np.ascontiguousarray(one.matrix) for layer, one in covariances.items()}
    with atomic_path(Path(path)) as temporary:
        save_file(arrays, temporary, metadata={_HEADER: json.dumps(heads)})


def load_covariances(path: str | os.PathLike[str]) -> dict[int, Covariance]:
    """The covariances of a file by `save_covariances`.

    Raises:
        ValueError: the file is no such file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            heads = json.loads((file.metadata() or {})[_HEADER])
            return {
                int(layer): Covariance(file.get_tensor(layer), count, int(layer), mark)
                for layer, (count, mark) in heads.items()
            }
    except (SafetensorError, KeyError) as error:
        message = f"{path} holds no covariances; give a file that permjax wrote, or collect them again."
        raise ValueError(message) from error
