"""Context parallelism: one row's tokens over the devices of the mesh axis `context`, frames whole.

The data cut a row into 2C chunks of about equal length (`data/batch.py`); each of the C devices holds two of them, one
from the front and one from the back, so that all have the same share of causal attention:

    C = 2     chunk      0    1    2    3
              device     0    1    1    0

A chunk is a row of its own: whole frames, padding last, and a beginning in its stream. Everything that a layer does
with one token or one frame (routing, compaction, projections, MLP, add-back) is done for chunks as it is for rows, and
nothing of it leaves the device. Attention alone looks at the other chunks: it gathers their keys and values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from vmod_jax.models.attention import chunk_attention
from vmod_jax.models.placement import by_heads

AXIS = "context"

A = TypeVar("A", Array, np.ndarray)


class Beginning(NamedTuple):
    """Where each row begins in its stream: position, the place of its first token; frame, its first frame; i32[B]."""

    position: Array
    frame: Array


def zigzag(x: A, chunks: int) -> A:
    """Chunks from stream order [B, chunks * w, ...] to the order in which devices hold them: 0, -1, 1, -2, ..."""
    numbers = np.arange(chunks)
    order = np.stack([numbers, numbers[::-1]], axis=1).reshape(-1)[:chunks]
    return x.reshape(x.shape[0], chunks, -1, *x.shape[2:])[:, order].reshape(x.shape)


def attention(q: Array, k: Array, v: Array, length: Array) -> Array:
    """Causal attention of this device's chunks to all chunks of their streams, inside an axis `context` of C devices.

    q: [2B, S, H, h]; k, v: [2B, S, K, h]: of every stream the device's two chunks, one after the other; length:
    i32[2B], without padding -> [2B, S, H, h] in q's dtype. Every device computes equally many tiles.
    """
    return by_heads(_attention)(q, k, v, length)


def _attention(q: Array, k: Array, v: Array, length: Array) -> Array:
    index, count = lax.axis_index(AXIS), lax.axis_size(AXIS)
    number = jnp.stack([index, 2 * count - 1 - index])
    mine = lambda x: x.reshape(-1, 2, *x.shape[1:])  # noqa: E731

    def whole(x: Array) -> Array:
        """[2B, ...] -> all chunks in stream order [B, 2C, ...]"""
        x = lax.all_gather(mine(x), AXIS, axis=1)
        return jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1)

    with jax.named_scope("gather_context"):
        keys, values, there = whole(k), whole(v), jnp.arange(q.shape[1]) < whole(length)[:, :, None]
    out = chunk_attention(mine(q), keys, values, number, there)
    return out.reshape(q.shape)


def over_context(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function(variables, batch, rngs) -> [B, M, ...]` of rows, run on the chunks that each device holds.

    batch: arrays [B, 2C, ...] or [B, 2C * w, ...] with chunks in zigzag order, of which `function` gets its own as
    rows [2B, ...] or [2B, w, ...]; variables are the same for all; rngs are folded with the device's place.
    -> [B, 2C * M, ...], split over `context` as the batch is. Everything else is the partitioner's. To be traced under
    the mesh.
    """
    one_a_chunk = ("length", "first_position", "first_frame")

    def local(variables: Any, batch: dict[str, Array], rngs: dict[str, Array]) -> Array:
        def rows(name: str, x: Array) -> Array:
            return x.reshape(-1) if name in one_a_chunk else x.reshape(2 * x.shape[0], -1, *x.shape[2:])

        rngs = {name: jax.random.fold_in(key, lax.axis_index(AXIS)) for name, key in rngs.items()}
        out = function(variables, {name: rows(name, x) for name, x in batch.items()}, rngs)
        return out.reshape(-1, 2 * out.shape[1], *out.shape[2:])

    split = PartitionSpec(None, AXIS)
    return jax.shard_map(
        local, in_specs=(PartitionSpec(), split, PartitionSpec()), out_specs=split, axis_names={AXIS}, check_vma=False
    )
