"""Where arrays live: one mesh, one table.

The mesh has four axes. `data` and `fsdp` split the batch; `fsdp` also splits every large parameter (and with it the
optimiser's state) along its embedding axis, or LoRA's rank where there is none; `tensor` splits heads, MLP width and
vocabulary; `context` splits the token axis of the activations, by whole frames. XLA's partitioner derives every
collective from the placements that follow from the tables and from what the model says of its activations; attention
over `context` is written out (`models/context.py`).

    activations                          axes                    mesh axes
    tokens, lengths, labels              rows, tokens | labels   (data, fsdp), context
    frames: pixels, features             rows, frames            (data, fsdp), context
    hidden states, compacted or not      rows, tokens, embed     (data, fsdp), context, -
    queries, keys, values                rows, tokens, heads     (data, fsdp), context, tensor
    inside the MLP                       rows, tokens, mlp       (data, fsdp), context, tensor
    logits                               rows, labels, vocab     (data, fsdp), context, tensor
    routing scores, kept indices         rows, frames, n | k     (data, fsdp), context, -

The model places rows (`models/placement.py`), the data tokens and frames (`put_batch`), the parameters the rest.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vmod_jax.errors import UserError
from vmod_jax.models.context import zigzag

AXES = ("data", "fsdp", "context", "tensor")

# What a parameter's axes mean, by its path: the first match counts, an axis not named here is whole on every device.
# The same rows place the optimiser's moments, whose paths end like their parameters'.
PARAMETERS = (
    (r"llama/embed/embedding$", ("vocab", "embed")),
    (r"llama/head/kernel$", ("embed", "vocab")),
    (r"llama/head/lora_a$", ("embed", None)),
    (r"llama/head/lora_b$", ("rank", "vocab")),
    (r"layers/(q|k|v)/kernel$", ("layer", "embed", "heads")),
    (r"layers/(q|k|v)/bias$", ("layer", "heads")),
    (r"layers/(q|k|v)/lora_a$", ("layer", "embed", None)),
    (r"layers/(q|k|v)/lora_b$", ("layer", "rank", "heads")),
    (r"layers/o/kernel$", ("layer", "heads", "embed")),
    (r"layers/o/lora_a$", ("layer", "heads", "rank")),
    (r"layers/o/lora_b$", ("layer", None, "embed")),
    (r"layers/(gate|up)/kernel$", ("layer", "embed", "mlp")),
    (r"layers/(gate|up)/lora_a$", ("layer", "embed", None)),
    (r"layers/(gate|up)/lora_b$", ("layer", "rank", "mlp")),
    (r"layers/down/kernel$", ("layer", "mlp", "embed")),
    (r"layers/down/lora_a$", ("layer", "mlp", "rank")),
    (r"layers/down/lora_b$", ("layer", None, "embed")),
    (r"connector/(in|out)/kernel$", (None, "embed")),
)

# Logical axis -> mesh axes. (`heads` is heads x head_dim: `mesh` sees to it that a head is never cut.)
LOGICAL = {
    "embed": "fsdp",
    "rank": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layer": None,
    None: None,
}

BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(sizes: Any, batch_size: int, heads: int, kv_heads: int, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config's `mesh` section: sizes of data, fsdp, context and tensor; -1 once: whatever is left.

    devices: to use in place of all there are, such as those of a machine that is elsewhere.

    Raises UserError when it fits neither the devices nor the batch nor the model's heads; frames are looked at where
    the buckets are made.
    """
    shape = {axis: int(sizes[axis]) for axis in AXES}
    count = jax.device_count() if devices is None else len(devices)
    given = int(np.prod([size for size in shape.values() if size != -1]))
    wanted = ", ".join(f"mesh.{axis}={size}" for axis, size in shape.items())
    if any(size < 1 and size != -1 for size in shape.values()) or list(shape.values()).count(-1) > 1:
        raise UserError(f"{wanted}: every size must be 1 or more, and -1 (what is left) may stand once")
    shape = {axis: count // given if size == -1 else size for axis, size in shape.items()}
    if int(np.prod(list(shape.values()))) != count:
        raise UserError(f"{wanted} does not fit {count} device(s): the product of the sizes must be {count}")
    rows = shape["data"] * shape["fsdp"]
    if batch_size % rows:
        raise UserError(f"batch_size={batch_size} does not divide over mesh.data x mesh.fsdp = {rows}")
    for name, number in (("heads", heads), ("key/value heads", kv_heads)):
        if number % shape["tensor"]:
            raise UserError(f"the model's {number} {name} do not divide over mesh.tensor={shape['tensor']}")
    return jax.make_mesh(tuple(shape.values()), AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The placement of one array by the table; an axis that does not divide evenly stays whole."""
    for pattern, axes in PARAMETERS:
        if re.search(pattern, path) and len(axes) == len(shape):
            names = [LOGICAL[axis] for axis in axes]
            fits = [
                name if name and size % mesh.shape[name] == 0 else None for name, size in zip(names, shape, strict=True)
            ]
            return PartitionSpec(*fits)
    return PartitionSpec()


def placements(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array (or ShapeDtypeStruct) of a tree of parameters, optimiser state and scalars."""

    def place(path: Any, x: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a global batch that this process's devices hold (the same along context, tensor)."""
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    rows = [index[0].indices(batch_size) for index in indices if index is not None]
    return slice(min(start for start, _, _ in rows), max(stop for _, stop, _ in rows))


def chunks_per_row(mesh: Mesh) -> int:
    """How many chunks the data cut every row into: two for each device along `context`, none on one device."""
    return 2 * mesh.shape["context"] if mesh.shape["context"] > 1 else 1


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """This process's rows (`local_rows`) of a global batch -> global arrays over (data, fsdp) and, as chunks, context.

    Along `context` a device gets two chunks of every row of its own: see `models/context.py`.
    """
    chunks, first = chunks_per_row(mesh), local_rows(mesh, batch_size).start
    sharding = NamedSharding(mesh, BATCH if chunks == 1 else PartitionSpec(*BATCH, "context"))

    def put(local: np.ndarray) -> jax.Array:
        local = zigzag(local, chunks) if chunks > 1 else local

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return local[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    return {name: put(array) for name, array in batch.items()}
