"""Attention by products of small integers (SageAttention 2410.02367, SageAttention2 2411.10958). Inference only.

Logits are sums of 8-bit (or 4-bit) products of queries and of keys less their mean, which a softmax does not see;
weights and values are multiplied as floats of 8 bits (e4m3), weights times 448.

`paper` is the papers' definition, with means and scales over all keys: every new key would change them all. `causal`
and `cached` quantise blocks of 64 keys by themselves, so that nothing is ever quantised twice and no row of the result
depends on what comes later:

    keys     | block 0 | block 1 | block 2 |         block of a query: its slot / 64
    query in block 2:  8 bits   8 bits   exact       a scale a query, a mean and a scale a block of keys

and a stream therefore gives what its whole sequence gives. `kernel` is the same as a Pallas kernel.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from vmod_jax.compression import int8, online
from vmod_jax.compression.int8 import Int8
from vmod_jax.compression.online import HIDDEN, dot, from_rows, to_rows

BLOCK = 64  # keys that share a mean and a scale
QUERY_BLOCK = 128  # queries of a block of the papers
E4M3 = 448.0  # the largest number of jnp.float8_e4m3fn


class Variant(NamedTuple):
    """limit: of the codes of queries and keys (127: 8 bits, 7: 4 bits); smooth: queries lose their block's mean, too;
    values: a name of `VALUES`"""

    limit: int = 127
    smooth: bool = False
    values: str = "e4m3"


SAGE8 = Variant()
SAGE4 = Variant(limit=7, smooth=True)


# --- the papers' definition -------------------------------------------------------------------------------------------


def block_rows(size: int, block: int) -> tuple[Array, int]:
    """The group of each row, and how many there are: blocks of rows."""
    return jnp.arange(size) // block, -(-size // block)


def thread_queries(size: int, warp: int = 32) -> tuple[Array, int]:
    """Queries that a GPU's thread holds share a scale: (block of 128, warp of 32, row mod 8)."""
    row, per = jnp.arange(size), QUERY_BLOCK // warp * 8
    return row // QUERY_BLOCK * per + row % QUERY_BLOCK // warp * 8 + row % 8, -(-size // QUERY_BLOCK) * per


def thread_keys(size: int) -> tuple[Array, int]:
    """Keys that a GPU's thread holds share a scale: (block of 64, row mod 8 in pairs)."""
    row = jnp.arange(size)
    return row // BLOCK * 4 + row % 8 // 2, -(-size // BLOCK) * 4


def quantise(x: Array, rows: tuple[Array, int], limit: int = 127, eps: float = 0.0, rounding=jnp.round):
    """x: f32[..., S, h] by groups of rows -> (i8[..., S, h], f32[..., groups] scales); of zeros, the scale is eps."""
    group, count = rows
    most = jnp.moveaxis(jnp.abs(x).max(-1), -1, 0)
    scale = jnp.moveaxis(jnp.maximum(jax.ops.segment_max(most, group, count), 0), 0, -1) / limit + eps
    # XLA would multiply by the reciprocal of what is broadcast, and the codes of ties would be others.
    step = lax.optimization_barrier(jnp.broadcast_to(scale[..., group, None], x.shape))
    return rounding(x / jnp.where(step > 0, step, 1)).astype(jnp.int8), scale


def _integer_dot(q: Array, k: Array) -> Array:
    """i8[..., T, h], i8[..., S, h] -> f32[..., T, S], summed in 32 bits."""
    return jnp.einsum("...th,...sh->...ts", q, k, preferred_element_type=jnp.int32).astype(jnp.float32)


