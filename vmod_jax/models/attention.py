"""Causal attention with grouped key/value heads, by what each kind of device does best.

`attend` is the plain reference, right for any positions. `causal_attention` (a sequence to itself) and
`cache_attention` (a chunk to a cache and itself) compute the same by one of `BACKENDS`: "blocked" anywhere, in tiles
that stay in a processor's cache; "cudnn" on a GPU; "splash" on a TPU. The libraries' kernels are compared with the
reference before they are used, once a process, and left out with a warning where they fail or differ.

All of them run over a sequence in stream order, padding last: causal order alone hides it, and no mask is passed.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from vmod_jax.compression.forms import NEVER
from vmod_jax.models.placement import by_heads

log = logging.getLogger(__name__)

# "auto" is the device's own: see `choose`.
BACKENDS = ("auto", "reference", "blocked", "cudnn", "splash")

# What remat="attention" keeps: outputs under this name, and cuDNN's kernel, whose residuals cannot be named.
KEPT = "attention"
_CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"

BLOCK = 256  # queries and keys of a tile: logits of a few heads stay in a CPU core's L2
CACHE_BLOCK = 512  # keys of a tile against a cache, where queries are few
_HIDDEN = -1e30  # a hidden logit: finite, so that exp(hidden - hidden) in a tile's running maximum is no NaN


def kept_by_remat(primitive: Any, *avals: Any, **params: Any) -> bool:
    """The policy of `jax.checkpoint` that keeps attention's output and log-sum-exp and computes the rest again."""
    named = jax.checkpoint_policies.save_only_these_names(KEPT)
    return named(primitive, *avals, **params) or primitive.name == _CUDNN_FORWARD


# --- the reference ----------------------------------------------------------------------------------------------------


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


def _reference(q: Array, k: Array, v: Array) -> Array:
    position = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    return checkpoint_name(attend(q, k, v, position, position), KEPT)


# --- the two entries --------------------------------------------------------------------------------------------------


def causal_attention(q: Array, k: Array, v: Array, backend: str = "auto") -> Array:
    """Attention of a sequence to itself: q: [B, T, H, h]; k, v: [B, T, K, h] -> [B, T, H, h] in q's dtype.

    Equal to `attend` with positions 0 .. T-1, for about half its work and without its T x T logits.
    """
    batch, size, heads, width = q.shape
    chex.assert_shape([k, v], (batch, size, None, width))
    name = choose(backend, heads, k.shape[2], width, q.dtype)
    return (by_heads(splash) if name == "splash" else _CAUSAL[name])(q, k, v)


def cache_attention(
    q: Array, k: Array, v: Array, cache_k: Array, cache_v: Array, used: Array, backend: str = "auto"
) -> Array:
    """Attention of a chunk to what a cache holds and, causally, to itself. Inference only: it has no gradient.

    q: [B, C, H, h]; k, v: [B, C, K, h]; cache_k, cache_v: [B, S, K, h], of which the first `used: i32[B]` slots count
    -> [B, C, H, h] in q's dtype.
    """
    batch, size, heads, width = q.shape
    chex.assert_shape([cache_k, cache_v], (batch, None, k.shape[2], width))
    name = choose(backend, heads, k.shape[2], width, q.dtype, "cache")
    if name == "reference":
        slots = jnp.arange(cache_k.shape[1])
        before = jnp.where(slots < used[:, None], slots, NEVER)
        after = used[:, None] + jnp.arange(size)
        keys, values = (jnp.concatenate([held, x], 1) for held, x in ((cache_k, k), (cache_v, v)))
        return attend(q, keys, values, after, jnp.concatenate([before, after], 1))
    return _against(name)(q, k, v, cache_k, cache_v, used)


def _against(name: str, parts: int = 0) -> Callable[..., Array]:
    """`cache_attention` by a back end other than the reference. Tiles one after the other suit a CPU, parts a GPU."""
    if name != "cudnn" and jax.default_backend() != "gpu":
        return _blocked_cache
    return functools.partial(cut_cache, attend_part=_cudnn_part if name == "cudnn" else _blocked_part, parts=parts)


