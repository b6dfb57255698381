"""Causal attention over tokens with positions, for grouped key/value heads.

`attend` is the plain reference, right for any positions and for caches; `causal_attention` is what training calls and
never builds a mask over more than a block.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

# The position of an empty cache slot: later than any query's, so it is never seen.
NEVER = jnp.iinfo(jnp.int32).max


def attend(q: Array, k: Array, v: Array, q_position: Array, k_position: Array) -> Array:
    """Softmax attention of every query to the keys at its own position or before, in float32.

    q: [B, T, H, h]; k, v: [B, S, K, h] with H a multiple of K; q_position: i32[B, T]; k_position: i32[B, S]
    -> [B, T, H, h] in q's dtype. Every query must see at least one key.
    """
    chex.assert_rank([q, k, v], 4)
    batch, size, heads, width = q.shape
    groups = heads // k.shape[2]
    q = q.reshape(batch, size, k.shape[2], groups, width)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * width**-0.5
    seen = k_position[:, None, :] <= q_position[:, :, None]
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(batch, size, heads, width).astype(v.dtype)


def causal_attention(q: Array, k: Array, v: Array, block: int | None = None) -> Array:
    """Causal attention of a sequence to itself, in blocks of queries that read only the keys before their end.

    q: [B, T, H, h]; k, v: [B, T, K, h] -> [B, T, H, h]. About half the work of a masked square; equal to `attend` with
    positions 0 .. T-1.
    """
    batch, size = q.shape[:2]
    chex.assert_shape([k, v], (batch, size, None, None))
    block = block or max(128, -(-size // 16))  # at most 16 blocks are traced, whatever the length
    out = []
    for start in range(0, size, block):
        stop = min(start + block, size)
        q_position = jnp.broadcast_to(jnp.arange(start, stop), (batch, stop - start))
        k_position = jnp.broadcast_to(jnp.arange(stop), (batch, stop))
        out.append(attend(q[:, start:stop], k[:, :stop], v[:, :stop], q_position, k_position))
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)
