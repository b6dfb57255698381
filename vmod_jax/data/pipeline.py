"""Streams -> batches, by Grain: one random-access data set of global batches, indexed by the step.

    batch number s  =  the s-th group of batch_size streams in an endless sequence of epochs, each shuffled anew

so that the iterator's whole state is one number, and a run that resumes on another number of hosts continues with the
very batch that came next. Every process encodes the text of the whole global batch (cheap), which tells the bucket, and
reads the frames of its own rows only.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from vmod_jax.data.batch import Bucket, collate, fit, make_row, pick, size
from vmod_jax.data.conversation import Encoded, StreamFormat
from vmod_jax.data.correction import corrected
from vmod_jax.data.mixture import mixture, order
from vmod_jax.data.sources.table import SOURCES
from vmod_jax.data.streams import Streams, decoded, spot_tokenizer
from vmod_jax.errors import UserError

__all__ = ["SOURCES", "Streams", "batches", "decoded", "make_buckets", "open_streams", "tokenizer_of"]

log = logging.getLogger(__name__)
ENDLESS = 2**50  # streams of a mixture, whose sources repeat for ever


# --- the batches ------------------------------------------------------------------------------------------------------


def batches(
    streams: Streams,
    fmt: StreamFormat,
    buckets: Sequence[Bucket],
    batch_size: int,
    *,
    seed: int,
    rows: slice | None = None,
    stream_weight: float = 1.0,
    prefetch: int = 2,
    parts: int = 1,
    max_frames: int | None = None,
    corrections: float = 0.0,
) -> grain.DatasetIterator:
    """An endless iterator over batches (see `data/batch.py`), of which this process builds the `rows`.

    Its `get_state()` is JSON: the number of the next batch. Threads build the next `prefetch` batches, which bounds the
    memory; the same seed gives the same batches, however many. parts: chunks of a row, of context parallelism;
    max_frames: where streams are cut, at a whole message; corrections: the share of streams in which a reply goes wrong
    (`data/correction.py`).
    """
    n = fmt.tokens_per_frame
    cut: set[int] = set()

    def encoded(place: int, index: int) -> tuple[int, Encoded]:
        conversation = streams.samples[index].conversation
        rng = np.random.default_rng([seed % 2**32, place])
        if corrections and rng.random() < corrections:
            conversation = corrected(conversation, rng)
        row, left_out = fit(conversation, fmt, buckets, parts, max_frames)
        if left_out and index not in cut:
            cut.add(index)
            sample = streams.samples[index]
            log.warning(
                "stream %d (%s from frame %d) is too long for data.buckets or data.max_frames: "
                "its last %d of %d messages are left out",
                *(index, sample.video, sample.start, left_out, len(sample.conversation)),
            )
        return index, row

    def build(group: Sequence[tuple[int, Encoded]]) -> dict[str, np.ndarray]:
        bucket = pick([size(row, fmt, parts) for _, row in group], buckets, n)
        mine = group[rows or slice(None)]
        made = [make_row(row, read(index, row), fmt, stream_weight, parts) for index, row in mine]
        return collate(made, [bucket], n)

    def read(index: int, row: Encoded) -> np.ndarray:
        sample = streams.samples[index]
        return streams.frames(sample._replace(stop=sample.start + size(row, fmt).frames))

    if streams.parts:
        source = grain.MapDataset.range(ENDLESS).map(order(streams.parts, seed))
    else:
        source = grain.MapDataset.range(len(streams.samples)).seed(seed % 2**32).shuffle().repeat()
    data = source.map_with_index(encoded).batch(batch_size, batch_fn=build)
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)))


def make_buckets(
    given: Sequence[Sequence[int]], streams: Streams, fmt: StreamFormat, max_frames: int, parts: int = 1
) -> list[Bucket]:
    """The config's buckets (frames, text, labels), or, where it gives none, one that holds every stream.

    The latter reads all conversations once, rounds up (to 4 frames, 32 text tokens, 32 labels), and stops at
    `max_frames` frames, where streams are cut. parts: chunks of a row, over which frames must divide.
    """
    if given:
        buckets = [Bucket(*map(int, bucket)) for bucket in given]
        if wrong := [tuple(bucket) for bucket in buckets if bucket.frames % parts]:
            raise UserError(
                f"the {wrong[0][0]} frames of data.buckets' {wrong[0]} do not divide over 2 x mesh.context = {parts} "
                f"chunks of whole frames: give a multiple of {parts}"
            )
        return buckets
    huge = Bucket(max_frames, 2**31, 2**31)
    sizes = [size(fit(sample.conversation, fmt, [huge])[0], fmt, parts) for sample in streams.samples]
    need = Bucket(*map(max, zip(*sizes, strict=True)))
    up = [-(-value // (step := math.lcm(to, parts))) * step for value, to in zip(need, (4, 32, 32), strict=True)]
    return [Bucket(*up)]


# --- where streams come from ------------------------------------------------------------------------------------------


def open_streams(data: Any, split: str, image_size: int) -> Streams:
    """The streams of a config's `data` section; split is "train" or "val", frames are image_size pixels square.

    Raises UserError for an unknown data.name, or when the split holds no stream.
    """
    weights = {name: weight for name, weight in data.get("mix", {}).items() if weight}
    if weights:
        return mixture({name: SOURCES[name](data, split, image_size) for name in weights}, weights, split)
    if data.name not in SOURCES:
        raise UserError(f"data.name='{data.name}' is unknown: use one of {', '.join(SOURCES)}")
    streams = SOURCES[data.name](data, split, image_size)
    if not len(streams.samples):
        raise UserError(f"data.name='{data.name}' has no streams in its split '{split}': check data.root and data.path")
    return streams


def tokenizer_of(streams: Streams) -> Any:
    """The tokenizer that a data set brings, or one made of what is said in it; None where it has neither."""
    return streams.tokenizer or (spot_tokenizer(sorted(set(streams.texts()))) if streams.texts else None)
