"""Keys and values of 8 bits in blocks of G tokens: SageAttention's numbers, which here no later block changes.

A block's keys lose their mean, which an attention's softmax does not see, and share one scale a head; its values have
one a channel.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array


class Int8(NamedTuple):
    """codes: i8[..., G, h]; scale: [..., h] of values, [..., 1] of keys; mean: [..., h] of keys, None of values"""

    codes: Array
    scale: Array
    mean: Array | None


def _codes(x: Array, scale: Array, limit: int) -> Array:
    step = scale.astype(jnp.float32)[..., None, :]
    return jnp.clip(jnp.round(x / jnp.where(step > 0, step, 1)), -limit, limit).astype(jnp.int8)


def encode_key(x: Array, dtype: Any = jnp.bfloat16, limit: int = 127) -> Int8:
    """Less their mean, one scale: f32[..., G, h]. dtype: of scales and means. Equal keys have scale 0.

    limit: of the codes, 7 for those of 4 bits.
    """
    mean = x.mean(-2).astype(dtype)
    x = x - mean.astype(jnp.float32)[..., None, :]
    scale = (jnp.abs(x).max((-2, -1)) / limit).astype(dtype)[..., None]
    return Int8(_codes(x, scale, limit), scale, mean)


def encode_value(x: Array, dtype: Any = jnp.bfloat16) -> Int8:
    """One scale a channel: f32[..., G, h]."""
    scale = (jnp.abs(x).max(-2) / 127).astype(dtype)
    return Int8(_codes(x, scale, 127), scale, None)


def decode(codes: Int8) -> Array:
    """-> f32[..., G, h]"""
    x = codes.codes.astype(jnp.float32) * codes.scale.astype(jnp.float32)[..., None, :]
    return x if codes.mean is None else x + codes.mean.astype(jnp.float32)[..., None, :]
