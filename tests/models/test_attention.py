"""Attention against a loop over heads and queries; blocks of any size against the whole."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmod_jax.models import attention
from vmod_jax.models.attention import NEVER, attend, blocked, cache_attention, causal_attention

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


@pytest.mark.parametrize("block", [8, 16, 24, 128])
def test_blocks_of_any_size_are_the_whole(block):
    size = 45
    q, k, v = draw(np.random.default_rng(1), size, size)
    seen = np.broadcast_to(np.tril(np.ones((size, size), bool)), (B, size, size))
    got = jax.jit(blocked, static_argnames="block")(q, k, v, block)
    np.testing.assert_allclose(got, slow(q, k, v, seen), atol=1e-6)


def test_gradients_of_blocks_are_those_of_the_whole():
    size = 30
    q, k, v = draw(np.random.default_rng(2), size, size)
    position = jnp.broadcast_to(jnp.arange(size), (B, size))

    def gradient(function):
        return jax.jit(jax.grad(lambda qkv: jnp.sin(function(*qkv)).sum()))((q, k, v))

    whole = gradient(lambda q, k, v: attend(q, k, v, position, position))
    for x, y in zip(gradient(lambda q, k, v: blocked(q, k, v, 8)), whole, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6 * np.abs(y).max())


def test_bfloat16_leaves_as_bfloat16_and_is_summed_in_float32():
    q, k, v = draw(np.random.default_rng(3), 9, 9)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    got = causal_attention(*low)
    assert got.dtype == jnp.bfloat16
    exact = causal_attention(*(x.astype(jnp.float32) for x in low))
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=2e-2)


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_chunk_against_a_cache_is_the_end_of_the_whole(chunk):
    """Two rows with 0 and 1034 slots in use (more than one tile), the rest of the cache full of large numbers."""
    slots, used = 1100, np.array([0, 1034])
    rng = np.random.default_rng(4)
    whole = draw(rng, slots, slots)
    parts = [jnp.stack([x[b, used[b] : used[b] + chunk] for b in range(B)]) for x in whole]
    there = np.arange(slots) < used[:, None]
    caches = [jnp.where(there[..., None, None], x, 1e4) for x in whole[1:]]
    expected = [attend(*(x[b : b + 1] for x in whole), *2 * [jnp.arange(slots)[None]])[0] for b in range(B)]
    for backend in ("reference", "blocked"):
        got = jax.jit(functools.partial(cache_attention, backend=backend))(*parts, *caches, jnp.asarray(used))
        for b in range(B):
            np.testing.assert_allclose(got[b], expected[b][used[b] : used[b] + chunk], atol=1e-6)


def test_tiles_are_merged_in_float32(monkeypatch):
    """Of a hundred tiles of 16 bits: a running output of 16 bits would be rounded at each (0.7% and 1% off)."""
    rng, size = np.random.default_rng(8), 800
    monkeypatch.setattr(attention, "CACHE_BLOCK", 8)
    (q, k, v), (_, cache_k, cache_v), whole = draw(rng, 2, 2), draw(rng, 0, size), draw(rng, size, size)
    cached = [x.astype(jnp.bfloat16) for x in (q, k, 1 + v, cache_k, 1 + cache_v)]
    low = [x.astype(jnp.bfloat16) for x in (whole[0], whole[1], 1 + whole[2])]
    used = jnp.array([size - 3, size])
    exact = lambda arrays: [x.astype(jnp.float32) for x in arrays]  # noqa: E731
    for got, want in (
        (attention._blocked_cache(*cached, used), cache_attention(*exact(cached), used, backend="reference")),
        (blocked(*low, 8), causal_attention(*exact(low))),
    ):
        assert got.dtype == jnp.bfloat16
        assert jnp.linalg.norm(got.astype(jnp.float32) - want) < 4e-3 * jnp.linalg.norm(want)


def test_splash_is_the_reference():
    """The TPU's kernel, interpreted: two rows of a length that needs padding, grouped heads."""
    q, k, v = (
        jnp.asarray(np.random.default_rng(5).normal(size=(2, 200, heads, 128)), jnp.float32) for heads in (4, 2, 2)
    )

    def run(function):
        weighted = lambda *qkv: jnp.sum(jnp.sin(function(*qkv)))  # noqa: E731
        return function(q, k, v), *jax.grad(weighted, (0, 1, 2))(q, k, v)

    interpreted = functools.partial(attention.splash, interpret=True)
    for x, y in zip(run(interpreted), run(functools.partial(causal_attention, backend="reference")), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6 * np.abs(y).max())


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if the default device were a GPU; what is found out about its kernels is forgotten afterwards."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention.fault.cache_clear()
    yield monkeypatch
    attention.fault.cache_clear()


