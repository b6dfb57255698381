"""Encoded conversations and their frames -> one batch of static shapes.

A *bucket* is a capacity: so many frames, text tokens and labels a row. Every batch takes the smallest bucket that holds
all of its rows, so that a run compiles once a bucket and never again.

    row      text ... <v><v><v> , <v><v><v> ] text ...  0 0 0 0 0     T = X + n * F
             |-------------- length ----------------|  |- padding -|

Labels are listed (position, target, weight), not spread over T: the head computes logits at these positions only.

Context parallelism splits a row over devices as `parts` chunks of about equal length, each of which is a row of its
own with a `parts`-th of the bucket's capacity: whole frames, padding last, and where in its stream it begins.

    chunks   text ... <v><v><v> . | , <v><v><v> ] text . | text ... . . . . . |     capacity of each: T / parts

What a row then needs is what its fullest chunk needs, `parts` times: a bucket holds the row or it does not, as ever.
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
    stops: np.ndarray  # i32[parts, 2]: tokens and frames up to the end of each of its chunks


def chunk_stops(input_ids: np.ndarray, fmt: StreamFormat, parts: int) -> np.ndarray:
    """Where `parts` chunks of a row i32[T] end, in tokens and in frames: i32[parts, 2].

    A frame is never cut: it goes to the side where more of it lies, and a chunk has at most T / parts + n tokens.
    """
    n = fmt.tokens_per_frame
    before = np.concatenate([[0], np.cumsum(np.asarray(input_ids) == fmt.frame_token_id)])  # frame tokens, [T + 1]
    stop = np.arange(1, parts + 1) * len(input_ids) // parts
    inside = before[stop] % n
    stop += np.where(2 * inside > n, n - inside, -inside)
    return np.stack([stop, before[stop] // n], axis=1).astype(np.int32)


def size(encoded: Encoded, fmt: StreamFormat, parts: int = 1) -> Bucket:
    """What a row needs, exactly, as `parts` chunks: what its fullest chunks need, `parts` times."""
    stops = chunk_stops(encoded.input_ids, fmt, parts)
    tokens, frames = np.diff(stops, axis=0, prepend=0).T
    labelled = np.concatenate([[0], np.cumsum(np.asarray(encoded.labels) != IGNORE)])
    labels = np.diff(labelled[stops[:, 0]], prepend=0)
    return Bucket(*(parts * int(x.max()) for x in (frames, tokens - fmt.tokens_per_frame * frames, labels)))


def make_row(
    encoded: Encoded, frames: np.ndarray, fmt: StreamFormat, stream_weight: float = 1.0, parts: int = 1
) -> Row:
    """A row of an encoded conversation (input_ids, labels: i32[T]) and its frames (f32[F, n, d_v] or u8[F, S, S, 3]).

    Raises UserError when the number of frames is not what the conversation says.
    """
    ids, labels = np.asarray(encoded.input_ids, np.int32), np.asarray(encoded.labels, np.int32)
    stops = chunk_stops(ids, fmt, parts)
    if len(frames) != (need := stops[-1, 1]):
        raise UserError(
            f"a conversation of {need} frames came with {len(frames)}: its video is shorter than its text says"
        )
    (position,) = np.nonzero(labels != IGNORE)
    weight = label_weights(encoded, fmt, stream_weight)[position]
    is_stream = ids[position] == fmt.frame_token_id
    return Row(ids, frames, position.astype(np.int32), labels[position], weight, is_stream, stops)


def chunks(row: Row) -> list[Row]:
    """The row's chunks as rows, their labels at the chunk's own positions."""
    out, token, frame, label = [], 0, 0, 0
    for stop, last in row.stops:
        end = int(np.searchsorted(row.label_pos, stop))
        piece = row._replace(
            input_ids=row.input_ids[token:stop],
            frames=row.frames[frame:last],
            label_pos=row.label_pos[label:end] - token,
            label=row.label[label:end],
            label_weight=row.label_weight[label:end],
            label_is_stream=row.label_is_stream[label:end],
            stops=np.array([[stop - token, last - frame]], np.int32),
        )
        out.append(piece)
        token, frame, label = stop, last, end
    return out


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
    Rows of several parts are their chunks side by side, in stream order: T, F and M above are those of a chunk,
    each axis of them is `parts` times as long, label_pos counts within the chunk, length is i32[B, parts], and
    first_position and first_frame, i32[B, parts], tell where in its stream each chunk begins.
    Raises UserError when no bucket holds the rows.
    """
    n, parts = tokens_per_frame, len(rows[0].stops)
    pieces = rows if parts == 1 else [chunk for row in rows for chunk in chunks(row)]
    needs = [Bucket(len(r.frames), len(r.input_ids) - n * len(r.frames), len(r.label)) for r in pieces]
    whole = pick([Bucket(*(parts * need for need in needed)) for needed in needs], buckets, n)
    bucket = Bucket(*(capacity // parts for capacity in whole))
    tokens = bucket.tokens(n)

    def pad(arrays: list[np.ndarray], capacity: int, value: float) -> np.ndarray:
        out = np.full((len(arrays), capacity, *arrays[0].shape[1:]), value, arrays[0].dtype)
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array
        return out

    batch = {
        "input_ids": pad([r.input_ids for r in pieces], tokens, 0),
        "length": np.array([len(r.input_ids) for r in pieces], np.int32),
        "frames": pad([r.frames for r in pieces], bucket.frames, 0),
        "label_pos": pad([r.label_pos for r in pieces], bucket.labels, tokens),
        "label": pad([r.label for r in pieces], bucket.labels, IGNORE),
        "label_weight": pad([r.label_weight for r in pieces], bucket.labels, 0),
        "label_is_stream": pad([r.label_is_stream for r in pieces], bucket.labels, False),
    }
    if parts == 1:
        return batch
    before = np.stack([np.concatenate([[[0, 0]], row.stops[:-1]]) for row in rows]).astype(np.int32)
    first = {"first_position": before[:, :, 0], "first_frame": before[:, :, 1]}
    return {name: x.reshape(len(rows), -1, *x.shape[2:]) for name, x in batch.items()} | first


def fit(
    conversation: list[dict],
    fmt: StreamFormat,
    buckets: Sequence[Bucket],
    parts: int = 1,
    max_frames: int | None = None,
) -> tuple[Encoded, int]:
    """Encodes a conversation, cut at a whole message when it is longer than every bucket or than `max_frames` frames.

    The cut row ends with the last assistant turn that fits; everything after it is left out, and the caller gets the
    number of messages left out (0: nothing), so that it can say so. Raises UserError when not even the first assistant
    turn fits.
    """

    def fits(encoded: Encoded) -> bool:
        need = size(encoded, fmt, parts)
        short = max_frames is None or size(encoded, fmt).frames <= max_frames
        return short and any(bucket.holds(need) for bucket in buckets)

    if fits(encoded := encode(conversation, fmt)):
        return encoded, 0
    ends = [i + 1 for i, message in enumerate(conversation) if message["role"] == "assistant"]
    # A longer beginning never needs less, save where the chunks of several parts fall luckily: bisection finds how many
    # of them fit.
    count = bisect.bisect_left(ends, True, key=lambda end: not fits(encode(conversation[:end], fmt)))
    if count:
        return encode(conversation[: ends[count - 1]], fmt), len(conversation) - ends[count - 1]
    need = size(encode(conversation[: ends[0] if ends else None], fmt), fmt, parts)
    split = f" (split into 2 x mesh.context = {parts} chunks of whole frames)" if parts > 1 else ""
    raise UserError(
        f"a stream needs {need.frames} frames, {need.text} text tokens and {need.labels} labels up to its first reply"
        f"{split}, more than any of data.buckets ({[tuple(b) for b in buckets]}): add a larger one"
    )
