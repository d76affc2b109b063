"""Entity tables in parts: each device of a mesh holds some rows, and all relations."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from permjax.kge.base import Family, Params, Row

BLOCK = 1 << 14
"""A device with more rows than this goes over them in equal blocks of at most this size."""
ENTITIES = "entities"
"""Name of the only axis of the mesh."""
SAME: Any = PartitionSpec()
"""The same on every device."""
TABLES: Any = {"entity": PartitionSpec(ENTITIES), "relation": SAME}
"""How the tables lie."""


def entity_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, `entities`, over the given devices; over those of all processes by default."""
    found = jax.devices() if devices is None else list(devices)
    return Mesh(np.array(found), (ENTITIES,), axis_types=(AxisType.Auto,))


def shard_params(params: Params, mesh: Mesh) -> Params:
    """Lay the rows of the entity table over the devices of a mesh, and the relations on each of them.

    The last row is repeated until every device has as many; other functions are told how many are real.
    With several processes, each gives the whole tables.
    """

    def place(table: str, part: Array) -> Array:
        surplus = _filled(len(part), mesh) - len(part) if table == "entity" else 0
        filled = np.pad(np.asarray(part), [(0, surplus), *[(0, 0)] * (part.ndim - 1)], mode="edge")
        return jax.make_array_from_callback(filled.shape, NamedSharding(mesh, TABLES[table]), filled.__getitem__)

    return {table: {part: place(table, values) for part, values in parts.items()} for table, parts in params.items()}


def init_sharded(family: Family, key: Any, entities: int, relations: int, bound: float, mesh: Mesh) -> Params:
    """The rows that `family.init` draws, each drawn on its own device, so that no device ever holds the table."""
    shardings = {table: NamedSharding(mesh, spec) for table, spec in TABLES.items()}
    shapes = (_filled(entities, mesh), relations, bound)
    return jax.jit(lambda key: family.init(key, *shapes), out_shardings=shardings)(key)


def whole_params(params: Params, entities: int) -> dict[str, dict[str, np.ndarray]]:
    """The tables as NumPy arrays on every process, without the rows that fill up."""
    found = jax.tree.map(lambda part: multihost_utils.process_allgather(part, tiled=True), params)
    return {**found, "entity": {part: values[:entities] for part, values in found["entity"].items()}}


def _filled(entities: int, mesh: Mesh) -> int:
    """How many rows all devices have together."""
    each = -(-entities // mesh.devices.size)
    return mesh.devices.size * (each + -each % _blocks(each))


def _blocks(size: int) -> int:
    """The number of blocks of so many rows."""
    return -(-size // BLOCK)


# on one device


class Block(NamedTuple):
    """Some consecutive rows of a device, with the id of the first, and which do not fill up; or a stack of blocks."""

    rows: dict[str, Array]
    first: Array
    real: Array


def over(mesh: Mesh, f: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`f`, which sees the rows of one device, as a function of whole tables; it sums over devices itself."""
    return jax.shard_map(f, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


class Place(NamedTuple):
    """Which rows a device has: `size` from `first` on, of which `real` says those that do not fill up."""

    first: Array
    size: int
    real: Array

    @classmethod
    def of(cls, table: Row, entities: int) -> "Place":
        """The place of this device, in a function over a mesh."""
        size = len(jax.tree.leaves(table)[0])
        first = jax.lax.axis_index(ENTITIES) * size
        return cls(first, size, first + jnp.arange(size) < entities)

    def blocks(self, table: Row) -> Block:
        """All rows, with a first axis that counts the blocks."""
        count = _blocks(self.size)
        parts = {part: values.reshape(count, -1, *values.shape[1:]) for part, values in table.items()}
        firsts = self.first + self.size // count * jnp.arange(count)
        return Block(parts, firsts, self.real.reshape(count, -1))

    def mine(self, ids: Int[Array, " b"], values: Array) -> Array:
        """Values `[b, ...]` of the ids whose rows are here, 0 for others."""
        here = (ids >= self.first) & (ids < self.first + self.size)
        return jnp.where(here.reshape(-1, *[1] * (values.ndim - 1)), values, 0)

    def fetch(self, table: Row, ids: Int[Array, " b"]) -> Row:
        """Rows from the devices that have them; 0 for negative ids."""
        found = {part: values.at[ids - self.first].get(mode="clip") for part, values in table.items()}
        return summed({part: self.mine(ids, values) for part, values in found.items()})

    def add(self, table: Row, ids: Int[Array, " b"], values: Row) -> dict[str, Array]:
        """The table with values added to those rows that are here."""
        place = jnp.clip(ids - self.first, 0, self.size - 1)
        return {part: table[part].at[place].add(self.mine(ids, values[part])) for part in table}


def summed(tree: PyTree) -> Any:
    """Arrays summed over the devices in one go."""
    flat, back = ravel_pytree(tree)
    return back(jax.lax.psum(flat, ENTITIES))
