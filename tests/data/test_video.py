"""Sampling by time stamps, letterboxing, rotation, and what goes wrong with files."""

from fractions import Fraction

import av
import numpy as np
import pytest
from pictures import jpeg

from vmod_jax.data import video
from vmod_jax.errors import UserError

COLOURS = np.array(
    [[200, 30, 30], [30, 200, 30], [30, 30, 200], [220, 220, 40], [240, 240, 240], [20, 20, 20]], np.uint8
)


def plain(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """u8[count, height, width, 3]: frame i is all of colour i."""
    return np.broadcast_to(COLOURS[np.arange(count) % 6, None, None], (count, height, width, 3)).copy()


def colour_index(image: np.ndarray) -> int:
    """Which colour the middle of the image has."""
    middle = image[image.shape[0] // 2, image.shape[1] // 2].astype(int)
    return int(np.abs(COLOURS.astype(int) - middle).sum(1).argmin())


def write_at(path, images, times, rotation=0, aspect=None):
    """Like `video.write`, with a time in seconds for every frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for image, time in zip(images, times, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("fps", [2.0, 8.0, 29.97])
def test_round_trip_keeps_colours_and_times(tmp_path, fps):
    images = plain(17)
    video.write(tmp_path / "a.mp4", images, fps)
    got = video.read(tmp_path / "a.mp4", fps=fps, size=64)
    assert got.frames.shape == (17, 64, 64, 3)
    np.testing.assert_allclose(got.times, np.arange(17) / fps)
    np.testing.assert_allclose(got.frames[:, 8:56].astype(int), images.astype(int), atol=6)
    assert not got.frames[:, :8].any()
    assert not got.frames[:, 56:].any()


def test_samples_what_is_on_screen(tmp_path):
    video.write(tmp_path / "a.mp4", plain(12), 8)  # 1.5 s
    frames = video.read(tmp_path / "a.mp4", fps=2, size=32).frames
    assert [colour_index(f) for f in frames] == [0, 4, 8 % 6]
    faster = video.read(tmp_path / "a.mp4", fps=16, size=32).frames
    assert [colour_index(f) for f in faster] == [i // 2 % 6 for i in range(24)]


def test_variable_frame_rate(tmp_path):
    write_at(tmp_path / "a.mp4", plain(5), [0.0, 0.1, 0.499, 0.501, 2.0])
    frames = video.read(tmp_path / "a.mp4", fps=2, size=32).frames
    assert [colour_index(f) for f in frames] == [0, 2, 3, 3, 4]


def test_times_count_from_the_first_frame(tmp_path):
    write_at(tmp_path / "a.mkv", plain(4), [7.3, 7.8, 8.3, 8.8])
    frames = video.read(tmp_path / "a.mkv", fps=2, size=32).frames
    assert [colour_index(f) for f in frames] == [0, 1, 2, 3]


def test_upright_video_is_padded_left_and_right(tmp_path):
    video.write(tmp_path / "a.mp4", plain(2, height=64, width=32), 2)
    frame = video.read(tmp_path / "a.mp4", size=128).frames[0]
    assert not frame[:, :32].any()
    assert not frame[:, 96:].any()
    assert (frame[:, 32:96].max(-1) > 150).all()


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_honoured(tmp_path, rotation):
    image = plain(1, 48, 64)
    image[:, :24, :32] = COLOURS[2]  # the top left quarter blue, the rest red
    write_at(tmp_path / "a.mp4", image, [0.0], rotation=rotation)
    frame = video.read(tmp_path / "a.mp4", size=64).frames[0].astype(int)
    expected = np.zeros((64, 64, 3), int)
    turned = np.rot90(image[0], rotation // 90)
    top, left = (64 - turned.shape[0]) // 2, (64 - turned.shape[1]) // 2
    expected[top : top + turned.shape[0], left : left + turned.shape[1]] = turned
    assert np.abs(frame - expected).mean() < 4
    info = video.probe(tmp_path / "a.mp4")
    assert (info.height, info.width) == turned.shape[:2]


# How FFmpeg's command turns a display matrix [a b; c d]: by filters, which the test runs.
MATRICES = {
    (1, 0, 0, 1): [],
    (0, 1, -1, 0): [("transpose", "clock")],
    (-1, 0, 0, -1): [("hflip", ""), ("vflip", "")],
    (0, -1, 1, 0): [("transpose", "cclock")],
    (-1, 0, 0, 1): [("hflip", "")],
    (1, 0, 0, -1): [("vflip", "")],
    (0, 1, 1, 0): [("transpose", "cclock_flip")],
    (0, -1, -1, 0): [("transpose", "clock_flip")],
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_display_matrices_are_honoured_as_ffmpeg_does(tmp_path, matrix):
    image = plain(1, 48, 64)
    image[:, :24, :32], image[:, 24:, :32] = COLOURS[2], COLOURS[1]
    path = tmp_path / "a.mp4"
    write_at(path, image, [0.0])
    upright = av.VideoFrame.from_ndarray(video.read(path, size=64).frames[0][8:56], format="rgb24")
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # of a version 0 track header: nine numbers of 16.16 bits (the last column 2.30)
    a, b, c, d = matrix
    data[at : at + 36] = b"".join(
        (value * 2**16).to_bytes(4, "big", signed=True) for value in (a, b, 0, c, d, 0, 0, 0, 2**14)
    )
    path.write_bytes(data)
    graph = av.filter.Graph()
    filters = [graph.add(*args) for args in MATRICES[matrix]]
    source = graph.add_buffer(width=64, height=48, format=upright.format, time_base=Fraction(1, 25))
    graph.link_nodes(source, *filters, graph.add("buffersink"))
    graph.configure()
    upright.pts = 0
    graph.push(upright)
    theirs = graph.pull().to_ndarray(format="rgb24").astype(int)
    frame = video.read(path, size=64).frames[0].astype(int)
    top, left = (64 - theirs.shape[0]) // 2, (64 - theirs.shape[1]) // 2
    assert np.abs(frame[top : top + theirs.shape[0], left : left + theirs.shape[1]] - theirs).mean() < 1
    info = video.probe(path)
    assert (info.height, info.width) == theirs.shape[:2]


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 46), (45, 64), (64, 39)])
def test_the_picture_is_in_the_middle(height, width):
    """Of the rest, where it is odd, the larger half is below and on the right."""
    frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 255, np.uint8), format="rgb24")
    lit = video.letterbox(video.Shown(frame, Fraction(1)), 64).all(-1)
    rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
    assert (rows[0], rows[-1] + 1) == ((64 - height) // 2, (64 - height) // 2 + height)
    assert (columns[0], columns[-1] + 1) == ((64 - width) // 2, (64 - width) // 2 + width)


COVER, DEFAULT, NONE = av.stream.Disposition.attached_pic, av.stream.Disposition.default, av.stream.Disposition(0)


def several(path, pictures, sound=False, rate=8):
    """A file with a stream for each (u8[F, H, W, 3], Disposition), a cover as JPEG; the description comes first."""
    with av.open(str(path), "w") as container:
        streams = []
        for images, disposition in pictures:
            stream = container.add_stream("mjpeg" if disposition & COVER else "libx264", rate=rate)
            stream.height, stream.width = images.shape[1:3]
            stream.pix_fmt = "yuvj420p" if disposition & COVER else "yuv420p"
            stream.disposition = disposition
            streams.append(stream)
        if sound:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        for stream, (images, _) in zip(streams, pictures, strict=True):
            for i, image in enumerate(images):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    if path.suffix == ".mp4":  # its cover is read before its film
        data = path.read_bytes()
        at = data.index(b"moov") - 4
        end = at + int.from_bytes(data[at : at + 4], "big")
        atoms, place = [], at + 8
        while place < end:
            size = int.from_bytes(data[place : place + 4], "big")
            atoms.append(data[place : place + size])
            place += size
        atoms.sort(key=lambda atom: (b"mvhd", b"udta").index(atom[4:8]) if atom[4:8] != b"trak" else 2)
        path.write_bytes(data[: at + 8] + b"".join(atoms) + data[end:])


@pytest.mark.parametrize(
    ("name", "streams", "watched"),
    [
        ("a.mp4", [(plain(1, 96, 96), COVER), (plain(8), NONE)], (64, 48)),
        ("a.mp4", [(plain(8), NONE), (plain(1, 96, 96), COVER)], (64, 48)),
        ("a.mkv", [(plain(8, 16, 16), NONE), (plain(8), NONE)], (64, 48)),
        ("a.mkv", [(plain(8, 16, 16), NONE), (plain(8), DEFAULT)], (64, 48)),
        ("a.mkv", [(plain(8), NONE), (plain(8, 16, 16), NONE)], (64, 48)),
        ("a.mkv", [(plain(8), NONE), (plain(8, 16, 16), DEFAULT)], (16, 16)),
    ],
)
def test_of_several_video_streams_the_best_is_watched_and_said(tmp_path, name, streams, watched):
    several(tmp_path / name, streams)
    notes: list[str] = []
    times = [time for time, _ in video.decode(tmp_path / name, size=32, note=notes.append)]
    info = video.probe(tmp_path / name)
    assert (info.width, info.height) == watched
    assert times == [0.0, 0.5]
    said = [] if name == "a.mp4" else [f"is watched ({watched[0]}x{watched[1]})"]
    assert [note[-len(line) :] for note, line in zip(notes, said, strict=True)] == said


@pytest.mark.parametrize("use", [video.read, video.probe])
def test_a_song_with_a_cover_is_no_video(tmp_path, use):
    several(tmp_path / "a.mp4", [(plain(1, 96, 96), COVER)], sound=True)
    with pytest.raises(UserError, match="has only a picture"):
        use(tmp_path / "a.mp4")


@pytest.mark.parametrize("jump", [10.6, 3 * 86400.0])
def test_a_gap_is_not_filled_but_said(tmp_path, jump):
    seconds = [0.0, 0.5, 1.0, 1.5, 1.5 + jump, 2.0 + jump]
    write_at(tmp_path / "a.mkv", plain(6), seconds)
    notes: list[str] = []
    got = [(time, colour_index(image)) for time, image in video.decode(tmp_path / "a.mkv", size=32, note=notes.append)]
    assert [colour for _, colour in got] == [
        0,
        1,
        2,
        3,
        4,
    ]  # the fourth leaves the screen at 1.54, then comes the fifth
    assert [time for time, _ in got] == [i / 2 for i in range(len(got))]
    assert len(notes) == 1
    assert f"jump by {jump - 0.04:.2f} s at 1.54 s" in notes[0]
    duration = video.probe(tmp_path / "a.mkv").duration  # by which is planned what is to be written
    assert duration == pytest.approx(len(got) / 2, abs=0.5)
    filled = sum(1 for _ in video.decode(tmp_path / "a.mkv", 0.5, 32, max_gap=1e9, note=notes.append))
    assert filled == (1.54 + jump + 0.5) // 2 + 1 if jump < 100 else filled > 100_000
    assert len(notes) == 1


def test_a_pause_is_filled(tmp_path):
    write_at(tmp_path / "a.mkv", plain(2), [0.0, 10.0])
    assert [colour_index(f) for f in video.read(tmp_path / "a.mkv", fps=2, size=32).frames] == [0] * 20 + [1]


def test_a_clock_that_is_set_back_or_forth(tmp_path):
    """Transport streams, one behind the other, each with its own clock; of many jumps the first are named."""
    for name, begin in (("a", 1000.0), ("b", 0.0), ("c", 5000.0)):
        write_at(tmp_path / f"{name}.ts", plain(6), [begin + i / 2 for i in range(6)])
    names = [*"abc"] + [*"bc"] * 2
    (tmp_path / "all.ts").write_bytes(b"".join((tmp_path / f"{name}.ts").read_bytes() for name in names))
    notes: list[str] = []
    times = [time for time, _ in video.decode(tmp_path / "all.ts", size=32, note=notes.append)]
    assert times == [i / 2 for i in range(len(times))]
    assert len(names) * 5 < len(times) <= len(names) * 6
    assert len(notes) == 4
    assert "all.ts: time stamps jump 6 times in all" in notes[-1]


@pytest.mark.parametrize(
    "name", ["cam:front.mp4", "02-12:30:05.mp4", "concat:a|b.mp4", "data:x.mp4", "a|b.mp4", "-i.mp4"]
)
def test_a_local_name_is_no_address(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    video.write(name, plain(4), 2)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(video.read(name, size=32).frames) == 4
    assert video.probe(name).fps == 2


@pytest.mark.parametrize(
    ("fps", "size"), [(0, 32), (-1, 32), (float("nan"), 32), (float("inf"), 32), (1e-9, 32), (2, 0), (2, -3)]
)
def test_what_cannot_be_sampled(tmp_path, fps, size):
    video.write(tmp_path / "a.mp4", plain(4), 2)
    with pytest.raises(UserError, match="give a"):
        video.read(tmp_path / "a.mp4", fps, size)


def test_pixels_that_are_not_square(tmp_path):
    write_at(tmp_path / "a.mp4", plain(1, 64, 64), [0.0], aspect=Fraction(2, 1))
    info = video.probe(tmp_path / "a.mp4")
    assert (info.width, info.height) == (128, 64)
    frame = video.read(tmp_path / "a.mp4", size=64).frames[0]
    assert not frame[:16].any()
    assert (frame[16:48].max(-1) > 150).all()


def test_probe(tmp_path):
    video.write(tmp_path / "a.mp4", plain(12), 8)
    assert video.probe(tmp_path / "a.mp4") == (64, 48, 1.5, 8.0)


def test_the_same_frames_make_the_same_file(tmp_path):
    images = plain(20)
    for name in ("a.mp4", "b.mp4"):
        video.write(tmp_path / name, images, 8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_decoding_streams(tmp_path):
    """The first frames come before the rest of the file is read."""
    video.write(tmp_path / "a.mp4", plain(200), 8)
    frames = video.decode(tmp_path / "a.mp4")
    assert next(frames)[0] == 0.0
    assert next(frames)[0] == 0.5


def no_file(path):
    pass


def text(path):
    path.write_text("not a video\n" * 100)


def folder(path):
    path.mkdir()


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("make", "message"),
    [(no_file, "no such file"), (folder, "no such file"), (text, "cannot be read"), (sound, "no video stream")],
)
@pytest.mark.parametrize("use", [video.read, video.probe])
def test_files_that_are_no_videos(tmp_path, make, message, use):
    path = tmp_path / "a.mp4"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        use(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("use", [video.read, video.probe])
def test_a_video_without_frames(tmp_path, use):
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    with pytest.raises(UserError, match="no video frames"):
        use(tmp_path / "a.avi")


def test_nothing_to_write(tmp_path):
    with pytest.raises(UserError, match="no frames"):
        video.write(tmp_path / "a.mp4", [], 2)
    with pytest.raises(UserError, match="even sides"):
        video.write(tmp_path / "a.mp4", plain(1, 47, 64), 2)


def test_a_file_that_breaks_in_its_middle(clips):
    path = clips / "video" / "corrupted.mp4"
    with pytest.raises(UserError, match=r"failed at 2\.80 s .*28 frames were decoded before.*--allow-partial"):
        video.read(path)
    partial = video.read(path, allow_partial=True)
    assert partial.times.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert partial.frames[-1].any()


def test_a_file_without_a_duration(clips):
    path = clips / "video" / "no_duration.webm"
    assert video.probe(path).duration is None
    assert video.read(path, size=64).times.tolist() == [i / 2 for i in range(10)]


def test_matroska(clips):
    path = clips / "video" / "flipping_a_pancake.mkv"
    got = video.read(path, size=96)
    assert len(got.frames) == 21
    assert video.probe(path) == (426, 240, 10.381, 30.0)
    # 426 x 240 becomes 96 x 54
    assert not got.frames[:, :21].any()
    assert not got.frames[:, 75:].any()
    assert got.frames[:, 22:74].mean() > 20


def test_a_jpeg_is_a_frame():
    """A picture from a browser is laid out as a video's frame is: the longer side fills, the rest is zeros."""
    data = jpeg(np.concatenate([plain(2, 32, 32)[0], plain(2, 32, 32)[1]], axis=1))
    seen = video.picture(data, 32)
    assert (seen.shape, seen.dtype) == ((32, 32, 3), np.uint8)
    assert not seen[:8].any()
    assert not seen[24:].any()
    np.testing.assert_allclose(seen[16, [4, 28]].astype(int), COLOURS[:2], atol=12)
    for broken in (b"", data[:2], b"GIF89a", data[: len(data) * 2 // 3]):
        with pytest.raises(UserError, match=f"a picture of {len(broken)} bytes is not a JPEG"):
            video.picture(broken, 32)
