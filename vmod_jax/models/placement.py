"""What the model tells XLA's partitioner: the rows of a batch stay on their devices.

Left to itself, XLA keeps the weights where they are and moves activations: every device then computes all rows of the
batch on its share of the hidden dimension. `training/sharding.py` says where parameters live; a program learns of the
mesh by being traced under it (`jax.sharding.use_abstract_mesh`). Elsewhere these functions change nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec

ROWS = ("data", "fsdp")
HEADS = ("tensor",)


def _spec(*axes: tuple[str, ...]) -> PartitionSpec:
    """The mesh's axes that the partitioner decides about, among those named; inside a `shard_map` there may be none.

    Empty where they have one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    there = [tuple(axis for axis in names if axis in mesh.auto_axes) for names in axes]
    alone = all(mesh.shape[axis] == 1 for names in there for axis in names)
    return PartitionSpec(*() if alone else there)


def by_rows(x: Array) -> Array:
    """x: [B, ...], its rows split over the mesh and each of them whole."""
    spec = _spec(ROWS)
    return jax.lax.with_sharding_constraint(x, spec) if any(spec) else x


def lookup(table: Array, index: Array) -> Array:
    """table[index]: [V, d], i32[B, T] -> [B, T, d] by rows.

    Each device looks up its part of the width for its neighbours along `fsdp` too, and sends them theirs: the table,
    which is large, stays where it is.
    """
    spec = _spec(ROWS[:1], (), ROWS[1:])
    if not any(spec):
        return table[index]
    place = jax.lax.with_sharding_constraint
    return by_rows(place(table[place(index, PartitionSpec(spec[0]))], spec))


def _shard_map(function: Callable[..., Array], in_specs: Any, out_specs: Any) -> Callable[..., Array]:
    auto = set(jax.sharding.get_abstract_mesh().auto_axes)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=auto, check_vma=False)


def on_rows(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A function [B, ...] -> [B, ...] of each row for itself, each device for its own rows.

    For operations that the partitioner does not split, such as top-k.
    """
    spec = _spec(ROWS)
    return _shard_map(function, spec, spec) if any(spec) else function


def by_heads(attention: Callable[..., Array]) -> Callable[..., Array]:
    """Attention of [B, T, heads, h] queries, keys and values (and more that is [B, ...]), each device for its own rows
    and heads.

    For kernels that the partitioner cannot split.
    """
    rows, heads = _spec(ROWS), _spec(ROWS, (), HEADS)
    if not any(heads):
        return attention
    return lambda q, k, v, *more: _shard_map(attention, (heads,) * 3 + (rows,) * len(more), heads)(q, k, v, *more)