def paper(q: Array, k: Array, v: Array, causal: bool = True, variant: Variant = SAGE8) -> Array:
    """SageAttention2 as its papers define it, in float32: q: [B, H, S, h]; k, v: [B, K, S, h] -> f32[B, H, S, h].

    Scales by thread; means of keys and scales of values over all keys; weights over the maximum of the whole row.
    """
    size, width, groups = q.shape[2], q.shape[3], q.shape[1] // k.shape[1]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k = k - k.mean(2, keepdims=True)
    mean = jnp.zeros_like(q)
    if variant.smooth:
        block, count = block_rows(size, QUERY_BLOCK)
        total = jax.ops.segment_sum(jnp.moveaxis(q, 2, 0), block, count)
        each = jax.ops.segment_sum(jnp.ones(size), block, count)
        mean = jnp.moveaxis(total / each[:, None, None, None], 0, 2)[:, :, block]
    q_codes, q_scale = quantise(q - mean, of_q := thread_queries(size), variant.limit)
    k_codes, k_scale = quantise(k, of_k := thread_keys(size), variant.limit)
    each_q, each_k = q_scale[..., of_q[0], None], k_scale[..., of_k[0]][..., None, :]
    heads = lambda x: jnp.repeat(x, groups, 1)  # noqa: E731
    logits = _integer_dot(q_codes, heads(k_codes)) * each_q * heads(each_k)
    logits = (logits + dot("...th,...sh->...ts", mean, heads(k))) * width**-0.5
    if causal:
        logits = jnp.where(jnp.arange(size) <= jnp.arange(size)[:, None], logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    scale = jnp.abs(v).max(2, keepdims=True) / E4M3
    codes = (v / jnp.where(scale > 0, scale, 1)).astype(jnp.float8_e4m3fn)
    out = _weighted_e4m3(weights, heads(codes), heads(scale))
    return out / weights.sum(-1, keepdims=True)


def compare(exact: Array, out: Array) -> tuple[float, float, float]:
    """(cosine, relative L1, root of the mean square) of an attention's whole output, as the papers measure."""
    x, y = (z.astype(jnp.float32).reshape(-1) for z in (exact, out))
    cosine = (x @ y) / (jnp.linalg.norm(x) * jnp.linalg.norm(y))
    return float(cosine), float(jnp.abs(x - y).sum() / jnp.abs(x).sum()), float(jnp.sqrt(jnp.mean((x - y) ** 2)))


# --- weights times values ---------------------------------------------------------------------------------------------


def encode_e4m3(x: Array, dtype: Any = jnp.float32) -> Int8:
    """Values of a block as floats of 8 bits, one scale a channel: f32[..., G, h]."""
    scale = (jnp.abs(x).max(-2) / E4M3).astype(dtype)
    step = scale.astype(jnp.float32)[..., None, :]
    return Int8((x / jnp.where(step > 0, step, 1)).astype(jnp.float8_e4m3fn), scale, None)


def _weighted_e4m3(weights: Array, codes: Array, scale: Array) -> Array:
    """Products of e4m3, summed in float32: f32[..., T, S], e4m3[..., S, h], f32[..., 1, h] -> f32[..., T, h]."""
    weights = (weights * E4M3).astype(jnp.float8_e4m3fn)
    return dot("...ts,...sh->...th", weights.astype(jnp.float32), codes.astype(jnp.float32)) * scale / E4M3


def _weighted(weights: Array, codes: Array, scale: Array) -> Array:
    return dot("...ts,...sh->...th", weights, codes.astype(jnp.float32)) * scale


def _as_it_is(x: Array) -> Int8:
    return Int8(x, jnp.ones((*x.shape[:-2], x.shape[-1])), None)


# How a block's values are held, and multiplied with its weights.
VALUES = {
    "e4m3": (encode_e4m3, _weighted_e4m3),
    "int8": (functools.partial(int8.encode_value, dtype=jnp.float32), _weighted),
    "float": (_as_it_is, _weighted),
}


# --- block by block ---------------------------------------------------------------------------------------------------
# Rows are the queries of all heads of a key/value head: [B, K, R, h].


class Queries(NamedTuple):
    """exact: f32[B, K, R, h], scaled by h^-1/2; codes: i8 of them less `mean`; scale, mean: f32[B, K, R, 1 or h]"""

    exact: Array
    codes: Array
    scale: Array
    mean: Array


class Blocks(NamedTuple):
    """key: codes of blocks, leaves [B, N, K, ...]; value: by a name of `VALUES`."""

    key: Int8
    value: Int8


def encode_queries(rows: Array, variant: Variant, scale: Array | None = None) -> Queries:
    """rows: f32[B, K, R, h], scaled. scale: f32[B, K, R, 1] in place of one a query.

    The mean of `smooth` is over all rows given: of 4 bits alone does a result depend, by rounding, on its neighbours.
    """
    mean = rows.mean(2, keepdims=True) * variant.smooth
    rest = rows - mean
    if scale is None:
        scale = jnp.abs(rest).max(-1, keepdims=True) / variant.limit
    codes = jnp.round(rest / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return Queries(rows, codes, scale, jnp.broadcast_to(mean, rows.shape))


def encode_blocks(k: Array, v: Array, variant: Variant) -> Blocks:
    """Whole blocks of 64 keys and values: [B, N 64, K, h] -> leaves [B, N, K, ...]."""
    cut = lambda x: x.reshape(len(x), -1, BLOCK, *x.shape[2:]).swapaxes(2, 3).astype(jnp.float32)  # noqa: E731
    encode, _ = VALUES[variant.values]
    return Blocks(int8.encode_key(cut(k), jnp.float32, variant.limit), encode(cut(v)))


def _smoothed(queries: Queries, block: Int8) -> Array:
    """What the codes of queries less their mean leave out: mean of queries by keys, f32[..., R, S]."""
    keys = block.codes.astype(jnp.float32) * block.scale[..., None, :]
    return dot("...rh,...sh->...rs", queries.mean, keys)


def block_logits(queries: Queries, block: Int8, smooth: bool) -> Array:
    """Logits of a block of keys: leaves [B, K, ...] -> f32[B, K, R, 64]."""
    logits = _integer_dot(queries.codes, block.codes) * queries.scale * block.scale[..., None, :].astype(jnp.float32)
    if smooth:
        logits = logits + _smoothed(queries, block)
    # The mean that keys lost: the same along a row, but not from block to block.
    mean: Any = block.mean
    return logits + dot("...rh,...h->...r", queries.exact, mean.astype(jnp.float32))[..., None]


def blocked_attention(
    queries: Queries, blocks: Blocks, count: Array, k: Array, v: Array, seen: Array, variant: Variant,
    whole_row: bool = False,
) -> Array:  # fmt: skip
    """Each row attends to its first blocks by codes, in order, and then to some keys exactly.

    count: i32[B, R] blocks that a row sees; k, v: [B, S, K, h] and seen: bool[B, R, S], the exact part
    whole_row: weights are rounded over the maximum of the whole row, not of what came before (the goldens' way)
    -> f32[B, K, R, h]
    """
    _, weigh = VALUES[variant.values]
    k, v = (x.swapaxes(1, 2).astype(jnp.float32) for x in (k, v))

    def tile(j, state):
        block = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, j, 1, keepdims=False), blocks)
        logits = block_logits(queries, block.key, variant.smooth)
        logits = jnp.where((j < count)[:, None, :, None], logits, HIDDEN)
        value = functools.partial(weigh, codes=block.value.codes, scale=block.value.scale[..., None, :])
        return online.tile(state, logits, value)

    def run(state):
        state = lax.fori_loop(0, jnp.max(count), tile, state)
        logits = dot("bkrh,bksh->bkrs", queries.exact, k)
        return online.tile(state, jnp.where(seen[:, None], logits, HIDDEN), lambda w: dot("bkrs,bksh->bkrh", w, v))

    state = online.nothing(queries.exact)
    if whole_row:
        state = run(state)[0], *state[1:]
    _, total, out = run(state)
    return out / total


