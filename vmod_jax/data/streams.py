"""Streams of a data set: which conversations, about which frames; and folders of videos that are decoded once."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmod_jax.caches import cache_folder
from vmod_jax.data.conversation import Sample
from vmod_jax.data.storage import replacing
from vmod_jax.data.tokenizer import train_tokenizer
from vmod_jax.errors import UserError


class Streams(NamedTuple):
    """A data set's streams and how to read their frames."""

    samples: Sequence[Sample]
    frames: Callable[[Sample], np.ndarray]  # -> f32[F, n, d_v] features | u8[F, S, S, 3] pixels, F = stop - start
    tokenizer: Any  # a tokenizer or its folder; None when the data set does not bring one
    root: Path | None = None  # the folder of the videos, where there is one
    texts: Callable[[], Iterable[str]] | None = None  # what is said in training, for a tokenizer of its own
    parts: tuple[tuple[int, float], ...] = ()  # of a mixture: (streams, weight) of each source, which stand in order


VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
SMALLER = "downscaled/448/"  # where Ego-Exo4D has smaller copies of its videos, which go by the same names


def find_videos(root: Path, nested: bool = False, endings: Sequence[str] = VIDEO_ENDINGS) -> dict[str, Path]:
    """{name: file} of a folder, sorted by name, which is the file's without its ending.

    nested: of folders below it too, by their path ("takes/a/b"); of an original and its smaller copy the copy.
    """
    found = {}
    for path in sorted(root.rglob("*") if nested else root.iterdir()):
        if path.suffix.lower() in endings:
            name = path.relative_to(root).with_suffix("").as_posix()
            if SMALLER in name or name not in found:
                found[name.replace(SMALLER, "")] = path
    return dict(sorted(found.items()))


class Videos(Mapping[str, float]):
    """The videos of a folder by name, with their durations in seconds; a video is decoded when it is asked for."""

    def __init__(self, root: Path, fps: float, image_size: int, nested: bool = False):
        if not root.is_dir():
            raise UserError(f"data.root={root}: no such folder")
        self.files = find_videos(root, nested)
        self.fps, self.image_size = fps, image_size

    def frames(self, name: str) -> np.ndarray:
        """u8[F, S, S, 3]"""
        return decoded(self.files[name], self.fps, self.image_size)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """The frames [start, stop) of a video, u8[F, S, S, 3]."""
        return self.frames(name)[start:stop]

    def __getitem__(self, name: str) -> float:
        return (len(self.frames(name)) - 1) / self.fps

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, name: object) -> bool:
        return name in self.files


def spot_tokenizer(texts: Sequence[str]) -> Path:
    """The folder of a small tokenizer trained on these texts, once."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    folder = cache_folder() / "tokenizers" / digest
    if not (folder / "tokenizer.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder, "tokenizer.json") as new:
            train_tokenizer(texts, new)
    return folder


def decoded(path: Path, fps: float, image_size: int) -> np.ndarray:
    """A video's frames u8[F, S, S, 3] at `fps`, decoded once: a memory map, of which only what is in use is loaded."""
    from vmod_jax.data import video

    stat = path.stat()
    name = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {fps} {image_size}"
    cached = cache_folder() / "frames" / f"{path.stem}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.rgb"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
        try:
            with part.open("wb") as file:  # a frame at a time: memory does not grow with the video
                for _, frame in video.decode(path, fps, image_size):
                    file.write(frame.tobytes())
            part.replace(cached)
        finally:
            part.unlink(missing_ok=True)
    # Bare pixels, whose shape the file's size tells: NumPy parses the header of a .npy file with `ast`, which Python
    # 3.11 cannot do in several threads at once (SystemError: recursion depth mismatch).
    return np.memmap(cached, np.uint8, "r").reshape(-1, image_size, image_size, 3)
