"""Streams -> batches, by Grain: one random-access data set of global batches, indexed by the step.

    batch number s  =  the s-th group of batch_size streams in an endless sequence of epochs, each shuffled anew

so that the iterator's whole state is one number, and a run that resumes on another number of hosts continues with the
very batch that came next. Every process encodes the text of the whole global batch (cheap), which tells the bucket, and
reads the frames of its own rows only.
"""

import functools
import hashlib
import json
import logging
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from vmod_jax.caches import cache_folder
from vmod_jax.data.batch import Bucket, collate, fit, make_row, pick, size
from vmod_jax.data.conversation import Encoded, Sample, StreamFormat
from vmod_jax.data.storage import open_source, read_meta, replacing
from vmod_jax.data.tokenizer import train_tokenizer
from vmod_jax.errors import UserError

log = logging.getLogger(__name__)


class Streams(NamedTuple):
    """A data set's streams and how to read their frames."""

    samples: Sequence[Sample]
    frames: Callable[[Sample], np.ndarray]  # -> f32[F, n, d_v] features | u8[F, S, S, 3] pixels, F = stop - start
    tokenizer: Any  # a tokenizer or its folder; None when the data set does not bring one
    root: Path | None = None  # the folder of the videos, where there is one


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
) -> grain.DatasetIterator:
    """An endless iterator over batches (see `data/batch.py`), of which this process builds the `rows`.

    Its `get_state()` is JSON: the number of the next batch. Threads build the next `prefetch` batches, which bounds the
    memory; the same seed gives the same batches, however many. parts: chunks of a row, of context parallelism;
    max_frames: where streams are cut, at a whole message.
    """
    n = fmt.tokens_per_frame
    cut: set[int] = set()

    def encoded(index: int) -> tuple[int, Encoded]:
        row, left_out = fit(streams.samples[index].conversation, fmt, buckets, parts, max_frames)
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

    source = grain.MapDataset.range(len(streams.samples)).seed(seed % 2**32).shuffle().repeat()
    data = source.map(encoded).batch(batch_size, batch_fn=build)
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
    if data.name not in SOURCES:
        raise UserError(f"data.name='{data.name}' is unknown: use one of {', '.join(SOURCES)}")
    streams = SOURCES[data.name](data, split, image_size)
    if not len(streams.samples):
        raise UserError(f"data.name='{data.name}' has no streams in its split '{split}': check data.root and data.path")
    return streams


def shapes(data: Any, split: str, image_size: int) -> Streams:
    """Generated videos of a small world (`data/sources/shapes.py`), made once, in data.root or in the cache."""
    from vmod_jax.data.sources import shapes

    if data.world not in shapes.WORLDS:
        raise UserError(f"data.world='{data.world}' is unknown: use one of {', '.join(shapes.WORLDS)}")
    world = shapes.WORLDS[data.world]
    counts = {name: data[f"{name}_videos"] for name in ("train", "val", "test")}
    # Another world than today's would be other videos under the same name.
    digest = zlib.crc32(repr(world).encode())
    name = "-".join(["shapes", data.world, *map(str, counts.values()), f"seed{data.seed}", f"{digest:08x}"])
    root = Path(data.root).expanduser() if data.root else cache_folder() / name
    if not (root / "narrations.json").exists():
        shapes.generate(root, **counts, seed=data.seed, world=world)
    there = {name: len(videos) for name, videos in json.loads((root / "splits.json").read_text()).items()}
    if there != counts:
        raise UserError(f"{root} holds {there} videos, the configuration says {counts}: name another data.root")
    return _narrated(root, data.fps, split, image_size, shapes.sentences(world))


def narration(data: Any, split: str, image_size: int) -> Streams:
    """A folder of videos (NAME.mp4, ...) with narrations.json, in the schema of Ego4D's all_narrations_redacted.json.

    Its tokenizer is one trained on the spot on the narrations of the training split; for a large model name its own in
    data.tokenizer.
    """
    return _narrated(Path(data.root).expanduser(), data.fps, split, image_size)


def prepared(data: Any, split: str, image_size: int) -> Streams:
    """A folder that `vmod data` wrote: pixels, or features (then image_size does not matter)."""
    path = Path(data.path).expanduser()
    meta = read_meta(path)
    same = {"fps": float(data.fps)} | ({"size": image_size} if meta["kind"] == "pixels" else {})
    source = open_source(path, split, same)
    frames = source.frames if meta["kind"] == "pixels" else lambda sample: source.frames(sample).astype(np.float32)
    if (path / "tokenizer").is_dir():
        return Streams(source.samples, frames, path / "tokenizer")
    return Streams(source.samples, frames, spot_tokenizer(_replies(open_source(path, "train").samples)))


# name -> (config.data, split, image_size) -> Streams
SOURCES: dict[str, Callable[[Any, str, int], Streams]] = {
    "shapes": shapes,
    "narration": narration,
    "prepared": prepared,
}


class Videos(Mapping[str, float]):
    """The videos of a folder by name, with their durations in seconds; a video is decoded when it is asked for."""

    ENDINGS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")

    def __init__(self, root: Path, fps: float, image_size: int):
        if not root.is_dir():
            raise UserError(f"data.root={root}: no such folder")
        self.files = {path.stem: path for path in sorted(root.iterdir()) if path.suffix.lower() in self.ENDINGS}
        self.fps, self.image_size = fps, image_size

    def frames(self, name: str) -> np.ndarray:
        """u8[F, S, S, 3]"""
        return decoded(self.files[name], self.fps, self.image_size)

    def __getitem__(self, name: str) -> float:
        return (len(self.frames(name)) - 1) / self.fps

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, name: object) -> bool:
        return name in self.files


def _narrated(root: Path, fps: float, split: str, image_size: int, texts: Sequence[str] | None = None) -> Streams:
    from vmod_jax.data.sources.ego4d import narration_samples

    videos = Videos(root, fps, image_size)
    read = functools.partial(narration_samples, root / "narrations.json", videos, fps)
    samples = read(split)
    if texts is None:
        texts = _replies(samples if split == "train" else read("train"))
    return Streams(samples, lambda s: videos.frames(s.video)[s.start : s.stop], spot_tokenizer(texts), root)


def _replies(samples: Sequence[Sample]) -> list[str]:
    return sorted({m["content"] for sample in samples for m in sample.conversation if m["role"] == "assistant"})


def spot_tokenizer(texts: Sequence[str]) -> Path:
    """The folder of a small tokenizer trained on these texts, once."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    folder = cache_folder() / "tokenizers" / digest
    if not (folder / "tokenizer.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder, "tokenizer.json") as new:
            train_tokenizer(texts, new)
    return folder


# --- decoded frames ---------------------------------------------------------------------------------------------------


def decoded(path: Path, fps: float, image_size: int) -> np.ndarray:
    """A video's frames u8[F, S, S, 3] at `fps`, decoded once: a memory map, of which only what is in use is loaded."""
    from vmod_jax.data import video

    stat = path.stat()
    name = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {fps} {image_size}"
    cached = cache_folder() / "frames" / f"{path.stem}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.rgb"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
        video.read(path, fps, image_size).frames.tofile(part)
        part.replace(cached)
    # Bare pixels, whose shape the file's size tells: NumPy parses the header of a .npy file with `ast`, which Python
    # 3.11 cannot do in several threads at once (SystemError: recursion depth mismatch).
    return np.memmap(cached, np.uint8, "r").reshape(-1, image_size, image_size, 3)