SHAPES = {"heads": 4, "kv_heads": 2, "width": 16, "dtype": jnp.bfloat16}


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        (lambda q, k, v: attend(q, k, v, *2 * [jnp.zeros(q.shape[:2], jnp.int32)]), "out is off by"),  # not causal
        (lambda q, k, v: (1 + 1e-6 * q.sum()) * attention.blocked(q, k, v), "is off by"),  # padding has a say
        (lambda q, k, v: jax.lax.stop_gradient(attention.blocked(q, k, v)), "dq is off by"),
        (lambda q, k, v: 1 / 0, "division by zero"),
    ],
)
def test_a_kernel_that_is_wrong_is_left_out_with_one_warning(on_a_gpu, caplog, kernel, complaint):
    on_a_gpu.setitem(attention._CAUSAL, "cudnn", kernel)
    on_a_gpu.setattr(attention, "_cudnn_part", attention._blocked_part)
    with caplog.at_level(logging.WARNING):
        # Inside a program that is being traced, where it is asked for.
        names = []
        jax.make_jaxpr(lambda x: names.append(attention.choose("auto", **SHAPES)) or x)(1.0)
        assert names == [attention.choose("cudnn", **SHAPES)] == ["blocked"]
    (line,) = caplog.messages
    assert line.startswith("attention: cudnn is not used")
    assert complaint in line
    assert "\n" not in line


def test_a_kernel_that_is_right_is_used(on_a_gpu, caplog):
    on_a_gpu.setitem(attention._CAUSAL, "cudnn", blocked)
    on_a_gpu.setattr(attention, "_cudnn_part", attention._blocked_part)
    assert attention.choose("auto", **SHAPES) == "cudnn"
    assert attention.choose("auto", **SHAPES | {"dtype": jnp.float32}) == "blocked"  # cuDNN has 16 bits only
    assert attention.choose("reference", **SHAPES) == "reference"
    assert attention.choose("splash", **SHAPES) == "splash"  # for a device that is not here: nothing to check
    assert not caplog.messages


# --- a cache in parts -------------------------------------------------------------------------------------------------

SLOTS = 48


@pytest.fixture(params=["blocked", "cudnn"])
def attend_part(request, monkeypatch):
    """What computes a part: tiles, or the library's own attention with XLA in cuDNN's place."""
    if request.param == "blocked":
        return attention._blocked_part
    plain = jax.nn.dot_product_attention

    def there(*x, implementation, **more):
        assert implementation == "cudnn"
        out, lse = plain(*x, implementation="xla", **more)
        empty = more.get("key_value_seq_lengths", jnp.ones(len(out), jnp.int32)) < 1  # cuDNN takes no such row
        return jnp.where(empty[:, None, None, None], jnp.nan, out), lse

    monkeypatch.setattr(jax.nn, "dot_product_attention", there)
    return attention._cudnn_part


