"""Keys and values of what a stream has shown so far, with static shapes.

Layers that keep the same number of tokens a frame share one stack of arrays: under the method there are two, full
layers (every token) and routed layers (text and k tokens a frame). Each slot stores its token's position in the
stream; what a query sees, and how far the cache is rolled back, goes by position and never by index.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from vmod_jax.models.attention import NEVER


class LayerStack(NamedTuple):
    """The cache of all layers that keep the same number of tokens a frame.

    key, value: [layers, B, S, K, h]; position: i32[layers, B, S], NEVER in empty slots; used: i32[B] slots in use
    """

    key: Array
    value: Array
    position: Array
    used: Array


class Cache(NamedTuple):
    """stacks: one a kept count, in ascending order of it; position, frames: i32[B], tokens and frames so far."""

    stacks: tuple[LayerStack, ...]
    position: Array
    frames: Array


def make_cache(layers: list[int], slots: list[int], batch: int, kv_heads: int, head_dim: int, dtype) -> Cache:
    """An empty cache: for each stack its number of layers and its slots a row."""
    stacks = tuple(
        LayerStack(
            key=jnp.zeros((count, batch, size, kv_heads, head_dim), dtype),
            value=jnp.zeros((count, batch, size, kv_heads, head_dim), dtype),
            position=jnp.full((count, batch, size), NEVER, jnp.int32),
            used=jnp.zeros(batch, jnp.int32),
        )
        for count, size in zip(layers, slots, strict=True)
    )
    return Cache(stacks, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))


def write(stack: LayerStack, layer: Array | int, key: Array, value: Array, position: Array) -> LayerStack:
    """Puts a chunk behind the slots in use of one layer. key, value: [B, C, K, h]; position: i32[B, C].

    Padding comes with position NEVER; it is overwritten by the next chunk. What does not fit is dropped: the caller
    grows the cache before. `used` moves once all layers have written (`advance`).
    """
    rows = jnp.arange(key.shape[0])[:, None]
    slot = stack.used[:, None] + jnp.arange(key.shape[1])
    return stack._replace(
        key=stack.key.at[layer, rows, slot].set(key, mode="drop"),
        value=stack.value.at[layer, rows, slot].set(value, mode="drop"),
        position=stack.position.at[layer, rows, slot].set(position, mode="drop"),
    )


def advance(cache: Cache, kept: tuple[int, ...], n: int, length: Array, frames: Array) -> Cache:
    """Counts a chunk that all layers have written: `length: i32[B]` tokens, among them `frames: i32[B]` of n tokens.

    kept: tokens a frame that each stack holds.
    """
    stacks = tuple(
        stack._replace(used=stack.used + length - frames * (n - k)) for stack, k in zip(cache.stacks, kept, strict=True)
    )
    return Cache(stacks, cache.position + length, cache.frames + frames)


def grow(cache: Cache, slots: list[int]) -> Cache:
    """The same cache with more slots a row in each stack."""

    def more(stack: LayerStack, size: int) -> LayerStack:
        extra = size - stack.position.shape[2]
        pad = lambda x, value: jnp.pad(  # noqa: E731
            x, [(0, 0), (0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 3), constant_values=value
        )
        return LayerStack(pad(stack.key, 0), pad(stack.value, 0), pad(stack.position, NEVER), stack.used)

    return cache._replace(stacks=tuple(map(more, cache.stacks, slots)))


def roll_back(cache: Cache, position: Array, frames: Array) -> Cache:
    """Forgets every token at `position: i32[B]` or later; `frames: i32[B]` remain. Never cuts inside a frame."""

    def cut(stack: LayerStack) -> LayerStack:
        stays = stack.position < position[None, :, None]
        # A cut between frames leaves the same number of slots in every layer of a stack.
        return stack._replace(position=jnp.where(stays, stack.position, NEVER), used=stays[0].sum(-1, dtype=jnp.int32))

    return Cache(tuple(map(cut, cache.stacks)), jnp.asarray(position), jnp.asarray(frames))


def num_bytes(cache: Cache) -> int:
    """Bytes that the keys and values take."""
    return sum(x.nbytes for stack in cache.stacks for x in jax.tree.leaves((stack.key, stack.value)))
