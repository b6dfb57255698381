"""Video files in, frames out: what is on screen at 0, 1/fps, 2/fps, ... seconds.

Sampling goes by the frames' own time stamps, so variable frame rates and odd time bases come out right, and the
decoder's frames are dropped as soon as they are passed: memory does not grow with the video. Where the time stamps jump
(a clock that is set anew, a last frame days later), the gap is left out and said.
"""

import heapq
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type
from av.stream import Disposition

from vmod_jax.errors import NAMED, UserError

log = logging.getLogger(__name__)

SPARSE = 20_000  # bytes a second: of a file that has fewer it is soon seen whether its time stamps jump
REORDERED = 16  # frames, in H.264 and H.265
MAX_GAP = 10.0  # seconds: a longer jump of the time stamps is no pause of a film; FFmpeg's own threshold
RATES = (1e-4, 1e4)  # frames a second at which a video may be sampled


class VideoInfo(NamedTuple):
    """What a file says about itself; `width` and `height` as displayed (rotation and pixel shape applied)."""

    width: int
    height: int
    duration: float | None  # seconds, gaps of the time stamps left out; None when the file does not say
    fps: float | None  # native frames a second, the average where it varies; None when unknown


class Video(NamedTuple):
    path: Path
    fps: float
    frames: np.ndarray  # u8[F, S, S, 3] RGB
    times: np.ndarray  # f64[F] seconds since the first frame


def decode(
    path: str | Path,
    fps: float = 2.0,
    size: int = 384,
    allow_partial: bool = False,
    max_gap: float = MAX_GAP,
    note: Callable[[str], None] = log.warning,
) -> Iterator[tuple[float, np.ndarray]]:
    """Yields (i / fps, u8[size, size, 3] RGB) for i = 0, 1, ...: the last decoded frame at or before that time.

    Times count from the first frame. The longer side is scaled to `size`, the rest is zeros on both sides. Runs until
    the last frame has left the screen. Where a frame's time stamp lies more than `max_gap` seconds behind or before the
    end of the frame in front of it, nothing is filled in: times go on without the gap, and `note` gets a line with its
    place; it also hears which of several video streams is watched. With `allow_partial`, a file that breaks off in its
    middle gives what could be decoded before. Raises UserError: no such file, not a video, no frames, or (while
    iterating) broken in its middle.
    """
    check_sampling(fps, size)
    step = 1 / Fraction(fps).limit_denominator(100_000)
    shown: Shown | None = None
    index, end = 0, Fraction(0)
    for time, duration, frame in timed_frames(path, allow_partial, max_gap, note):
        while shown is not None and index * step < time:
            yield float(index * step), letterbox(shown, size)
            index += 1
        shown, end = frame, time + duration
    while shown is not None and (index == 0 or index * step < end):
        yield float(index * step), letterbox(shown, size)
        index += 1


def check_sampling(fps: float, size: int) -> None:
    """Raises UserError where no frames can be sampled at `fps` a second, `size` pixels a side."""
    if not RATES[0] <= fps <= RATES[1]:
        raise UserError(f"frames are sampled at {fps:g} a second; give a rate from {RATES[0]:g} to {RATES[1]:g}")
    if size < 1:
        raise UserError(f"frames of {size} pixels a side; give an image size of at least 1")


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
        if duration and Path(path).stat().st_size < SPARSE * duration:
            duration = _without_gaps(path)
        rate = stream.average_rate or stream.guessed_rate
        width, height = _display_size(frame, _pixel_aspect(stream))
        if _turns(frame)[0]:
            width, height = height, width
        return VideoInfo(round(width), round(height), duration, float(rate) if rate else None)


def _without_gaps(path: str | Path) -> float:
    """Seconds that `decode` shows of a file, by the time stamps of its packets alone."""
    with _open(path) as (container, stream):
        usual = min(1 / Fraction(stream.average_rate or stream.guessed_rate or 25), Fraction(MAX_GAP))
        total, end = Fraction(0), None
        for time, duration in _stamps(container, stream):
            duration = duration if 0 < duration <= MAX_GAP else usual
            # Up to the end of this frame: from the end of the one before or, behind a gap, from its own start.
            total += duration if end is None or abs(time - end) > MAX_GAP else time + duration - end
            end = time + duration
    return float(total)


