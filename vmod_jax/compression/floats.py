"""Keys and values as they are, in the dtype of the computation."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

NEVER = jnp.iinfo(jnp.int32).max  # the position of an empty slot: later than any query's


class LayerCache(NamedTuple):
    """key, value: [B, S, K, h]; position: i32[B, S], NEVER in empty slots; used: i32[B]"""

    key: Array
    value: Array
    position: Array
    used: Array


def make(slots: int, batch: int, kv_heads: int, head_dim: int, dtype: Any, chunk: int) -> LayerCache:
    key = jnp.zeros((batch, slots, kv_heads, head_dim), dtype)
    return LayerCache(key, jnp.zeros_like(key), jnp.full((batch, slots), NEVER), jnp.zeros(batch, jnp.int32))


def write(layer: LayerCache, key: Array, value: Array, position: Array) -> LayerCache:
    rows = jnp.arange(key.shape[0])[:, None]
    slot = layer.used[:, None] + jnp.arange(key.shape[1])
    return layer._replace(
        key=layer.key.at[rows, slot].set(key, mode="drop"),
        value=layer.value.at[rows, slot].set(value, mode="drop"),
        position=layer.position.at[rows, slot].set(position, mode="drop"),
    )


def read(layer: LayerCache) -> tuple[Array, Array]:
    return layer.key, layer.value


def grow(layer: LayerCache, slots: int) -> LayerCache:
    extra = slots - layer.position.shape[1]
    pad = lambda x, value: jnp.pad(  # noqa: E731
        x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), constant_values=value
    )
    return LayerCache(pad(layer.key, 0), pad(layer.value, 0), pad(layer.position, NEVER), layer.used)


def roll_back(layer: LayerCache, position: Array) -> LayerCache:
    stays = layer.position < position[:, None]
    return layer._replace(position=jnp.where(stays, layer.position, NEVER), used=stays.sum(-1, dtype=jnp.int32))


def advance(layer: LayerCache, count: Array) -> LayerCache:
    return layer._replace(used=layer.used + count)


def exact_from(layer: LayerCache) -> Array:
    return jnp.zeros_like(layer.used)


def num_bytes(layer: LayerCache) -> int:
    return sum(x.size * x.dtype.itemsize for x in (layer.key, layer.value))
