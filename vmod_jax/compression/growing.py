"""A cache of codes that grows token by token: whole groups of G tokens are quantised once, as they leave a window.

    slots   0 .............. settled ........ used
            codes of groups  |  exact: `tail`  |        settled is a multiple of G

What is in use settles at the start of a chunk, before the chunk is written, so that the chunk attends to codes of what
lay more than W tokens back, and to the rest and itself exactly; and so that a roll-back inside the last chunk leaves
the very bits that were there before it. A group's codes depend on its own tokens alone, and on nothing that a row of
the batch shares with another.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from vmod_jax.compression import int8, online, vidkv
from vmod_jax.compression.floats import NEVER
from vmod_jax.compression.online import HIDDEN, dot, from_rows, to_rows

TILE = 512  # slots that are decoded at once


class Coder(NamedTuple):
    """encode: f32[..., G, h] -> codes, a tree; decode: (codes, G) -> f32[..., G, h]"""

    encode: Callable[[Array], Any]
    decode: Callable[[Any, int], Array]


@dataclasses.dataclass(frozen=True)
class Codec:
    """How keys and values of a group are coded, names of `CODERS`.

    share: of channels that take two bits, and fft, of "mixed"; gamma: of "ternary"; group: tokens that share a scale, a
    multiple of 8; window: tokens that stay exact; scale: dtype of scales, means and minima
    """

    key: str = "mixed"
    value: str = "ternary"
    share: float = 0.5
    fft: bool = True
    gamma: float = 0.7
    group: int = 64
    window: int = 128
    scale: str = "bfloat16"


CODERS: dict[str, Callable[[Codec], Coder]] = {
    "mixed": lambda c: Coder(
        lambda x: vidkv.encode_mixed(x, c.share, c.fft, c.scale), lambda codes, _: vidkv.decode_mixed(codes, c.fft)
    ),
    "two": lambda c: Coder(lambda x: vidkv.encode_two(x, c.scale), lambda codes, _: vidkv.decode_two(codes)),
    "ternary": lambda c: Coder(lambda x: vidkv.encode_ternary(x, c.gamma, c.scale), vidkv.decode_ternary),
    "int8_key": lambda c: Coder(lambda x: int8.encode_key(x, c.scale), lambda codes, _: int8.decode(codes)),
    "int8_value": lambda c: Coder(lambda x: int8.encode_value(x, c.scale), lambda codes, _: int8.decode(codes)),
    "exact": lambda c: Coder(lambda x: x, lambda codes, _: codes),
}

VIDKV = Codec()
INT8 = Codec("int8_key", "int8_value")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Grouped:
    """What one layer holds as codes.

    key, value: codes, leaves [B, g, K, ...] of g groups; tail_key, tail_value: [B, R, K, h], slot settled + i at i
    position: i32[B, S], NEVER in empty slots; used, settled: i32[B] slots
    """

    key: Any
    value: Any
    tail_key: Array
    tail_value: Array
    position: Array
    used: Array
    settled: Array
    codec: Codec = dataclasses.field(metadata={"static": True})


def make(slots: int, batch: int, heads: int, width: int, dtype: Any, chunk: int, codec: Codec = VIDKV) -> Grouped:
    """An empty cache of `slots` slots a row. chunk: the most tokens that are written at once."""
    groups, tail = -(-slots // codec.group), codec.window + codec.group - 1 + chunk
    one = jax.ShapeDtypeStruct((batch, groups, heads, codec.group, width), jnp.float32)
    empty = lambda name: jax.tree.map(  # noqa: E731
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(CODERS[name](codec).encode, one)
    )
    exact = lambda: jnp.zeros((batch, tail, heads, width), dtype)  # noqa: E731
    none = lambda: jnp.zeros(batch, jnp.int32)  # noqa: E731
    position = jnp.full((batch, groups * codec.group), NEVER, jnp.int32)
    return Grouped(empty(codec.key), empty(codec.value), exact(), exact(), position, none(), none(), codec)


def _groups(x: Array, group: int) -> Array:
    """[B, g G, K, h] -> f32[B, g, K, G, h]"""
    batch, slots, heads, width = x.shape
    return x.reshape(batch, slots // group, group, heads, width).swapaxes(2, 3).astype(jnp.float32)


def settle(layer: Grouped, chunk: int) -> Grouped:
    """Quantises the groups that lie before the window. chunk: the most tokens that were written since the last time."""
    codec, group = layer.codec, layer.codec.group
    goal = jnp.maximum(layer.settled, group * (jnp.maximum(layer.used - codec.window, 0) // group))
    moved = goal - layer.settled

    def leave(layer: Grouped) -> Grouped:
        tail = layer.tail_key.shape[1]
        some = min(-(-chunk // group) + 1, -(-tail // group))
        number = jnp.arange(some)
        rows = jnp.arange(moved.shape[0])[:, None]
        # Groups that stay are sent out of range and dropped.
        total = layer.position.shape[1] // group
        place = jnp.where(number < moved[:, None] // group, layer.settled[:, None] // group + number, total)

        def put(name: str, held: Any, exact: Array) -> Any:
            size = some * group
            leaving = jnp.pad(exact[:, :size], ((0, 0), (0, max(0, size - tail)), (0, 0), (0, 0)))
            codes = CODERS[name](codec).encode(_groups(leaving, group))
            return jax.tree.map(lambda x, new: x.at[rows, place].set(new, mode="drop"), held, codes)

        shift = jnp.minimum(jnp.arange(tail) + moved[:, None], tail - 1)[..., None, None]
        stay = lambda x: jnp.take_along_axis(x, shift, axis=1)  # noqa: E731
        return dataclasses.replace(
            layer,
            key=put(codec.key, layer.key, layer.tail_key),
            value=put(codec.value, layer.value, layer.tail_value),
            tail_key=stay(layer.tail_key),
            tail_value=stay(layer.tail_value),
            settled=goal,
        )

    return lax.cond(jnp.any(moved > 0), leave, lambda layer: layer, layer)


def write(layer: Grouped, key: Array, value: Array, position: Array) -> Grouped:
    """Settles, then puts a chunk behind the slots in use. key, value: [B, C, K, h]; position: i32[B, C].

    Padding has position NEVER and is overwritten by the next chunk. `used` is the caller's to move, once all layers
    have written.
    """
    chunk = layer.tail_key.shape[1] - layer.codec.window - layer.codec.group + 1
    if key.shape[1] > chunk:
        raise ValueError(f"a chunk of {key.shape[1]} tokens for a cache made for {chunk}")
    layer = settle(layer, chunk)
    rows, index = jnp.arange(key.shape[0])[:, None], jnp.arange(key.shape[1])
    slot = layer.used[:, None] + index
    return dataclasses.replace(
        layer,
        tail_key=layer.tail_key.at[rows, slot - layer.settled[:, None]].set(key, mode="drop"),
        tail_value=layer.tail_value.at[rows, slot - layer.settled[:, None]].set(value, mode="drop"),
        position=layer.position.at[rows, slot].set(position, mode="drop"),
    )


def advance(layer: Grouped, count: Array) -> Grouped:
    return dataclasses.replace(layer, used=layer.used + count)


def read_groups(layer: Grouped, start: Array | int, count: int) -> tuple[Array, Array]:
    """`count` groups from group `start` on, decoded: -> keys, values f32[B, count G, K, h]. Only settled ones count."""
    group = layer.codec.group

    def read(name: str, held: Any) -> Array:
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, count, 1), held)
        x = CODERS[name](layer.codec).decode(part, group)
        return x.swapaxes(2, 3).reshape(x.shape[0], count * group, *x.shape[2:3], x.shape[-1])

    return read(layer.codec.key, layer.key), read(layer.codec.value, layer.value)


def read(layer: Grouped) -> tuple[Array, Array]:
    """All slots as a chunk sees them, codes decoded and the tail in its place: -> keys, values [B, S, K, h]."""
    slots = layer.position.shape[1]
    index = jnp.arange(slots) - layer.settled[:, None]
    exact = (index >= 0)[..., None, None]
    place = jnp.clip(index, 0, layer.tail_key.shape[1] - 1)[..., None, None]
    whole = read_groups(layer, 0, slots // layer.codec.group)
    tails = layer.tail_key, layer.tail_value
    key, value = (
        jnp.where(exact, jnp.take_along_axis(tail, place, axis=1), x.astype(tail.dtype))
        for x, tail in zip(whole, tails, strict=True)
    )
    return key, value


# --- attention --------------------------------------------------------------------------------------------------------


def attend(layer: Grouped, q: Array, used: Array) -> Array:
    """Attention of a chunk that `write` has put there, to what lay before it and causally to itself.

    q: [B, C, H, h]; used: i32[B], slots before the chunk -> [B, C, H, h]. Codes are decoded tile by tile, and only as
    many as the batch's longest row has.
    """
    rows, size = to_rows(q, layer.tail_key.shape[2]), q.shape[1]
    groups = layer.position.shape[1] // layer.codec.group
    per = max(d for d in range(1, max(1, TILE // layer.codec.group) + 1) if groups % d == 0)
    width = per * layer.codec.group

    def meet(state, keys: Array, values: Array, seen: Array):
        """keys, values: [B, S, K, h]; seen: bool[B, R or 1, S]"""
        keys, values = (x.swapaxes(1, 2).astype(jnp.float32) for x in (keys, values))
        logits = jnp.where(seen[:, None], dot("bkrh,bksh->bkrs", rows, keys), HIDDEN)
        return online.tile(state, logits, lambda weights: dot("bkrs,bksh->bkrh", weights, values))

    def tile(j, state):
        there = j * width + jnp.arange(width) < layer.settled[:, None]
        return meet(state, *read_groups(layer, j * per, per), there[:, None])

    state = lax.fori_loop(0, -(-jnp.max(layer.settled) // width), tile, online.nothing(rows))
    place = used[:, None] + jnp.arange(rows.shape[2]) % size
    slot = layer.settled[:, None] + jnp.arange(layer.tail_key.shape[1])
    _, total, out = meet(state, layer.tail_key, layer.tail_value, slot[:, None] <= place[..., None])
    return from_rows(out / total, q)


def attend_whole(q: Array, k: Array, v: Array, before: Array, codec: Codec) -> Array:
    """What `attend` gives chunk by chunk, for a whole sequence: slow and plain.

    q: [B, T, H, h]; k, v: [B, T, K, h]; before: i32[B, T], slots in use when each query's chunk began -> [B, T, H, h].
    """
    rows, group, size = to_rows(q, k.shape[2]), codec.group, q.shape[1]
    settled = group * (jnp.maximum(before - codec.window, 0) // group)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -size % group), (0, 0), (0, 0)))  # noqa: E731
    ends = lambda x: x.astype(k.dtype).swapaxes(2, 3).reshape(x.shape[0], -1, *k.shape[2:])[:, :size]  # noqa: E731
    through = lambda name, x: ends(  # noqa: E731
        CODERS[name](codec).decode(CODERS[name](codec).encode(_groups(pad(x), group)), group)
    )
    turn = lambda x: x.swapaxes(1, 2).astype(jnp.float32)  # noqa: E731
    slot, repeat = jnp.arange(size), rows.shape[2] // size
    coded = jnp.tile(slot < settled[..., None], (1, repeat, 1))[:, None]
    seen = jnp.tile(slot <= slot[:, None], (repeat, 1))
    logits = [dot("bkrh,bksh->bkrs", rows, turn(x)) for x in (through(codec.key, k), k)]
    weights = jax.nn.softmax(jnp.where(seen, jnp.where(coded, *logits), -jnp.inf))
    out = dot("bkrs,bksh->bkrh", jnp.where(coded, weights, 0), turn(through(codec.value, v)))
    return from_rows(out + dot("bkrs,bksh->bkrh", jnp.where(coded, 0, weights), turn(v)), q)


# --- growing and going back -------------------------------------------------------------------------------------------


def grow(layer: Grouped, slots: int) -> Grouped:
    """The same cache with room for `slots` slots a row."""
    group = layer.codec.group
    extra = -(-slots // group) - layer.position.shape[1] // group
    more = lambda x: jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    return dataclasses.replace(
        layer,
        key=jax.tree.map(more, layer.key),
        value=jax.tree.map(more, layer.value),
        position=jnp.pad(layer.position, ((0, 0), (0, extra * group)), constant_values=NEVER),
    )


def roll_back(layer: Grouped, position: Array) -> Grouped:
    """Forgets every token at `position: i32[B]` or later. Right as far as `exact_from`, which the caller checks."""
    stays = layer.position < position[:, None]
    return dataclasses.replace(
        layer, position=jnp.where(stays, layer.position, NEVER), used=stays.sum(-1, dtype=jnp.int32)
    )


def exact_from(layer: Grouped) -> Array:
    """The earliest position to which each row can be rolled back: i32[B]."""
    last = jnp.maximum(layer.settled - 1, 0)[:, None]
    return jnp.where(layer.settled > 0, jnp.take_along_axis(layer.position, last, axis=1)[:, 0] + 1, 0)


def num_bytes(layer: Grouped) -> int:
    """Bytes of codes, scales, the exact tail and positions, of arrays or of their shapes."""
    arrays = layer.key, layer.value, layer.tail_key, layer.tail_value, layer.position
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