def _stamps(container: Any, stream: Any) -> Iterator[tuple[Fraction, Fraction]]:
    """Time and duration of each packet in the order in which they are shown, which differs by `REORDERED` at most."""
    waiting: list[tuple[Fraction, Fraction]] = []
    with suppress(FFmpegError):  # what breaks off in its middle is said when it is decoded
        for packet in container.demux(stream):
            if packet.pts is not None:
                stamp = packet.pts * stream.time_base, (packet.duration or 0) * stream.time_base
                if len(waiting) < REORDERED:
                    heapq.heappush(waiting, stamp)
                else:
                    yield heapq.heappushpop(waiting, stamp)
    yield from sorted(waiting)


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
    with av.open(str(Path(path).absolute()), "w") as container:
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
    """u8[size, size, 3] RGB: longer side = size, centred, zeros around; turned and mirrored as the file says."""
    frame, aspect = shown
    width, height = _display_size(frame, aspect)
    scale = size / max(width, height)
    width, height = (max(1, round(side * scale)) for side in (width, height))
    image = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC").to_ndarray()
    transposed, across, down = _turns(frame)
    image = image.swapaxes(0, 1) if transposed else image
    image = image[:: -1 if down else 1, :: -1 if across else 1]
    top, left = ((size - side) // 2 for side in image.shape[:2])
    out = np.zeros((size, size, 3), np.uint8)
    out[top : top + image.shape[0], left : left + image.shape[1]] = image
    return out


def _display_size(frame: av.VideoFrame, aspect: Fraction) -> tuple[float, float]:
    """Width and height in square pixels, before rotation."""
    return float(frame.width * max(aspect, 1)), float(frame.height * max(1 / aspect, 1))


def _turns(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """What its display matrix asks for: (rows become columns, then mirrored from left to right, from top to bottom).

    Of [a b; c d], which takes (x, y) to (a x + c y, b x + d y), right angles and mirrors are honoured as FFmpeg does;
    other angles are taken to the nearest of them.
    """
    every: Any = frame.side_data  # its stubs take it for a mapping
    data = next((bytes(data) for data in every if data.type == Type.DISPLAYMATRIX), None)
    if data is None:
        return False, False, False
    a, b, _, c, d = (int(value) for value in np.frombuffer(data, np.int32)[:5])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def _pixel_aspect(stream: Any) -> Fraction:
    return Fraction(stream.sample_aspect_ratio or 1)


def timed_frames(
    path: str | Path,
    allow_partial: bool = False,
    max_gap: float = MAX_GAP,
    note: Callable[[str], None] = log.warning,
) -> Iterator[tuple[Fraction, Fraction, Shown]]:
    """Decoded frames with their time since the first frame, gaps left out, and how long each stays on screen."""
    with _open(path, note) as (container, stream):
        usual = min(1 / Fraction(stream.average_rate or stream.guessed_rate or 25), Fraction(max_gap))
        start = end = Fraction(0)  # where the time stamps count from, and the end of the latest frame, on their clock
        count, gaps = 0, _Gaps(path, note)
        try:
            for frame in container.decode(stream):
                time = end if frame.pts is None else frame.pts * frame.time_base
                duration = frame.duration * frame.time_base if frame.duration else usual
                duration = duration if 0 < duration <= max_gap else usual
                start, end = (start, end) if count else (time, time)
                if abs(gap := time - end) > max_gap:
                    gaps.add(float(gap), float(end - start))
                    start += gap
                end = time + duration
                count += 1
                yield time - start, duration, Shown(frame, _pixel_aspect(stream))
        except FFmpegError as error:
            if not (allow_partial and count):
                advice = "--allow-partial uses those" if count else "is the file complete?"
                raise UserError(
                    f"{path}: decoding failed at {float(end - start):.2f} s ({error.strerror}), "
                    f"{count} frames were decoded before; {advice}"
                ) from error
        gaps.finish()
        if not count:
            raise UserError(f"{path}: has no video frames; is the file complete?")


class _Gaps:
    """Says where time stamps jump, of many jumps the first three and their number."""

    def __init__(self, path: str | Path, note: Callable[[str], None]):
        self.path, self.note, self.count = path, note, 0

    def add(self, gap: float, place: float) -> None:
        self.count += 1
        if self.count <= NAMED:
            self.note(f"{self.path}: time stamps jump by {gap:.2f} s at {place:.2f} s; the gap is not filled")

    def finish(self) -> None:
        if self.count > NAMED:
            self.note(f"{self.path}: time stamps jump {self.count} times in all; none of the gaps is filled")


@contextmanager
def _open(path: str | Path, note: Callable[[str], None] = log.debug) -> Iterator[tuple[Any, Any]]:
    """The container and the video stream to watch."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        # From the root on: FFmpeg would take "cam:front.mp4" for an address.
        container = av.open(str(Path(path).absolute()))
    except (FFmpegError, UnicodeEncodeError) as error:
        reason = getattr(error, "strerror", None) or "its name cannot be encoded"
        raise UserError(f"{path}: cannot be read as a video ({reason})") from error
    with container:
        stream = _best(path, container, note)
        stream.thread_type = "AUTO"
        yield container, stream


def _best(path: str | Path, container: Any, note: Callable[[str], None]) -> Any:
    """The video stream that the command `ffmpeg` takes: the default one or else the largest; never a cover."""
    films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not films:
        cover = "only a picture (a cover)" if container.streams.video else "no video stream"
        raise UserError(f"{path}: has {cover}; give a video")
    best = max(films, key=_rank)
    if len(films) > 1:
        note(f"{path}: of its {len(films)} video streams number {best.index} is watched ({best.width}x{best.height})")
    return best


def _rank(film: Any) -> tuple[bool, int]:
    """Streams known to hold frames first; being the default is worth five million pixels to FFmpeg."""
    default = bool(film.disposition & Disposition.default)
    return film.frames > 0, film.width * film.height + 5_000_000 * default
