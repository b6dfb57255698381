"""Where a sequence's frames lie, and the compacted sequences that routed layers compute on.

One row of a batch is one stream: text and whole frames of `n` tokens in stream order, then padding. Because padding
comes last, plain causal attention never lets a real token see it, before or after compaction.

    row        t t F F F F t F F F F t . .          n = 4; t text, F frame token, . padding
    compacted  t t f f     t f f     t . .          k = 2 of each frame, original positions

The number of slots is known without the data, `T - F * (n - k)`, so every shape is static and nothing overflows as
long as each row's text fits in `T - F * n` tokens, which is how batches are made. All indices are unique: gathers go
both ways, forwards and backwards, and no gradient is ever a scatter of floats.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array


class Layout(NamedTuple):
    """The frames of a batch of rows. All arrays are i32.

    vision:      [B, T]  index of a vision token among its row's vision tokens (frame * n + token), -1 elsewhere
    frame_start: [B, F]  index in the row of each frame's first token; T for a frame that the row does not have
    frame_index: [B, F]  number of the frame in its stream
    position:    [B, T]  place in the whole stream, which RoPE and attention use
    valid:       bool[B, T]  False on padding
    """

    vision: Array
    frame_start: Array
    frame_index: Array
    position: Array
    valid: Array


def _put(x: Array, index: Array, value: Array) -> Array:
    """x with x[b, index[b, ...]] = value[b, ...]; indices outside are dropped. x: [B, S]; value as wide as index.

    Row by row: told so, XLA's partitioner leaves rows where they are.
    """
    value = jnp.broadcast_to(value, index.shape)
    return jax.vmap(lambda row, index, value: row.at[index].set(value, mode="drop"))(x, index, value)


def find_frames(
    input_ids: Array,
    length: Array,
    frame_token_id: int,
    n: int,
    num_frames: int,
    first_position: Array | int = 0,
    first_frame: Array | int = 0,
) -> Layout:
    """Finds the frames of `input_ids: i32[B, T]`, of which row b uses the first `length[b]` tokens.

    first_position, first_frame: i32[B] or int, where this chunk begins in its stream.
    """
    chex.assert_rank(input_ids, 2)
    batch, size = input_ids.shape
    index = jnp.arange(size, dtype=jnp.int32)
    valid = index < length[:, None]
    is_vision = (input_ids == frame_token_id) & valid
    order = jnp.cumsum(is_vision, axis=1, dtype=jnp.int32) - 1
    begins = is_vision & (order % n == 0)
    frame_start = jnp.full((batch, num_frames), size, jnp.int32)
    frame_start = _put(frame_start, jnp.where(begins, order // n, num_frames), index)
    first_position, first_frame = jnp.asarray(first_position), jnp.asarray(first_frame)
    return Layout(
        vision=jnp.where(is_vision, order, -1),
        frame_start=frame_start,
        frame_index=first_frame[..., None] + jnp.broadcast_to(jnp.arange(num_frames), (batch, num_frames)),
        position=first_position[..., None] + jnp.broadcast_to(index, (batch, size)),
        valid=valid,
    )


def take_rows(x: Array, index: Array, inverse: Array) -> Array:
    """`out[b, r] = x[b, index[b, r]]`, zero where the index lies outside; its gradient is the gather by `inverse`.

    x: [B, S, d]; index: i32[B, R], without repeats inside its range; inverse: i32[B, S], with inverse[index[r]] = r
    and a value outside [0, R) for every row of x that is not taken. -> [B, R, d]
    """
    return _take_rows(x, index, inverse)


def _gather(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="fill", fill_value=0)


@jax.custom_vjp
def _take_rows(x: Array, index: Array, inverse: Array) -> Array:
    return _gather(x, index)


_take_rows.defvjp(
    lambda x, index, inverse: (_gather(x, index), inverse),
    lambda inverse, g: (_gather(g, inverse), None, None),
)


@jax.custom_vjp
def add_rows(x: Array, rows: Array, index: Array, inverse: Array) -> Array:
    """x with `rows[b, r]` added at `index[b, r]`; every other row as it is, to the bit.

    x: [B, S, d]; rows: [B, R, d]; index, inverse: as for `take_rows`. -> [B, S, d]. Its gradient needs the index only.
    """
    there = (inverse >= 0) & (inverse < rows.shape[1])
    # A zero is not added to the others: it would turn -0.0 into 0.0.
    return jnp.where(there[..., None], x + _gather(rows, inverse), x)


add_rows.defvjp(
    lambda x, rows, index, inverse: (add_rows(x, rows, index, inverse), index),
    lambda index, g: (g, _gather(g, index), None, None),
)


def invert(index: Array, size: int) -> Array:
    """The inverse of unique indices: i32[B, R] into [0, size) -> i32[B, size]; R where nothing points to."""
    batch, count = index.shape
    inverse = jnp.full((batch, size), count, jnp.int32)
    # Negative indices would count from the end: send them, too, out of range.
    index = jnp.where(index < 0, size, index)
    return _put(inverse, index, jnp.arange(count, dtype=jnp.int32))


class Slots(NamedTuple):
    """The part of a compaction that does not depend on which tokens are kept. All arrays are i32.

    text:  [B, S]  row index of the text token in each slot; T where the slot is a frame's or empty
    frame: [B, F]  slot of each frame's first kept token; S for a frame that the row does not have
    """

    text: Array
    frame: Array


def compaction_slots(layout: Layout, n: int, k: int) -> Slots:
    """Where text and frames go when `k` of each frame's `n` tokens are kept. S = T - F * (n - k)."""
    batch, size = layout.vision.shape
    num_frames = layout.frame_start.shape[1]
    capacity = max(1, size - num_frames * (n - k))  # a chunk of frames alone keeps nothing at k = 0
    index = jnp.arange(size, dtype=jnp.int32)
    has_frame = layout.frame_start < size
    begins = _put(jnp.zeros((batch, size), jnp.int32), layout.frame_start, jnp.int32(1))
    frames_before = jnp.cumsum(begins, axis=1)
    is_text = layout.valid & (layout.vision < 0)
    slot = jnp.where(is_text, index - frames_before * (n - k), capacity)
    text = _put(jnp.full((batch, capacity), size, jnp.int32), slot, index)
    frame = layout.frame_start - jnp.arange(num_frames, dtype=jnp.int32) * (n - k)
    return Slots(text, jnp.where(has_frame, frame, capacity))


