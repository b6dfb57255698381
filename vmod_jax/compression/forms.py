"""In what form a layer of a stream's cache holds keys and values: a row of `CACHES`, named by `VideoLMConfig.cache`.

All forms hold `position: i32[B, S]`, NEVER in empty slots, and `used: i32[B]` slots; `models/kv_cache.py` sees no more.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

NEVER = jnp.iinfo(jnp.int32).max  # the position of an empty slot: later than any query's


class LayerCache(NamedTuple):
    """Keys and values as they are. key, value: [B, S, K, h]; position: i32[B, S], NEVER in empty slots; used: i32[B]"""

    key: Array
    value: Array
    position: Array
    used: Array


class Form(NamedTuple):
    """holds: the type of what `make` gives, of which the other functions are.

    make: (slots, batch, kv_heads, head_dim, dtype) -> an empty layer
    write: (layer, key, value [B, C, K, h], position i32[B, C]) -> the layer with a chunk behind the slots in use;
        padding (position NEVER) is overwritten by the next chunk, what does not fit is dropped; `used` stays
    read: layer -> keys, values [B, S, K, h] of all slots; grow: (layer, slots) -> the layer with so many slots
    roll_back: (layer, position i32[B]) -> the layer without tokens of that position or later
    num_bytes: layer, of arrays or of their shapes -> bytes of keys and values
    """

    holds: type
    make: Callable[[int, int, int, int, Any], Any]
    write: Callable[[Any, Array, Array, Array], Any]
    read: Callable[[Any], tuple[Array, Array]]
    grow: Callable[[Any, int], Any]
    roll_back: Callable[[Any, Array], Any]
    num_bytes: Callable[[Any], int]


def make(slots: int, batch: int, kv_heads: int, head_dim: int, dtype: Any) -> LayerCache:
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


def num_bytes(layer: LayerCache) -> int:
    return sum(x.size * x.dtype.itemsize for x in (layer.key, layer.value))


CACHES = {
    "float": Form(LayerCache, make, write, read, grow, roll_back, num_bytes),  # the dtype of the computation
}


def form(layer: Any) -> Form:
    """The row of CACHES that a layer is of."""
    return next(form for form in CACHES.values() if isinstance(layer, form.holds))
