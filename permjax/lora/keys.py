"""The tensors of adapter files: which key is which factor of which module, and what is no low-rank update."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from permjax.io.lazy import CheckpointError, LazyArray

PREFIX = "base_model.model."

_ROLES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding a",
    ".lora_embedding_B": "embedding b",
    ".lora_down.weight": "a",
    ".lora_up.weight": "b",
    ".alpha": "alpha",
    ".base_layer.weight": "frozen",
}

_NO_UPDATE = {
    r"\.lora_magnitude_vector(\.weight)?$|\.dora_scale$": "the magnitude of DoRA",
    r"\.lora_(embedding_)?B\.bias$": "a bias trained with `lora_bias`",
    r"trainable_tokens|\.token_adapter\.": "made of trained tokens",
    r"\.lora_E$|\.ranknum$|\.lora_diag": "a diagonal between the factors (AdaLoRA, KaSA)",
    r"[._]lokr_": "a Kronecker factor of LoKr",
    r"[._]hada_": "a Hadamard factor of LoHa",
    r"[._]b?oft_": "a rotation of OFT",
    r"\.lora_mid\.weight$": "the core of a Tucker decomposition (LyCORIS)",
    r"\.diff(_b)?$": "a whole difference of weights",
    r"\.lora_(A|B|embedding_A|embedding_B)\.\w+(\.weight)?$": "a factor with the name of an adapter in its key",
    r"\.lora\.(down|up)\.weight$|lora_linear_layer": "a factor under a key of old diffusers versions",
    r"\.bias$": "a trained bias",
    r"\.weight$": "a whole trained tensor (`modules_to_save`, or a resized vocabulary)",
    r"": "no part of a LoRA that permjax knows",
}


class AdapterError(ValueError):
    """An adapter that cannot be read or written; the message, one line, names the file and what to do."""


@contextmanager
def one_line() -> Iterator[None]:
    """Errors of the files underneath become an `AdapterError` of one line."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        raise AdapterError(" ".join(str(error).split())) from error


class Parts(NamedTuple):
    """The tensors of one module, `delta = scale * b a`.

    Attributes:
        a: `lora_A`, `lora_down` or `lora_embedding_A`.
        b: the other factor.
        alpha: the scalar of kohya's files.
        embedding: whether the module is an embedding.
    """

    a: LazyArray
    b: LazyArray
    alpha: LazyArray | None
    embedding: bool


@dataclass(frozen=True)
class ModuleInfo:
    """What a module is in the file.

    Attributes:
        kind: "linear", "conv" or "embedding".
        rank: the length of the axis between the factors.
        scale: the number s of `delta = s B A`.
        a_shape: as in the file: `(rank, in)`, or `(rank, in, height, width)`.
        b_shape: as in the file: `(out, rank)`, or `(out, rank, 1, 1)`.
        dtype: of the wider factor.
    """

    kind: str
    rank: int
    scale: float
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size_in(self) -> int:
        """The inputs; for a kernel `in * height * width`."""
        return int(np.prod(self.a_shape[1:], dtype=np.int64))

    @property
    def size_out(self) -> int:
        """The outputs."""
        return self.b_shape[0]


def modules_of(tensors: Mapping[str, LazyArray]) -> tuple[dict[str, Parts], dict[str, LazyArray]]:
    """Sort the tensors of an adapter by module, and the frozen copies of embeddings that PEFT puts beside them.

    Raises:
        AdapterError: a tensor is no part of a low-rank update, or one is missing; names it.
    """
    found: dict[str, dict[str, LazyArray]] = {}
    for key, tensor in tensors.items():
        name, role = _place(key, tensor)
        if role in found.setdefault(name, {}):
            raise AdapterError(f"{tensor.file}: module {name!r} has two tensors for its factor {role}; keep one.")
        found[name][role] = tensor
    frozen = {f"{name}.base_layer.weight": parts.pop("frozen") for name, parts in found.items() if "frozen" in parts}
    return {name: _parts(name, parts, frozen) for name, parts in found.items()}, frozen


def _place(key: str, tensor: LazyArray) -> tuple[str, str]:
    """The module of a tensor and its role in it."""
    for suffix, role in _ROLES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix).removeprefix(PREFIX), role
    what = next(text for pattern, text in _NO_UPDATE.items() if re.search(pattern, key))
    message = (
        f"{tensor.file}: tensor {key!r} is {what}, not a factor of a plain update `scale * B A`; adapters with such "
        "tensors cannot be merged."
    )
    raise AdapterError(message)


def _parts(name: str, roles: Mapping[str, LazyArray], frozen: Mapping[str, LazyArray]) -> Parts:
    embedding = any(role.startswith("embedding") for role in roles)
    a, b = ("embedding a", "embedding b") if embedding else ("a", "b")
    missing = [role for role in (a, b) if role not in roles]
    if missing or (embedding and {"a", "b"} & roles.keys()):
        have = [*roles.values(), *(x for key, x in frozen.items() if key == f"{name}.base_layer.weight")]
        message = (
            f"{have[0].file}: module {name!r} has {', '.join(x.name for x in have)} where one pair of factors A and B "
            "is needed; the file is incomplete, save or copy it again."
        )
        raise AdapterError(message)
    return Parts(roles[a], roles[b], roles.get("alpha"), embedding)


def info_of(name: str, parts: Parts, scale: float) -> ModuleInfo:
    """Check the shapes of a module's factors and describe them.

    Raises:
        AdapterError: they do not belong together; names the module and the shapes.
    """
    a, b = parts.a.shape, parts.b.shape
    fault = _fault(a, b, parts.embedding, [parts.a.dtype, parts.b.dtype])
    if fault:
        raise AdapterError(f"{parts.a.file}: module {name!r} has A of shape {a} and B of shape {b}: {fault}.")
    kind = "embedding" if parts.embedding else "linear" if len(a) == 2 else "conv"
    return ModuleInfo(kind, a[0], scale, a, b, np.dtype(jnp.promote_types(parts.a.dtype, parts.b.dtype)))


def _fault(a: tuple[int, ...], b: tuple[int, ...], embedding: bool, dtypes: list[Any]) -> str:
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return f"they hold {dtypes[0]} and {dtypes[1]}, not floating numbers; give an adapter that is not quantised"
    if len(a) != len(b) or len(a) < 2 or (embedding and len(a) != 2):
        return "these are no factors of one matrix or kernel; save or copy the file again"
    if min(*a, *b) < 1:
        return "an axis is empty; save or copy the file again"
    if len(a) > 2 and b[1] != a[0] and a[0] % b[1] == 0:
        return f"a convolution with {a[0] // b[1]} groups, whose update is no product B A; it cannot be merged"
    if b[1] != a[0]:
        return f"A has rank {a[0]} and B rank {b[1]}; save or copy the file again"
    if any(size != 1 for size in b[2:]):
        return "B is no 1 x 1 kernel; only updates with a 1 x 1 kernel B can be merged"
    return ""
