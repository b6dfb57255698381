"""Single frames for questions: images from files or arrays, and a video's frames at given times.

All are what a model takes of a stream: u8[S, S, 3] RGB, the longer side scaled to S, black around the rest.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vmod_jax.data import video
from vmod_jax.errors import UserError

FOLDER_FPS = 3  # of videos that are folders of images, as some of MVBench's are


def image(source: Any, size: int) -> np.ndarray:
    """An image as a model sees it. source: a path, a PIL image, or u8[H, W, 3]; -> u8[size, size, 3].

    Raises UserError for a file that is missing or no image, and for an array of another form.
    """
    if isinstance(source, str | Path):
        if not Path(source).is_file():
            raise UserError(f"{source}: no such image")
        return next(video.decode(source, 1.0, size))[1]
    if hasattr(source, "convert"):
        source = np.asarray(source.convert("RGB"))
    if getattr(source, "dtype", None) != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
        raise UserError(f"an image must be a path, a PIL image or u8[H, W, 3], not {_kind(source)}")
    if source.shape == (size, size, 3):
        return source
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(source), format="rgb24")
    return video.letterbox(video.Shown(frame, Fraction(1)), size)


def spread(start: float, end: float, fps: float, most: int) -> list[float]:
    """Times of n frames in the middles of n equal parts of [start, end] seconds; n = fps (end - start), 1 to `most`."""
    count = max(1, min(most, round(fps * (end - start))))
    return [start + (i + 0.5) * (end - start) / count for i in range(count)]


def at(path: str | Path, times: Sequence[float], size: int) -> np.ndarray:
    """What is on screen at each of these times (ascending, seconds since the first frame): u8[len(times), S, S, 3].

    Nothing after the last of them is looked at. A time beyond the end shows the last frame. A folder of images is a
    video of `FOLDER_FPS` of them a second.
    """
    if Path(path).is_dir():
        files = _files(path)
        return np.stack([image(files[min(int(time * FOLDER_FPS), len(files) - 1)], size) for time in times])
    found: list[np.ndarray] = []
    shown = None
    for time, _, frame in video.timed_frames(path, allow_partial=False):
        while shown is not None and len(found) < len(times) and times[len(found)] < time:
            found.append(video.letterbox(shown, size))
        if len(found) == len(times):
            break
        shown = frame
    while shown is not None and len(found) < len(times):
        found.append(video.letterbox(shown, size))
    return np.stack(found)


def duration(path: str | Path) -> float:
    """Seconds, as the file says or, where it does not, as its frames show."""
    if Path(path).is_dir():
        return len(_files(path)) / FOLDER_FPS
    if (said := video.probe(path).duration) is not None:
        return said
    return float(max(time + length for time, length, _ in video.timed_frames(path, allow_partial=False)))


def until(path: str | Path, fps: float, ask: float, size: int, context: float | None = None) -> Iterator[np.ndarray]:
    """A stream's frames, at 0, 1 / fps, ... up to and with `ask` seconds; with `context`, the last so many seconds."""
    for time, frame in video.decode(path, fps, size):
        if time > ask + 1e-9:
            return
        if context is None or time > ask - context - 1e-9:
            yield frame


def _files(folder: str | Path) -> list[Path]:
    files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise UserError(f"{folder}: a folder without images")
    return files


def _kind(source: Any) -> str:
    return f"{source.dtype}{list(source.shape)}" if hasattr(source, "shape") else type(source).__name__


def save(path: str | Path, image: np.ndarray) -> None:
    """Writes u8[H, W, 3] as a PNG; the same image gives the same bytes."""
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as out:
        stream: Any = out.add_stream("png", rate=1)
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = "rgb24"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        out.mux(stream.encode(None))
