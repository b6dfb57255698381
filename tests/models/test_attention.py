"""Attention against a loop over heads and queries; blocks of any size against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmod_jax.models.attention import NEVER, attend, causal_attention

B, H, K, WIDTH = 2, 6, 2, 4


def draw(rng, queries, keys):
    shapes = ((B, queries, H, WIDTH), (B, keys, K, WIDTH), (B, keys, K, WIDTH))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def slow(q, k, v, seen):
    """seen: bool[B, T, S]; in float64, one query of one head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        of_group = h // (H // K)
        logits = k[b, seen[b, t], of_group] @ q[b, t, h] / np.sqrt(WIDTH)
        weights = np.exp(logits - logits.max())
        out[b, t, h] = weights / weights.sum() @ v[b, seen[b, t], of_group]
    return out


def test_what_a_query_sees_goes_by_position():
    """Positions with gaps, of which some were skipped, and empty cache slots in any place."""
    _ = NEVER
    k_position = np.array([[0, 3, 4, 9, _, _], [5, _, 0, 2, 7, _]])
    q_position = np.array([[0, 4, 8, 9], [0, 5, 6, 30]])
    seen = np.array(
        [
            [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]],
            [[0, 0, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]],
        ],
        bool,
    )
    q, k, v = draw(np.random.default_rng(0), 4, 6)
    got = attend(q, k, v, jnp.asarray(q_position), jnp.asarray(k_position))
    np.testing.assert_allclose(got, slow(q, k, v, seen), atol=1e-6)
    # What lies in an unseen slot has no say, not even as infinity would.
    hidden = ~seen.any(1)
    other = jnp.where(hidden[:, :, None, None], 1e30, k)
    np.testing.assert_array_equal(attend(q, other, v, jnp.asarray(q_position), jnp.asarray(k_position)), got)


@pytest.mark.parametrize("block", [1, 3, 4, 7, 8, 128])
def test_blocks_of_any_size_are_the_whole(block):
    size = 8
    q, k, v = draw(np.random.default_rng(1), size, size)
    seen = np.broadcast_to(np.tril(np.ones((size, size), bool)), (B, size, size))
    blocked = jax.jit(causal_attention, static_argnames="block")
    np.testing.assert_allclose(blocked(q, k, v, block), slow(q, k, v, seen), atol=1e-6)


def test_gradients_of_blocks_are_those_of_the_whole():
    size = 7
    q, k, v = draw(np.random.default_rng(2), size, size)
    position = jnp.broadcast_to(jnp.arange(size), (B, size))

    def gradient(function):
        return jax.jit(jax.grad(lambda qkv: jnp.sin(function(*qkv)).sum()))((q, k, v))

    whole = gradient(lambda q, k, v: attend(q, k, v, position, position))
    for x, y in zip(gradient(lambda q, k, v: causal_attention(q, k, v, 3)), whole, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_bfloat16_leaves_as_bfloat16_and_is_summed_in_float32():
    q, k, v = draw(np.random.default_rng(3), 9, 9)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    got = causal_attention(*low)
    assert got.dtype == jnp.bfloat16
    exact = causal_attention(*(x.astype(jnp.float32) for x in low))
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=2e-2)