def _padded(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), (0, 0), (0, 0)))


def causal(q: Array, k: Array, v: Array, variant: Variant = SAGE8) -> Array:
    """Attention of a sequence to itself: q: [B, T, H, h]; k, v: [B, T, K, h] -> [B, T, H, h] in q's dtype.

    A query sees its own block of 64 slots exactly and those before by codes. The slow and plain form of `kernel`.
    """
    size, kv_heads = q.shape[1], k.shape[2]
    full, k, v = _padded(q), _padded(k), _padded(v)
    blocks, groups = encode_blocks(k, v, variant), q.shape[2] // kv_heads
    place = jnp.arange(BLOCK)
    seen = place <= jnp.tile(place, groups)[:, None]

    def row(_, i):
        part, keys, values = (lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, 1) for x in (full, k, v))
        queries = encode_queries(to_rows(part, kv_heads), variant)
        count = jnp.full((len(q), BLOCK * groups), i)
        out = blocked_attention(queries, blocks, count, keys, values, seen[None], variant)
        return None, from_rows(out, part)

    _, out = lax.scan(row, None, jnp.arange(full.shape[1] // BLOCK))
    return out.swapaxes(0, 1).reshape(full.shape)[:, :size]


def cached(q: Array, k: Array, v: Array, used: Array, variant: Variant = SAGE8) -> Array:
    """Attention of a chunk to a cache that holds it, in slots used .. used + C: the rows of `causal` for these queries.

    q: [B, C, H, h]; k, v: [B, S, K, h], the chunk written; used: i32[B] slots before the chunk -> [B, C, H, h].
    """
    size, kv_heads = q.shape[1], k.shape[2]
    k, v = _padded(k), _padded(v)
    slot = used[:, None] + jnp.arange(size)
    # The exact part of any row lies between the start of the chunk's first block and its end.
    start = used // BLOCK * BLOCK
    near = start[:, None] + jnp.arange(min(size + BLOCK - 1, k.shape[1]))
    take = lambda x: jnp.take_along_axis(x, near[..., None, None], axis=1, mode="clip")  # noqa: E731
    seen = (near[:, None] <= slot[..., None]) & (near[:, None] >= (slot // BLOCK * BLOCK)[..., None])
    tile = lambda x: jnp.tile(x, (1, q.shape[2] // kv_heads, *[1] * (x.ndim - 2)))  # noqa: E731
    queries = encode_queries(to_rows(q, kv_heads), variant)
    blocks = encode_blocks(k, v, variant)
    out = blocked_attention(queries, blocks, tile(slot // BLOCK), take(k), take(v), tile(seen), variant)
    return from_rows(out, q)


# --- the kernel -------------------------------------------------------------------------------------------------------


def _kernel(q, q_codes, q_scale, q_mean, k_codes, k_scale, k_mean, v_codes, v_scale, k, v, out, *, variant):
    """One block of queries of one key/value head: its rows against the blocks before by codes, then its own exactly."""
    import jax.experimental.pallas as pl

    rows = q[...]
    queries = Queries(rows, q_codes[...], q_scale[...], q_mean[...])

    def tile(j, state):
        part, one = pl.ds(j * BLOCK, BLOCK), pl.ds(j, 1)
        codes, step = k_codes[part, :], k_scale[one, :][:, :1]
        dot = lax.dot_general(queries.codes, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        logits = dot.astype(jnp.float32) * queries.scale * step
        if variant.smooth:
            logits += _kernel_dot(queries.mean, (codes.astype(jnp.float32) * step), 1)
        logits += (rows * k_mean[one, :]).sum(-1, keepdims=True)
        if variant.values == "e4m3":
            weighted = lambda w: _kernel_e4m3(w, v_codes[part, :], v_scale[one, :])  # noqa: E731
        else:
            weighted = lambda w: _kernel_dot(w, v_codes[part, :].astype(jnp.float32), 0) * v_scale[one, :]  # noqa: E731
        return online.tile(state, logits, weighted)

    nothing = jnp.full((rows.shape[0], 1), HIDDEN), jnp.zeros((rows.shape[0], 1)), jnp.zeros(rows.shape)
    state = lax.fori_loop(0, pl.program_id(1), tile, nothing)
    shape = (rows.shape[0], BLOCK)
    seen = lax.broadcasted_iota(jnp.int32, shape, 1) <= lax.broadcasted_iota(jnp.int32, shape, 0) % BLOCK
    logits = jnp.where(seen, _kernel_dot(rows, k[...], 1), HIDDEN)
    _, total, done = online.tile(state, logits, lambda w: _kernel_dot(w, v[...], 0))
    out[...] = done / total


def _kernel_dot(x: Array, y: Array, axis: int) -> Array:
    """x by y over x's last axis and `axis` of y, in float32."""
    return lax.dot_general(
        x, y, (((1,), (axis,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _kernel_e4m3(weights: Array, codes: Array, scale: Array) -> Array:
    weights = (weights * E4M3).astype(jnp.float8_e4m3fn)
    return _kernel_dot(weights.astype(jnp.float32), codes.astype(jnp.float32), 0) * scale / E4M3


def kernel(q: Array, k: Array, v: Array, variant: Variant = SAGE8, interpret: bool = False) -> Array:
    """`causal` as a Pallas kernel, for TPU and GPU: a program for each block of queries of each key/value head.

    Codes and scales are made outside, keys and values once. A program loops over the blocks of keys before its own.
    """
    import jax.experimental.pallas as pl

    batch, size, heads, width = q.shape
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    full, k, v = _padded(q), _padded(k), _padded(v)
    number, rows = full.shape[1] // BLOCK, groups * BLOCK
    parts = jnp.moveaxis(full.reshape(batch, number, BLOCK, heads, width), 1, 0)
    queries = jax.vmap(lambda part: encode_queries(to_rows(part, kv_heads), variant))(parts)
    queries = jax.tree.map(lambda x: x.transpose(1, 2, 0, 3, 4), queries)  # [B, K, N, R, ...]
    blocks = jax.tree.map(lambda x: x.swapaxes(1, 2), encode_blocks(k, v, variant))  # [B, K, N, ...]
    flat = lambda x: x.reshape(batch * kv_heads, *x.shape[2:])  # noqa: E731
    whole = lambda x: flat(x).reshape(batch * kv_heads, -1, width)  # noqa: E731
    step = jnp.broadcast_to(blocks.key.scale, blocks.key.mean.shape)
    exact = [whole(x.swapaxes(1, 2).astype(jnp.float32)) for x in (k, v)]
    arrays = [flat(x) for x in (queries.exact, queries.codes, queries.scale, queries.mean)]
    arrays += [whole(x) for x in (blocks.key.codes, step, blocks.key.mean, blocks.value.codes, blocks.value.scale)]
    of_queries = lambda last: pl.BlockSpec((None, None, rows, last), lambda b, i: (b, i, 0, 0))  # noqa: E731
    of_keys = lambda length: pl.BlockSpec((None, length, width), lambda b, i: (b, 0, 0))  # noqa: E731
    own = pl.BlockSpec((None, BLOCK, width), lambda b, i: (b, i, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, variant=variant),
        grid=(batch * kv_heads, number),
        in_specs=[
            *(of_queries(last) for last in (width, width, 1, width)),
            *(of_keys(length) for length in (number * BLOCK, number, number, number * BLOCK, number)),
            own,
            own,
        ],
        out_specs=of_queries(width),
        out_shape=jax.ShapeDtypeStruct((batch * kv_heads, number, rows, width), jnp.float32),
        interpret=interpret,
    )(*arrays, *exact)
    out = out.reshape(batch, kv_heads, number, groups, BLOCK, width).transpose(0, 2, 4, 1, 3, 5)
    return out.reshape(full.shape)[:, :size].astype(q.dtype)