def slow_cache(q, k, v, cache_k, cache_v, used):
    """In float64, one query of one head at a time over the slots in use and the chunk so far."""
    q, k, v, cache_k, cache_v = (np.asarray(x, np.float64) for x in (q, k, v, cache_k, cache_v))
    out, groups = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(*q.shape[:3]):
        of_group, held = h // groups, int(used[b])
        keys, values = (
            np.concatenate([cache[b, :held, of_group], chunk[b, : t + 1, of_group]])
            for cache, chunk in ((cache_k, k), (cache_v, v))
        )
        logits = keys @ q[b, t, h] / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max())
        out[b, t, h] = weights / weights.sum() @ values
    return out


# Nothing used; all; within the first part of two, four and twelve, on their borders and beside them. One batch.
USED = jnp.array([0, SLOTS, 1, 3, 4, 5, 11, 12, 13, 23, 24, 25, 36, 47])


@pytest.mark.parametrize(("groups", "queries"), [(1, 5), (4, 1), (4, 5), (8, 3)])
def test_a_cache_in_parts_is_the_whole_cache(attend_part, groups, queries):
    """Rows that differ, with large numbers in slots that are not in use."""
    rng = np.random.default_rng(groups)
    draw = lambda *shape: rng.normal(size=(len(USED), *shape)).astype(np.float32)  # noqa: E731
    kv_heads, width = 2, 8
    q, k, v = draw(queries, kv_heads * groups, width), *(draw(queries, kv_heads, width) for _ in range(2))
    caches = [draw(SLOTS, kv_heads, width) for _ in range(2)]
    hidden = (np.arange(SLOTS) >= USED[:, None])[..., None, None]
    held = [np.where(hidden, np.float32(1e4), cache) for cache in caches]
    want = slow_cache(q, k, v, *caches, USED)
    for parts in (0, 1, 4, 12):
        cut = jax.jit(functools.partial(attention.cut_cache, attend_part=attend_part, parts=parts))
        np.testing.assert_allclose(cut(q, k, v, *held, USED), want, atol=1e-5, rtol=0)


def test_parts_are_merged_in_float32():
    """Log-sum-exps of sixteen bits would be off by a percent. (The library's own, on a CPU, are of sixteen bits.)"""
    rng = np.random.default_rng(7)
    (q, k, v), (_, cache_k, cache_v) = draw(rng, 5, 5), draw(rng, 5, SLOTS)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v, 8 * cache_k, cache_v)]
    used = jnp.array([17, SLOTS])
    got = attention.cut_cache(*low, used, attention._blocked_part, 4)
    assert got.dtype == jnp.bfloat16
    want = slow_cache(*(x.astype(jnp.float32) for x in low), used)
    assert np.linalg.norm(got.astype(jnp.float32) - want) < 5e-3 * np.linalg.norm(want)


def test_a_cut_cache_that_is_wrong_leaves_the_kernel_for_sequences(on_a_gpu, caplog):
    on_a_gpu.setitem(attention._CAUSAL, "cudnn", blocked)
    on_a_gpu.setattr(attention, "_cudnn_part", lambda q, k, v, used: attention._blocked_part(q, k, v, None))
    with caplog.at_level(logging.WARNING):
        assert attention.choose("auto", **SHAPES) == "cudnn"
        assert attention.choose("auto", **SHAPES, to="cache") == "blocked"
    (line,) = caplog.messages
    assert line.startswith("attention: cudnn is not used for a cache")


def test_parts_fill_the_multiprocessors():
    """A frame of Llama-3-8B on an H200: 16 tiles a part; and no part is smaller than what it costs to have one."""
    frame = {"rows": 54 * 4, "kv_heads": 8, "multiprocessors": 132}
    assert attention.num_parts(1, slots=63712, **frame) == 8
    assert attention.num_parts(16, slots=63712, **frame) == 1  # enough blocks by themselves
    assert attention.num_parts(1, slots=63713, **frame) in (1, 13, 29)  # only what divides
    assert attention.num_parts(1, slots=64, **frame) <= 2
    assert attention.num_parts(1, slots=63712, **frame | {"multiprocessors": 1}) == 1
    assert attention.round_slots(63713) == 63744
    assert attention.round_slots(100) == 100
