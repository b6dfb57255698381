"""Keys and values of what a stream has shown so far, with static shapes.

Every layer has arrays of its own, with as many slots as it keeps tokens: under the method full layers hold every token,
routed ones text and k tokens a frame. Each slot stores its token's position in the stream; how far the cache is rolled
back goes by position and never by index.

Arrays of several layers are not stacked: a GPU's kernels take whole arrays, so that each layer's part of a stack would
be copied before it is read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from vmod_jax.models.attention import NEVER


class LayerCache(NamedTuple):
    """What one layer holds. key, value: [B, S, K, h]; position: i32[B, S], NEVER in empty slots; used: i32[B] slots"""

    key: Array
    value: Array
    position: Array
    used: Array


class Cache(NamedTuple):
    """layers: one LayerCache a layer; position, frames: i32[B], tokens and frames so far."""

    layers: tuple[LayerCache, ...]
    position: Array
    frames: Array


def make_cache(slots: Sequence[int], batch: int, kv_heads: int, head_dim: int, dtype) -> Cache:
    """An empty cache. slots: of a row, for each layer."""
    layers = tuple(
        LayerCache(
            key=jnp.zeros((batch, size, kv_heads, head_dim), dtype),
            value=jnp.zeros((batch, size, kv_heads, head_dim), dtype),
            position=jnp.full((batch, size), NEVER, jnp.int32),
            used=jnp.zeros(batch, jnp.int32),
        )
        for size in slots
    )
    return Cache(layers, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))


def write(layer: LayerCache, key: Array, value: Array, position: Array) -> LayerCache:
    """Puts a chunk behind the slots in use. key, value: [B, C, K, h]; position: i32[B, C].

    Padding comes with position NEVER; it is overwritten by the next chunk. What does not fit is dropped: the caller
    grows the cache before. `used` moves once all layers have written (`advance`).
    """
    rows = jnp.arange(key.shape[0])[:, None]
    slot = layer.used[:, None] + jnp.arange(key.shape[1])
    return layer._replace(
        key=layer.key.at[rows, slot].set(key, mode="drop"),
        value=layer.value.at[rows, slot].set(value, mode="drop"),
        position=layer.position.at[rows, slot].set(position, mode="drop"),
    )


def advance(cache: Cache, kept: Sequence[int], n: int, length: Array, frames: Array) -> Cache:
    """Counts a chunk that all layers have written: `length: i32[B]` tokens, among them `frames: i32[B]` of n tokens.

    kept: tokens a frame that each layer holds.
    """
    layers = tuple(
        layer._replace(used=layer.used + length - frames * (n - k)) for layer, k in zip(cache.layers, kept, strict=True)
    )
    return Cache(layers, cache.position + length, cache.frames + frames)


def grow(cache: Cache, slots: Sequence[int]) -> Cache:
    """The same cache with more slots a row in each layer."""

    def more(layer: LayerCache, size: int) -> LayerCache:
        extra = size - layer.position.shape[1]
        pad = lambda x, value: jnp.pad(  # noqa: E731
            x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), constant_values=value
        )
        return LayerCache(pad(layer.key, 0), pad(layer.value, 0), pad(layer.position, NEVER), layer.used)

    return cache._replace(layers=tuple(map(more, cache.layers, slots)))


def roll_back(cache: Cache, position: Array, frames: Array) -> Cache:
    """Forgets every token at `position: i32[B]` or later; `frames: i32[B]` remain. Never cuts inside a frame."""

    def cut(layer: LayerCache) -> LayerCache:
        stays = layer.position < position[:, None]
        return layer._replace(position=jnp.where(stays, layer.position, NEVER), used=stays.sum(-1, dtype=jnp.int32))

    return Cache(tuple(map(cut, cache.layers)), jnp.asarray(position), jnp.asarray(frames))


def num_bytes(cache: Cache) -> int:
    """Bytes that the keys and values take, of arrays or of their shapes."""
    return sum(x.size * x.dtype.itemsize for layer in cache.layers for x in (layer.key, layer.value))
