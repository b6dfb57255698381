"""Video files in, frames out: what is on screen at 0, 1/fps, 2/fps, ... seconds.

Sampling goes by the frames' own time stamps, so variable frame rates and odd time bases come out right, and the
decoder's frames are dropped as soon as they are passed: memory does not grow with the video.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.error import FFmpegError

from vmod_jax.errors import UserError


class VideoInfo(NamedTuple):
    """What a file says about itself; `width` and `height` as displayed (rotation and pixel shape applied)."""

    width: int
    height: int
    duration: float | None  # seconds; None when the file does not say
    fps: float | None  # native frames a second, the average where it varies; None when unknown


class Video(NamedTuple):
    path: Path
    fps: float
    frames: np.ndarray  # u8[F, S, S, 3] RGB
    times: np.ndarray  # f64[F] seconds since the first frame


def decode(
    path: str | Path, fps: float = 2.0, size: int = 384, allow_partial: bool = False
) -> Iterator[tuple[float, np.ndarray]]:
    """Yields (i / fps, u8[size, size, 3] RGB) for i = 0, 1, ...: the last decoded frame at or before that time.

    Times count from the first frame. The longer side is scaled to `size`, the rest is zeros on both sides. Runs until
    the last frame has left the screen. With `allow_partial`, a file that breaks off in its middle gives what could be
    decoded before. Raises UserError: no such file, not a video, no frames, or (while iterating) broken in its middle.
    """
    if not fps > 0:
        raise UserError(f"{path}: frames are sampled at {fps:g} a second; the rate must be above zero")
    step = 1 / Fraction(fps).limit_denominator(100_000)
    shown: Shown | None = None
    index, end = 0, Fraction(0)
    for time, duration, frame in _timed_frames(path, allow_partial):
        while shown is not None and index * step < time:
            yield float(index * step), letterbox(shown, size)
            index += 1
        shown, end = frame, time + duration
    while shown is not None and (index == 0 or index * step < end):
        yield float(index * step), letterbox(shown, size)
        index += 1


def read(path: str | Path, fps: float = 2.0, size: int = 384, allow_partial: bool = False) -> Video:
    """The whole of `decode` in memory."""
    times, frames = zip(*decode(path, fps, size, allow_partial), strict=True)
    return Video(Path(path), fps, np.stack(frames), np.array(times, np.float64))


def probe(path: str | Path) -> VideoInfo:
    """Size, duration and frame rate, from the file's header and its first frame. Raises UserError as `decode` does."""
    with _open(path) as (container, stream):
        try:
            frame = next(container.decode(stream), None)
        except FFmpegError as error:
            raise UserError(f"{path}: no frame could be decoded ({error.strerror})") from error
        if frame is None:
            raise UserError(f"{path}: has no video frames; is the file complete?")
        if stream.duration is not None:
            duration = float(stream.duration * stream.time_base)
        else:
            duration = container.duration / av.time_base if container.duration else None
        rate = stream.average_rate or stream.guessed_rate
        width, height = _display_size(frame, _pixel_aspect(stream))
        if frame.rotation % 180:
            width, height = height, width
        return VideoInfo(round(width), round(height), duration, float(rate) if rate else None)


def picture(data: bytes, size: int) -> np.ndarray:
    """A JPEG as `decode` would give it: u8[size, size, 3] RGB. Raises UserError for bytes that are none."""
    codec: Any = av.CodecContext.create("mjpeg", "r")
    codec.options = {"err_detect": "explode"}  # of one that is cut off nothing is shown
    try:
        frames = [*codec.decode(av.Packet(data)), *codec.decode(None)] if data else []
    except FFmpegError:
        frames = []
    if not frames:
        raise UserError(f"a picture of {len(data)} bytes is not a JPEG that can be decoded")
    return letterbox(Shown(frames[0], Fraction(1)), size)


def write(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes u8[H, W, 3] RGB frames (H and W even) as an h264 mp4 with one frame every 1/fps seconds.

    One thread, because x264's output depends on their number and the same frames should give the same file.
    """
    rate = Fraction(fps).limit_denominator(100_000)
    with av.open(str(path), "w") as container:
        stream: Any = None
        for index, image in enumerate(frames):
            height, width = image.shape[:2]
            if stream is None:
                if height % 2 or width % 2:
                    raise UserError(f"{path}: h264 needs even sides, the frames are {width}x{height}; pad or crop them")
                stream = container.add_stream("libx264", rate=rate, options={"crf": "18", "preset": "ultrafast"})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.thread_count = 1
                stream.codec_context.time_base = 1 / rate
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        if stream is None:
            raise UserError(f"{path}: no frames to write")
        container.mux(stream.encode(None))


class Shown(NamedTuple):
    """A decoded frame, not yet converted to RGB: most frames never are."""

    frame: av.VideoFrame
    aspect: Fraction  # width of a pixel over its height


def letterbox(shown: Shown, size: int) -> np.ndarray:
    """u8[size, size, 3] RGB: longer side = size, centred, zeros around; turned as the file says."""
    frame, aspect = shown
    width, height = _display_size(frame, aspect)
    scale = size / max(width, height)
    width, height = (max(1, round(side * scale)) for side in (width, height))
    image = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC").to_ndarray()
    image = np.rot90(image, frame.rotation // 90 % 4)  # both count counter-clockwise
    top, left = ((size - side) // 2 for side in image.shape[:2])
    out = np.zeros((size, size, 3), np.uint8)
    out[top : top + image.shape[0], left : left + image.shape[1]] = image
    return out


def _display_size(frame: av.VideoFrame, aspect: Fraction) -> tuple[float, float]:
    """Width and height in square pixels, before rotation."""
    return float(frame.width * max(aspect, 1)), float(frame.height * max(1 / aspect, 1))


def _pixel_aspect(stream: Any) -> Fraction:
    return Fraction(stream.sample_aspect_ratio or 1)


def _timed_frames(path: str | Path, allow_partial: bool) -> Iterator[tuple[Fraction, Fraction, Shown]]:
    """Decoded frames with their time since the first frame and how long each stays on screen, in seconds."""
    with _open(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate or 25
        first = end = Fraction(0)  # start of the first frame, end of the latest one, on the file's own clock
        count = 0
        try:
            for frame in container.decode(stream):
                time = end if frame.pts is None else frame.pts * frame.time_base
                duration = frame.duration * frame.time_base if frame.duration else 1 / Fraction(rate)
                first = first if count else time
                end = time + duration
                count += 1
                yield time - first, duration, Shown(frame, _pixel_aspect(stream))
        except FFmpegError as error:
            if not (allow_partial and count):
                advice = "--allow-partial uses those" if count else "is the file complete?"
                raise UserError(
                    f"{path}: decoding failed at {float(end - first):.2f} s ({error.strerror}), "
                    f"{count} frames were decoded before; {advice}"
                ) from error
        if not count:
            raise UserError(f"{path}: has no video frames; is the file complete?")


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        container = av.open(str(path))
    except FFmpegError as error:
        raise UserError(f"{path}: cannot be read as a video ({error.strerror})") from error
    with container:
        if not container.streams.video:
            raise UserError(f"{path}: has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield container, stream