class Compaction(NamedTuple):
    """A routed layer's sequence. All arrays are i32 unless said otherwise.

    index:    [B, S]  row index of the token in each slot, ascending; T in empty slots (which come last)
    inverse:  [B, T]  slot of each token; S for tokens that are skipped and for padding
    vision:   bool[B, S]  whether the slot holds a vision token
    """

    index: Array
    inverse: Array
    vision: Array


def compact(layout: Layout, slots: Slots, kept: Array) -> Compaction:
    """All text and the kept tokens of each frame, in stream order. kept: i32[B, F, k], ascending in each frame."""
    chex.assert_rank(kept, 3)
    batch, size = layout.vision.shape
    capacity = slots.text.shape[1]
    slot = slots.frame[:, :, None] + jnp.arange(kept.shape[2], dtype=jnp.int32)
    has_frame = layout.frame_start[:, :, None] < size
    slot = jnp.where(has_frame, slot, capacity)
    index = _put(slots.text, slot, layout.frame_start[:, :, None] + kept)
    vision = _put(jnp.zeros((batch, capacity), bool), slot, jnp.array(True))
    return Compaction(index, invert(index, size), vision)


def by_frame(values: Array, frame_start: Array, n: int, fill: int) -> Array:
    """The values of each frame's tokens: [B, T], i32[B, F] -> [B, F, n]; `fill` for frames that a row lacks."""
    index = frame_start[:, :, None] + jnp.arange(n)
    flat = index.reshape(index.shape[0], -1)
    return jnp.take_along_axis(values, flat, axis=1, mode="fill", fill_value=fill).reshape(index.shape)


def take_frames(values: Array, layout: Layout, packed: Compaction) -> Array:
    """The values of the kept tokens, each in its slot: [B, F, n] -> [B, S]; zeros in the other slots."""
    batch, frames, n = values.shape
    order = jnp.take_along_axis(layout.vision, packed.index, axis=1, mode="fill", fill_value=-1)
    slot = by_frame(packed.inverse, layout.frame_start, n, packed.index.shape[1]).reshape(batch, -1)
    return take_rows(values.reshape(batch, -1, 1), jnp.where(packed.vision, order, frames * n), slot)[..., 0]
