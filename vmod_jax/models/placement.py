"""What the model tells XLA's partitioner: the rows of a batch stay on their devices.

Left to itself, XLA keeps the weights where they are and moves activations: every device then computes all rows of the
batch on its share of the hidden dimension. `training/sharding.py` says where parameters live; a program learns of the
mesh by being traced under it (`jax.sharding.use_abstract_mesh`). Elsewhere these functions change nothing.
"""

from collections.abc import Callable

import jax
from jax import Array
from jax.sharding import PartitionSpec

ROWS = ("data", "fsdp")
HEADS = ("tensor",)


def _spec(*axes: tuple[str, ...]) -> PartitionSpec:
    """The mesh's axes that the partitioner decides about, among those named; inside a `shard_map` there may be none."""
    auto = jax.sharding.get_abstract_mesh().auto_axes
    return PartitionSpec(*(tuple(axis for axis in names if axis in auto) for names in axes))


def by_rows(x: Array) -> Array:
    """x: [B, ...], its rows split over the mesh and each of them whole."""
    spec = _spec(ROWS)
    return jax.lax.with_sharding_constraint(x, spec) if any(spec) else x


def by_heads(attention: Callable[[Array, Array, Array], Array]) -> Callable[[Array, Array, Array], Array]:
    """Attention of [B, T, heads, h] queries, keys and values, each device for its own rows and heads.

    For kernels that the partitioner cannot split.
    """
    spec = _spec(ROWS, (), HEADS)
    if not any(spec):
        return attention
    auto = set(jax.sharding.get_abstract_mesh().auto_axes)
    return jax.shard_map(attention, in_specs=spec, out_specs=spec, axis_names=auto, check_vma=False)
