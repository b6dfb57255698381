"""Lazy arrays to where they live: devices, or a checkpoint. Neither ever holds the whole model on the host twice."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from vmod_jax.training.sharding import placements
from vmod_jax.weights.huggingface import LazyArray, aligned_empty, copy_into

Tree = Any

CHUNK_BYTES = 64 * 2**20  # of a checkpoint's arrays: what is copied at a time while it is written
FILE_BYTES = 256 * 2**20  # of a checkpoint's files: written out when full


def is_lazy(leaf: Any) -> bool:
    return isinstance(leaf, LazyArray)


def place(tree: Tree, mesh: Mesh | None = None) -> Tree:
    """The tree with every LazyArray read into a jax.Array, on one device or, with a mesh, as its table places it.

    Beside the arrays that live in host memory (a CPU's), the host holds one tensor of a file at a time.
    """
    one = SingleDeviceSharding(jax.devices()[0])
    where = placements(tree, mesh) if mesh else jax.tree.map(lambda _: one, tree, is_leaf=is_lazy)
    return jax.tree.map(lambda x, s: _place(x, s) if is_lazy(x) else jax.device_put(x, s), tree, where, is_leaf=is_lazy)


def _place(leaf: LazyArray, where: Sharding) -> jax.Array:
    on_host = next(iter(where.device_set)).platform == "cpu"
    if leaf.stacked and not on_host:
        return _place_by_layers(leaf, where)
    array = leaf.read()
    return jax.make_array_from_callback(leaf.shape, where, lambda index: array[index])


def _place_by_layers(leaf: LazyArray, where: Sharding) -> jax.Array:
    """Into a buffer that is updated in place on its devices: a stacked leaf may be larger than the host's memory."""
    one_layer = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:])) if isinstance(where, NamedSharding) else where
    stack = jnp.zeros(leaf.shape, leaf.dtype, device=where)
    for i, part in enumerate(leaf.parts):
        layer = aligned_empty(leaf.shape[1:], leaf.dtype)
        copy_into(layer, part())
        moved = jax.make_array_from_callback(layer.shape, one_layer, lambda index, layer=layer: layer[index])
        stack = jax.block_until_ready(_set_layer(stack, moved, i))
    return stack


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, i: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes lazy arrays as NumPy's, each read when its turn comes and let go before the next."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _background_serialize(self, values: Sequence[LazyArray], infos: Any, args: Any = None) -> None:
        for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
            await super()._background_serialize([value.read()], [info], arg and [arg])


def save(workdir: str | Path, tree: Tree, announce: Callable[[str], None] = lambda line: None) -> None:
    """Writes checkpoints/0 of a workdir from a tree of LazyArrays and arrays, reading one leaf at a time.

    The checkpoint is what `training.checkpoint.save_params` would write, uncompressed: weights are noise to a
    compressor, and it would cost a second copy.
    """
    handlers = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, _LazyHandler()),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree, is_leaf=is_lazy)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
    with ocp.CheckpointManager(Path(workdir).absolute() / "checkpoints", item_handlers={"params": handler}) as manager:
        args = ocp.args.PyTreeSave(tree, save_args=chunks, ocdbt_target_data_file_size=FILE_BYTES)
        manager.save(0, args=ocp.args.Composite(params=args))
        manager.wait_until_finished()
