"""Encoded conversations and their frames -> one batch of static shapes.

A *bucket* is a capacity: so many frames, text tokens and labels a row. Every batch takes the smallest bucket that holds
all of its rows, so that a run compiles once a bucket and never again.

    row      text ... <v><v><v> , <v><v><v> ] text ...  0 0 0 0 0     T = X + n * F
             |-------------- length ----------------|  |- padding -|

Labels are listed (position, target, weight), not spread over T: the head computes logits at these positions only.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vmod_jax.data.conversation import IGNORE, Encoded, StreamFormat, encode, label_weights
from vmod_jax.errors import UserError


class Bucket(NamedTuple):
    """Capacity of one row: F frames, X text tokens (all that are not frame tokens), M labels."""

    frames: int
    text: int
    labels: int

    def tokens(self, tokens_per_frame: int) -> int:
        """T, the length of a row's token axis."""
        return self.text + tokens_per_frame * self.frames

    def holds(self, size: "Bucket") -> bool:
        return all(capacity >= need for capacity, need in zip(self, size, strict=True))


class Row(NamedTuple):
    """One stream, unpadded. T tokens, F frames, M labels, n tokens a frame."""

    input_ids: np.ndarray  # i32[T]
    frames: np.ndarray  # f32[F, n, d_v] features | u8[F, S, S, 3] pixels
    label_pos: np.ndarray  # i32[M], ascending
    label: np.ndarray  # i32[M]
    label_weight: np.ndarray  # f32[M]
    label_is_stream: np.ndarray  # bool[M]: a frame's last token, "speak or stay silent"


def size(encoded: Encoded, fmt: StreamFormat) -> Bucket:
    """What a row needs, exactly."""
    ids, labels = np.asarray(encoded.input_ids), np.asarray(encoded.labels)
    frame_tokens = int((ids == fmt.frame_token_id).sum())
    return Bucket(frame_tokens // fmt.tokens_per_frame, len(ids) - frame_tokens, int((labels != IGNORE).sum()))


def make_row(encoded: Encoded, frames: np.ndarray, fmt: StreamFormat, stream_weight: float = 1.0) -> Row:
    """A row of an encoded conversation (input_ids, labels: i32[T]) and its frames (f32[F, n, d_v] or u8[F, S, S, 3]).

    Raises UserError when the number of frames is not what the conversation says.
    """
    ids, labels = np.asarray(encoded.input_ids, np.int32), np.asarray(encoded.labels, np.int32)
    need = size(encoded, fmt).frames
    if len(frames) != need:
        raise UserError(
            f"a conversation of {need} frames came with {len(frames)}: its video is shorter than its text says"
        )
    (position,) = np.nonzero(labels != IGNORE)
    weight = label_weights(encoded, fmt, stream_weight)[position]
    return Row(ids, frames, position.astype(np.int32), labels[position], weight, ids[position] == fmt.frame_token_id)


def pick(sizes: Sequence[Bucket], buckets: Sequence[Bucket], tokens_per_frame: int) -> Bucket:
    """The smallest bucket (fewest tokens, then fewest labels) that holds every one of `sizes`; else UserError."""
    need = Bucket(*map(max, zip(*sizes, strict=True)))
    for bucket in sorted(buckets, key=lambda b: (b.tokens(tokens_per_frame), b.labels)):
        if bucket.holds(need):
            return bucket
    raise UserError(
        f"no bucket holds {need.frames} frames, {need.text} text tokens and {need.labels} labels: "
        f"add one to data.buckets (now {[tuple(b) for b in buckets]})"
    )


def collate(rows: Sequence[Row], buckets: Sequence[Bucket], tokens_per_frame: int) -> dict[str, np.ndarray]:
    """Rows padded to the smallest bucket that holds them all.

    Returns, with B rows in the bucket (F, X, M), T = X + n * F:
        input_ids i32[B, T] (padding 0), length i32[B], frames f32[B, F, n, d_v] | u8[B, F, S, S, 3] (padding 0),
        label_pos i32[B, M] (padding T), label i32[B, M] (padding -100), label_weight f32[B, M] (padding 0),
        label_is_stream bool[B, M].
    Raises UserError when no bucket holds the rows.
    """
    sizes = [Bucket(len(r.frames), len(r.input_ids) - tokens_per_frame * len(r.frames), len(r.label)) for r in rows]
    bucket = pick(sizes, buckets, tokens_per_frame)
    tokens = bucket.tokens(tokens_per_frame)

    def pad(arrays: list[np.ndarray], capacity: int, value: float) -> np.ndarray:
        out = np.full((len(arrays), capacity, *arrays[0].shape[1:]), value, arrays[0].dtype)
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array
        return out

    return {
        "input_ids": pad([r.input_ids for r in rows], tokens, 0),
        "length": np.array([len(r.input_ids) for r in rows], np.int32),
        "frames": pad([r.frames for r in rows], bucket.frames, 0),
        "label_pos": pad([r.label_pos for r in rows], bucket.labels, tokens),
        "label": pad([r.label for r in rows], bucket.labels, IGNORE),
        "label_weight": pad([r.label_weight for r in rows], bucket.labels, 0),
        "label_is_stream": pad([r.label_is_stream for r in rows], bucket.labels, False),
    }


def fit(conversation: list[dict], fmt: StreamFormat, buckets: Sequence[Bucket]) -> tuple[Encoded, int]:
    """Encodes a conversation, cut at a whole message when it is longer than every bucket.

    The cut row ends with the last assistant turn that fits; everything after it is left out, and the caller gets the
    number of messages left out (0: nothing), so that it can say so. Raises UserError when not even the first assistant
    turn fits.
    """

    def fits(encoded: Encoded) -> bool:
        need = size(encoded, fmt)
        return any(bucket.holds(need) for bucket in buckets)

    if fits(encoded := encode(conversation, fmt)):
        return encoded, 0
    ends = [i + 1 for i, message in enumerate(conversation) if message["role"] == "assistant"]
    # A longer beginning never needs less: bisection finds how many of them fit.
    count = bisect.bisect_left(ends, True, key=lambda end: not fits(encode(conversation[:end], fmt)))
    if count:
        return encode(conversation[: ends[count - 1]], fmt), len(conversation) - ends[count - 1]
    need = size(encode(conversation[: ends[0] if ends else None], fmt), fmt)
    raise UserError(
        f"a stream needs {need.frames} frames, {need.text} text tokens and {need.labels} labels up to its first reply, "
        f"more than any of data.buckets ({[tuple(b) for b in buckets]}): add a larger one"
    )
