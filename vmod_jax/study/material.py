"""What a routing study shows to a model: streams of its own data, or any video file."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vmod_jax import workdir as folder
from vmod_jax.data import video
from vmod_jax.data.conversation import Sample, encode
from vmod_jax.data.pipeline import open_streams
from vmod_jax.data.streams import Videos
from vmod_jax.errors import UserError
from vmod_jax.lm import LanguageModel
from vmod_jax.study.routing import Boxes, read_boxes
from vmod_jax.training import config as configuration

MAX_FRAMES = 1200  # of a file: the longest stream of the paper's data


class Material(NamedTuple):
    """What the model is shown. about: for routing.json; boxes, side: as `summarise` takes them."""

    about: dict[str, Any]
    rows: list[tuple[np.ndarray, np.ndarray]]  # input_ids i32[T], frames u8[F, S, S, 3] | f32[F, n, d_v]
    boxes: list[list[np.ndarray]] | None = None
    side: int = 0


def from_split(lm: LanguageModel, workdir: Path, split: str | None, videos: int) -> Material:
    """The first streams of a split of the data that config.json names; with boxes where the data has them."""
    stored = folder.read_config(workdir)
    if stored is None:
        raise UserError(f"{workdir} has no config.json (it was imported): name a file to watch with --video")
    data = configuration.complete(ConfigDict(stored)).data
    size = lm.config.vision.image_size if lm.config.vision else 0
    split = split or str(data.eval_split)
    streams = open_streams(data, split, size)
    samples = [streams.samples[i] for i in range(min(videos, len(streams.samples)))]
    rows = [(encode(sample.conversation, lm.fmt).input_ids, streams.frames(sample)) for sample in samples]
    about = {"split": split, "streams": len(rows)}
    boxes = read_boxes(streams.root) if streams.root else None
    if streams.root is None or boxes is None:
        return Material(about, rows)
    check_boxes(boxes, streams.root, samples, data.fps)
    return Material(about, rows, [boxes.videos[s.video][s.start : s.stop] for s in samples], boxes.side)


def check_boxes(boxes: Boxes, root: Path, samples: Sequence[Sample], fps: float) -> None:
    """Raises UserError where boxes.json is not about these streams: other frames, or pictures of another shape."""
    if boxes.fps != fps:
        raise UserError(
            f"{root}: boxes.json is for {boxes.fps:g} frames a second, data.fps is {fps:g}; the two must agree"
        )
    files = Videos(root, fps, 0).files
    for sample in samples:
        if len(boxes.videos.get(sample.video, ())) < sample.stop:
            raise UserError(f"{root}: boxes.json lacks frames of {sample.video}: make the videos again")
        info = video.probe(files[sample.video])
        if (info.width, info.height) != (boxes.side, boxes.side):
            raise UserError(
                f"{files[sample.video]} is {info.width}x{info.height}, its boxes are in pixels of "
                f"{boxes.side}x{boxes.side}: make the videos again"
            )


def from_file(lm: LanguageModel, path: str | Path) -> Material:
    """The frames of a video file as one stream."""
    if lm.config.vision is None:
        raise UserError("this model has no vision tower: import one with it (vmod import --vision) to watch a video")
    decoded = video.decode(path, lm.config.fps, lm.config.vision.image_size)
    frames = np.stack([frame for _, frame in itertools.islice(decoded, MAX_FRAMES)])
    ids = encode([{"role": "stream", "num_frames": len(frames)}], lm.fmt).input_ids
    return Material({"video": str(path), "streams": 1}, [(ids, frames)])