# --- blocked ----------------------------------------------------------------------------------------------------------
# Tiles of rows (queries of all heads of a group, [B, K, G * b, h]) by keys [B, K, b, h], a running maximum and sum
# over the tiles of a row. Products are written so that no operand is transposed on the way into a matrix product.


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _to_rows(x: Array, blocks: int) -> Array:
    """[B, K, G, T, ...] -> [blocks, B, K, G * b, ...]"""
    batch, heads, groups, size, *rest = x.shape
    x = jnp.moveaxis(x.reshape(batch, heads, groups, blocks, size // blocks, *rest), 3, 0)
    return x.reshape(blocks, batch, heads, groups * (size // blocks), *rest)


def _from_rows(x: Array, groups: int) -> Array:
    blocks, batch, heads, rows, *rest = x.shape
    x = jnp.moveaxis(x.reshape(blocks, batch, heads, groups, rows // groups, *rest), 0, 3)
    return x.reshape(batch, heads, groups, -1, *rest)


def _slice(x: Array, j: Array | int, size: int, axis: int = 2) -> Array:
    return lax.dynamic_slice_in_dim(x, j * size, size, axis)


def _online(state, logits: Array, values: Array):
    """One more tile of keys: (maximum f32[B, K, R], sum f32[B, K, R], out f32[B, K, R, h]), f32[B, K, R, S]."""
    top, total, out = state
    new = jnp.maximum(top, logits.max(-1))
    weights, scale = jnp.exp(logits - new[..., None]), jnp.exp(top - new)
    out = out * scale[..., None] + _dot("bkts,bksh->bkth", weights.astype(values.dtype), values)
    return new, total * scale + weights.sum(-1), out


def _nothing(rows: Array):
    """The state before the first tile for rows [B, K, R, h]."""
    shape = rows.shape
    return jnp.full(shape[:3], _HIDDEN, jnp.float32), jnp.zeros(shape[:3], jnp.float32), jnp.zeros(shape, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _tiles(q: Array, k: Array, v: Array, number: Array, there: Array | None, block: int) -> Array:
    """q: [B, K, G, T, h], scaled; k, v: [B, K, S, h]; T and S multiples of block -> [B, K, G, T, h].

    number: i32[T / block], where each tile of queries lies among the tiles of keys; there: bool[B, S], False for keys
    that nobody sees beside those that come later.
    """
    return _tiles_forward(q, k, v, number, there, block)[0]


def _tiles_forward(q: Array, k: Array, v: Array, number: Array, there: Array | None, block: int):
    groups, blocks = q.shape[2], q.shape[3] // block

    def row(_, xs):
        i, rows = xs

        def tile(j, state, diagonal=False):
            logits = _dot("bkth,bksh->bkts", rows, _slice(k, j, block))
            if diagonal:
                seen = jnp.arange(block) <= (jnp.arange(rows.shape[2]) % block)[:, None]
                logits = jnp.where(seen, logits, _HIDDEN)
            if there is not None:
                logits = jnp.where(_slice(there, j, block, axis=1)[:, None, None], logits, _HIDDEN)
            return _online(state, logits, _slice(v, j, block))

        top, total, out = tile(i, lax.fori_loop(0, i, tile, _nothing(rows)), diagonal=True)
        return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

    _, (out, lse) = lax.scan(row, None, (number, _to_rows(q, blocks)))
    out = checkpoint_name(_from_rows(out, groups), KEPT)
    lse = checkpoint_name(_from_rows(lse, groups), KEPT)
    return out, (q, k, v, number, there, out, lse)


def _tiles_backward(block: int, kept, gradient: Array):
    q, k, v, number, there, out, lse = kept
    groups, blocks = q.shape[2], q.shape[3] // block
    inner = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1)
    k_turned = jnp.swapaxes(k, 2, 3)

    def row(carry, xs):
        i, rows, d_out, lse, inner = xs

        def tile(j, state, diagonal=False):  # logits as keys by queries: [B, K, b, G * b]
            dq, dk, dv = state
            logits = _dot("bksh,bkth->bkst", _slice(k, j, block), rows)
            if diagonal:
                seen = jnp.arange(block)[:, None] <= jnp.arange(rows.shape[2]) % block
                logits = jnp.where(seen, logits, _HIDDEN)
            if there is not None:
                logits = jnp.where(_slice(there, j, block, axis=1)[:, None, :, None], logits, _HIDDEN)
            weights = jnp.exp(logits - lse[:, :, None])
            d_weights = _dot("bksh,bkth->bkst", _slice(v, j, block), d_out)
            d_logits = (weights * (d_weights - inner[:, :, None])).astype(q.dtype)
            add = lambda x, more: lax.dynamic_update_slice_in_dim(  # noqa: E731
                x, _slice(x, j, block) + more, j * block, 2
            )
            return (
                dq + _dot("bkhs,bkst->bkht", _slice(k_turned, j, block, axis=3), d_logits),
                add(dk, _dot("bkst,bkth->bksh", d_logits, rows)),
                add(dv, _dot("bkst,bkth->bksh", weights.astype(q.dtype), d_out)),
            )

        none = jnp.zeros((*rows.shape[:2], rows.shape[3], rows.shape[2]), jnp.float32)
        dq, dk, dv = tile(i, lax.fori_loop(0, i, tile, (none, *carry)), diagonal=True)
        return (dk, dv), jnp.swapaxes(dq, 2, 3)

    xs = number, *(_to_rows(x, blocks) for x in (q, gradient, lse, inner))
    none = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = lax.scan(row, (none, none), xs)
    return _from_rows(dq, groups).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_tiles.defvjp(_tiles_forward, _tiles_backward)


def _group(q: Array, kv_heads: int) -> Array:
    """Scaled queries by key/value head: [B, T, H, h] -> [B, K, G, T, h]."""
    batch, size, heads, width = q.shape
    q = (q * width**-0.5).reshape(batch, size, kv_heads, heads // kv_heads, width)
    return q.transpose(0, 2, 3, 1, 4)


def _equal_blocks(size: int, block: int) -> tuple[int, int]:
    """(blocks, block): as few equal blocks of at most about `block` as hold `size`, so that padding is short."""
    blocks = -(-size // block)
    return blocks, -(-size // blocks // 8) * 8 if blocks else block


def blocked(q: Array, k: Array, v: Array, block: int = BLOCK) -> Array:
    batch, size, heads, width = q.shape
    blocks, block = _equal_blocks(size, block)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, blocks * block - size), (0, 0), (0, 0)))  # noqa: E731
    q, k, v = _group(pad(q), k.shape[2]), pad(k).transpose(0, 2, 1, 3), pad(v).transpose(0, 2, 1, 3)
    out: Any = _tiles(q, k, v, jnp.arange(blocks), None, block)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, -1, heads, width)[:, :size]


def chunk_attention(q: Array, k: Array, v: Array, number: Array, there: Array, block: int = BLOCK) -> Array:
    """Attention of some chunks of a sequence to all of it, whose chunks end in padding: "blocked" on any device.

    q: [B, P, S, H, h], the chunks `number: i32[P]`; k, v: [B, N, S, K, h], all chunks; there: bool[B, N, S], False on
    padding -> [B, P, S, H, h] in q's dtype. Chunk i costs as many tiles as lie in the triangle below its queries.
    """
    batch, parts, size, heads, width = q.shape
    kv_heads = k.shape[3]
    blocks, block = _equal_blocks(size, block)
    padded = blocks * block

    def rows(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padded - size), *[(0, 0)] * (x.ndim - 3)))
        return x.reshape(batch, -1, *x.shape[3:])

    tile = (number[:, None] * blocks + jnp.arange(blocks)).reshape(-1)
    keys, values = rows(k).transpose(0, 2, 1, 3), rows(v).transpose(0, 2, 1, 3)
    out: Any = _tiles(_group(rows(q), kv_heads), keys, values, tile, rows(there), block)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, parts, padded, heads, width)[:, :, :size]


def _own(rows: Array, k: Array, v: Array):
    """The state after the chunk itself, causally: rows [B, K, G * C, h]; k, v: [B, C, K, h]."""
    size = k.shape[1]
    seen = jnp.arange(size) <= (jnp.arange(rows.shape[2]) % size)[:, None]
    logits = jnp.where(seen, _dot("bkth,bskh->bkts", rows, k), _HIDDEN)
    return _online(_nothing(rows), logits, v.transpose(0, 2, 1, 3))


def _held(state, rows: Array, cache_k: Array, cache_v: Array, used: Array):
    """The state after the slots in use. The number of tiles is that of the batch's longest stream, not the cache's."""
    slots = cache_k.shape[1]
    block = min(CACHE_BLOCK, slots)

    def tile(j, state):
        start = jnp.minimum(j * block, slots - block)  # the last tile overlaps the one before

        keys, values = (lax.dynamic_slice_in_dim(held, start, block, 1) for held in (cache_k, cache_v))
        slot = start + jnp.arange(block)
        seen = (slot >= j * block) & (slot < used[:, None])
        logits = jnp.where(seen[:, None, None], _dot("bkth,bskh->bkts", rows, keys), _HIDDEN)
        return _online(state, logits, values.transpose(0, 2, 1, 3))

    return lax.fori_loop(0, -(-jnp.max(used) // block), tile, state)


def _heads_last(x: Array, groups: int) -> Array:
    """[B, K, G * C, ...] -> [B, C, K * G, ...]"""
    batch, kv_heads, rows, *rest = x.shape
    x = jnp.moveaxis(x.reshape(batch, kv_heads, groups, rows // groups, *rest), 3, 1)
    return x.reshape(batch, rows // groups, kv_heads * groups, *rest)


def _blocked_cache(q: Array, k: Array, v: Array, cache_k: Array, cache_v: Array, used: Array) -> Array:
    batch, size, heads, width = q.shape
    groups = heads // k.shape[2]
    rows = _group(q, k.shape[2]).reshape(batch, k.shape[2], groups * size, width)
    _, total, out = _held(_own(rows, k, v), rows, cache_k, cache_v, used)
    return _heads_last(out / total[..., None], groups).astype(q.dtype)


def _blocked_part(q: Array, k: Array, v: Array, used: Array | None) -> tuple[Array, Array]:
    """As `_cudnn_part`."""
    batch, size, heads, width = q.shape
    groups = heads // k.shape[2]
    rows = _group(q, k.shape[2]).reshape(batch, k.shape[2], groups * size, width)
    top, total, out = _own(rows, k, v) if used is None else _held(_nothing(rows), rows, k, v, used)
    out = _heads_last(out / total[..., None], groups).astype(q.dtype)
    return out, _heads_last(top + jnp.log(total), groups)


# --- a cache in parts -------------------------------------------------------------------------------------------------
# A GPU's kernel takes a block of ROWS queries of a head through all keys that they see, and a frame has few queries:
# one call against a long cache would leave most of the multiprocessors idle, and read each key/value head once for
# every one of its query heads. So the queries of a group become rows of their one key/value head, and the cache is cut
# along its slots into parts, which a call takes as rows of a batch, each with its own length:
#
#     slots of a row   [x x x x | x x x x | x . . . | . . . .]   used = 9, four parts of length 4, 4, 1, 0
#     queries          [  q         q         q         q    ]   the same against each
#
# The parts and the chunk's own attention, which alone is causal, are merged by their log-sum-exps in float32. They
# cannot be one call: a call is causal or not, and stacked rows have no causal order of their own.

ROWS = 128  # queries of a block
PARTS = 32  # at most
_MULTIPROCESSORS = 132  # of an H100 or H200, for programs that are compiled where there is none


def num_parts(batch: int, rows: int, kv_heads: int, slots: int, multiprocessors: int) -> int:
    """Into how many parts a cache is cut for `rows` queries of each key/value head: a divisor of its slots.

    The one of least time, in units of what a block takes for a slot: so many waves of blocks, each of which also starts
    and ends (200 slots' time), and queries and outputs of each part, which are written and read (10 rows to a slot).
    A block's time for a slot, 15 ns, is what an H200 took with one block a head: 0.9 ms for 61,000 slots.
    """
    tiles = batch * kv_heads * -(-rows // ROWS)
    time = lambda parts: -(-tiles * parts // multiprocessors) * (slots / parts + 200) + parts * batch * rows / 10  # noqa: E731
    return min((parts for parts in range(1, PARTS + 1) if slots % parts == 0), key=time)


def round_slots(slots: int) -> int:
    """Slots of a cache that can be cut into any power of two of parts; a cache for a few frames stays as it is."""
    return slots if slots < 32 * PARTS else -(-slots // PARTS) * PARTS


def _multiprocessors() -> int:
    here = jax.local_devices()[0]
    return getattr(here, "core_count", _MULTIPROCESSORS) if here.platform == "gpu" else _MULTIPROCESSORS


def cut_cache(
    q: Array, k: Array, v: Array, cache_k: Array, cache_v: Array, used: Array, attend_part: Any, parts: int = 0
) -> Array:
    """`cache_attention` by calls that do not know of caches; arguments and result as there.

    attend_part: `_cudnn_part` or another function of its signature; parts: 0 for `num_parts`
    """
    batch, size, heads, width = q.shape
    slots, kv_heads = cache_k.shape[1:3]
    groups = heads // kv_heads
    parts = parts or num_parts(batch, size * groups, kv_heads, slots, _multiprocessors())
    each = slots // parts
    rows = q.reshape(batch, 1, size, kv_heads, groups, width).swapaxes(3, 4)
    rows = jnp.broadcast_to(rows, (batch, parts, *rows.shape[2:])).reshape(-1, size * groups, kv_heads, width)
    length = jnp.clip(used[:, None] - each * jnp.arange(parts, dtype=jnp.int32), 0, each)
    # A call wants at least one key; what one too many adds is taken out again by its part's weight of zero.
    at_least_one = jnp.maximum(length, 1).reshape(-1)
    there, there_lse = attend_part(
        rows, *(x.reshape(-1, each, kv_heads, width) for x in (cache_k, cache_v)), at_least_one
    )
    own, own_lse = attend_part(q, k, v, None)

    def by_part(x: Array) -> Array:  # [B * P, C * G, K, ...] -> f32[B, P, C, H, ...]
        x = x.reshape(batch, parts, size, groups, kv_heads, *x.shape[3:]).swapaxes(3, 4)
        return x.reshape(batch, parts, size, heads, *x.shape[5:]).astype(jnp.float32)

    there_lse = jnp.where((length > 0)[:, :, None, None], by_part(there_lse), _HIDDEN)
    lse = jnp.concatenate([there_lse, own_lse[:, None].astype(jnp.float32)], 1)
    weight = jax.nn.softmax(lse, axis=1)[..., None]
    return ((by_part(there) * weight[:, :-1]).sum(1) + own.astype(jnp.float32) * weight[:, -1]).astype(q.dtype)


# --- the libraries' kernels -------------------------------------------------------------------------------------------


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _cudnn_part(q: Array, k: Array, v: Array, used: Array | None) -> tuple[Array, Array]:
    """Attention of rows to the first `used: i32[B]` keys, at least one, or (None) causally to their own.

    q: [B, T, H, h]; k, v: [B, S, K, h] -> [B, T, H, h] and the log-sum-exp f32[B, T, H].
    """
    call: Any = functools.partial(jax.nn.dot_product_attention, implementation="cudnn", return_residual=True)
    if used is None:
        return call(q, k, v, is_causal=True)
    whole = jnp.full(used.shape, q.shape[1], jnp.int32)
    return call(q, k, v, query_seq_lengths=whole, key_value_seq_lengths=used)


@functools.cache
def _splash_kernel(groups: int, size: int, interpret: bool):
    """The TPU kernel for one key/value head and its `groups` query heads; building its mask takes seconds at 60k."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    block = next(b for b in (512, 256, 128) if size % b == 0)
    sizes: Any = dict.fromkeys(("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq"), block)
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((size, size))] * groups)
    with jax.ensure_compile_time_eval():  # its arrays are constants, wherever it is first asked for
        return splash_attention_kernel.make_splash_mqa_single_device(
            mask,
            block_sizes=splash_attention_kernel.BlockSizes(**{f"block_{name}": size for name, size in sizes.items()}),
            residual_checkpoint_name=KEPT,
            interpret=interpret,
        )


def splash(q: Array, k: Array, v: Array, interpret: bool = False) -> Array:
    batch, size, heads, width = q.shape
    padded = -(-size // 128) * 128
    pad = lambda x: jnp.pad(x, ((0, 0), (0, padded - size), (0, 0), (0, 0)))  # noqa: E731
    kernel = _splash_kernel(heads // k.shape[2], padded, interpret)
    rows, k, v = _group(pad(q), k.shape[2]), pad(k).transpose(0, 2, 1, 3), pad(v).transpose(0, 2, 1, 3)
    out: Any = jax.vmap(jax.vmap(kernel))(rows, k, v)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, padded, heads, width)[:, :size].astype(q.dtype)


_CAUSAL = {"reference": _reference, "blocked": blocked, "cudnn": _cudnn, "splash": splash}
_PLATFORM = {"cudnn": "gpu", "splash": "tpu"}


# --- which one --------------------------------------------------------------------------------------------------------


def choose(backend: str, heads: int, kv_heads: int, width: int, dtype: Any, to: str = "itself") -> str:
    """The back end that computes attention of these shapes here; known when a program is traced.

    to: a name of `CHECKS`, what a sequence attends to

    "auto" takes the device's kernel where it takes the shapes (cuDNN: 16 bits and widths of a multiple of 8; splash:
    widths of a multiple of 128), else "blocked". A kernel on its own device is checked first (`fault`), and "blocked"
    taken, with a warning, where it fails; on another device (a program compiled for one that is not here) it is not.
    """
    here, sixteen = jax.default_backend(), jnp.dtype(dtype).itemsize == 2
    if backend == "auto":
        fits = {"gpu": ("cudnn", sixteen and width % 8 == 0), "tpu": ("splash", width % 128 == 0)}
        name, takes = fits.get(here, ("blocked", True))
        backend = name if takes else "blocked"
    checked = _PLATFORM.get(backend) == here
    return "blocked" if checked and fault(backend, heads, kv_heads, width, jnp.dtype(dtype), to) else backend


@functools.cache
def fault(backend: str, heads: int, kv_heads: int, width: int, dtype: Any, to: str = "itself") -> str | None:
    """Why a kernel must not be used, said once in a warning; None where it agrees with the reference (`CHECKS`).

    At most 1e-2 (16 bits) or 1e-3.
    """
    try:
        with jax.ensure_compile_time_eval():
            found = CHECKS[to](backend, heads, kv_heads, width, dtype)
        limit = 1e-2 if dtype.itemsize == 2 else 1e-3
        wrong = [f"{name} is off by {value:.1e}" for name, value in found.items() if not value <= limit]
        reason = ", ".join(wrong) or None
    except Exception as error:  # whatever a library or a driver throws
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    if reason:
        log.warning("attention: %s is not used for a %s, a slower one is: %s", backend, _CALLED[to], reason)
    return reason


def apart(backend: str, heads: int, kv_heads: int, width: int, dtype: Any) -> dict[str, float]:
    """How far a back end is from the reference in float32: {out, dq, dk, dv, cache}, relative to the norm."""
    return {
        name: off for check in CHECKS.values() for name, off in check(backend, heads, kv_heads, width, dtype).items()
    }


_END = 150  # tokens of the row that is shorter


def _draw(heads: int, kv_heads: int, width: int, dtype: Any) -> tuple[tuple[Array, Array, Array], Array]:
    """Queries, keys and values of two rows, of which one ends early in padding of large numbers, and what is real."""
    rng, size = np.random.default_rng(0), 256
    real = (np.arange(size) < np.array([[size], [_END]]))[..., None, None]
    shapes = [(2, size, count, width) for count in (heads, kv_heads, kv_heads)]
    q, k, v = (jnp.asarray(np.where(real, rng.normal(size=shape), 100.0), dtype) for shape in shapes)
    return (q, k, v), jnp.asarray(real)


def _norms(got: dict[str, Array], exact: dict[str, Array]) -> dict[str, float]:
    norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32)))  # noqa: E731
    return {name: norm(got[name].astype(jnp.float32) - exact[name]) / norm(exact[name]) for name in exact}


def _apart_from_itself(backend: str, *shapes: Any) -> dict[str, float]:
    """Forwards and backwards."""
    qkv, real = _draw(*shapes)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=qkv[0].shape) * real, jnp.float32)

    def run(attention, *qkv) -> dict[str, Array]:
        value = lambda *qkv: jnp.sum(attention(*qkv).astype(jnp.float32) * weight)  # noqa: E731
        out = jax.jit(attention)(*qkv) * real
        return dict(zip(("out", "dq", "dk", "dv"), (out, *jax.jit(jax.grad(value, (0, 1, 2)))(*qkv)), strict=True))

    return _norms(run(_CAUSAL[backend], *qkv), run(_reference, *(x.astype(jnp.float32) for x in qkv)))


def _apart_from_cache(backend: str, *shapes: Any) -> dict[str, float]:
    """A chunk against two caches in four parts, of which the shorter leaves one empty."""
    qkv, _ = _draw(*shapes)

    def run(attention, q, k, v) -> dict[str, Array]:
        chunk, used = slice(40), jnp.array([k.shape[1], _END], jnp.int32)
        return {"cache": attention(q[:, chunk], k[:, chunk], v[:, chunk], k, v, used)}

    got = run(jax.jit(_against(backend, parts=4)), *qkv)
    exact = run(functools.partial(cache_attention, backend="reference"), *(x.astype(jnp.float32) for x in qkv))
    return _norms(got, exact)


# What attends to what, and how far a back end is there: each is left out for itself.
CHECKS = {"itself": _apart_from_itself, "cache": _apart_from_cache}
_CALLED = {"itself": "sequence", "cache": "cache"}
