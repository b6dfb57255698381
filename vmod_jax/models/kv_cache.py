"""Keys and values of what a stream has shown so far, with static shapes.

Every layer has arrays of its own, with as many slots as it keeps tokens: under the method full layers hold every token,
routed ones text and k tokens a frame. Each slot stores its token's position in the stream; how far the cache is rolled
back goes by position and never by index. In what form a layer holds them is a row of `compression.forms.CACHES`.

Arrays of several layers are not stacked: a GPU's kernels take whole arrays, so that each layer's part of a stack would
be copied before it is read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from vmod_jax.compression import forms
from vmod_jax.compression.forms import CACHES, LayerCache
from vmod_jax.models.attention import cache_attention


class Cache(NamedTuple):
    """layers: one LayerCache a layer; position, frames: i32[B], tokens and frames so far."""

    layers: tuple[LayerCache, ...]
    position: Array
    frames: Array


def make_cache(
    slots: Sequence[int], batch: int, kv_heads: int, head_dim: int, dtype, form: str = "float", chunk: int = 512
) -> Cache:
    """An empty cache. slots: of a row, for each layer; form: a name of `compression.forms.CACHES`.

    chunk: the most tokens that are written at once, for forms that keep room for them.
    """
    layers = tuple(CACHES[form].make(size, batch, kv_heads, head_dim, dtype, chunk) for size in slots)
    return Cache(layers, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))


def write(layer: LayerCache, key: Array, value: Array, position: Array) -> LayerCache:
    """Puts a chunk behind the slots in use. key, value: [B, C, K, h]; position: i32[B, C].

    Padding comes with position NEVER; it is overwritten by the next chunk. What does not fit is dropped: the caller
    grows the cache before. `used` moves once all layers have written (`advance`).
    """
    return forms.form(layer).write(layer, key, value, position)


def read(layer: LayerCache) -> tuple[Array, Array]:
    """Keys and values of all slots, [B, S, K, h]."""
    return forms.form(layer).read(layer)


def attend(layer: LayerCache, q: Array, k: Array, v: Array, used: Array, backend: str = "auto") -> Array:
    """Attention of a chunk that was written, to the first `used: i32[B]` slots and to itself: see `cache_attention`.

    backend: of caches of floats; others have a way of their own, beside the "reference".
    """
    own = forms.form(layer).attend
    if own is not None and backend != "reference":
        return own(layer, q, used)
    return cache_attention(q, k, v, *read(layer), used, backend)


def advance(cache: Cache, kept: Sequence[int], n: int, length: Array, frames: Array) -> Cache:
    """Counts a chunk that all layers have written: `length: i32[B]` tokens, among them `frames: i32[B]` of n tokens.

    kept: tokens a frame that each layer holds.
    """
    layers = tuple(
        forms.form(layer).advance(layer, length - frames * (n - k)) for layer, k in zip(cache.layers, kept, strict=True)
    )
    return Cache(layers, cache.position + length, cache.frames + frames)


def grow(cache: Cache, slots: Sequence[int]) -> Cache:
    """The same cache with more slots a row in each layer."""
    layers = (forms.form(layer).grow(layer, size) for layer, size in zip(cache.layers, slots, strict=True))
    return cache._replace(layers=tuple(layers))


def roll_back(cache: Cache, position: Array, frames: Array) -> Cache:
    """Forgets every token at `position: i32[B]` or later; `frames: i32[B]` remain. Never cuts inside a frame.

    Right as far back as `exact_from`.
    """
    layers = tuple(forms.form(layer).roll_back(layer, position) for layer in cache.layers)
    return Cache(layers, jnp.asarray(position), jnp.asarray(frames))


def exact_from(cache: Cache) -> Array:
    """The earliest position to which each row can be rolled back: i32[B]."""
    return jnp.max(jnp.stack([forms.form(layer).exact_from(layer) for layer in cache.layers]), 0)


def num_bytes(cache: Cache) -> int:
    """Bytes that the keys and values take, of arrays or of their shapes."""
    return sum(forms.form(layer).num_bytes(layer) for layer in cache.layers)
