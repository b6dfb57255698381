"""`vmod bench decode-video`: the reader, which scales and letterboxes what it samples, beside plain decoding by PyAV.

Seconds a file; the candidate is `data/video.py` at 2 frames a second and 384 pixels, the baseline PyAV decoding every
frame and converting none.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from vmod_jax.data import video
from vmod_jax.errors import user_path
from vmod_jax.performance.harness import Rows, interleave, pair, print_table, row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--videos", nargs="+", type=user_path, metavar="F", help="files (a made one of 20 s at 1280 x 720)"
    )
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second that the reader yields (%(default)s)")
    parser.add_argument("--size", type=int, default=384, help="their side (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9)


def run(args: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        if args.videos:
            files = args.videos
        else:
            files = [Path(folder) / "made.mp4"]
            video.write(files[0], _moving(20 * 25, 720, 1280), 25.0)
        rows.extend(_compare(args, path) for path in files)
    print_table(rows, unit="s")
    return {}


def _moving(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """A noisy picture that drifts: u8[height, width, 3]."""
    rng = np.random.default_rng(0)
    picture = np.repeat(np.repeat(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8), 8, 0), 8, 1)
    for i in range(count):
        yield np.roll(picture, (2 * i, 3 * i), (0, 1))


def _compare(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    video.probe(path)  # a wrong file is one line
    counts = {}

    def ours() -> None:
        counts["yielded"] = sum(1 for _ in video.decode(path, args.fps, args.size))

    def plain() -> None:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            counts["decoded"] = sum(1 for _ in container.decode(video=0))

    seconds = 120 if args.quick else float("inf")
    times = interleave({"ours": ours, "plain": plain}, args.rounds, seconds=seconds, about=path.name)
    both = pair(times["ours"], times["plain"])
    speed = {"decoded_fps": counts["decoded"] / both["candidate"], "plain_fps": counts["decoded"] / both["baseline"]}
    return row(f"{path.name} reader/PyAV", "decode", **both, fps=args.fps, size=args.size, **counts, **speed)
