"""Softmax attention tile by tile: a running maximum and sum over the tiles of keys that a row meets.

Rows are the queries of all heads of a key/value head: [B, K, R, h], R = G T of G query heads a key/value head.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

HIDDEN = -1e30  # a hidden logit: finite, so that exp(hidden - hidden) in a tile's running maximum is no NaN


def dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def to_rows(q: Array, kv_heads: int) -> Array:
    """Scaled queries in float32: [B, T, H, h] -> [B, K, G T, h]."""
    batch, size, heads, width = q.shape
    q = (q.astype(jnp.float32) * width**-0.5).reshape(batch, size, kv_heads, heads // kv_heads, width)
    return q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, width)


def from_rows(rows: Array, q: Array) -> Array:
    """The inverse of `to_rows`, in the shape and dtype of q."""
    batch, size, _, width = q.shape
    rows = rows.reshape(batch, rows.shape[1], -1, size, width)
    return rows.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def tile(state: tuple[Array, Array, Array], logits: Array, weighted: Callable[[Array], Array]):
    """One more tile: (maximum, sum f32[..., R, 1], out f32[..., R, h]); weighted: weights -> weights times values."""
    top, total, out = state
    new = jnp.maximum(top, logits.max(-1, keepdims=True))
    weights, keep = jnp.exp(logits - new), jnp.exp(top - new)
    return new, total * keep + weights.sum(-1, keepdims=True), out * keep + weighted(weights)


def nothing(rows: Array) -> tuple[Array, Array, Array]:
    """The state before the first tile."""
    one = rows[..., :1] * 0
    return one + HIDDEN, one, rows * 0
