"""Frames of whole videos on disk, decoded or encoded once: `array_record` shards that any number of workers write.

    plan.json                        which video goes into which shard: written first, the same for every worker
    shard-00003.array_record         a record is up to 64 frames of a video, one after another, raw
    shard-00003.json                 {"videos": {name: [first record, frames]}, "quarantined": {name: why}}: it is whole
    meta.json, quarantine.json       the same of all shards; meta.json says that all are there

A shard is made by one worker, in a file beside it that takes its place at the end; what a worker that was killed leaves
is made again. What a shard holds depends on the plan alone, so that however many workers wrote it, and however often
they were stopped, the bytes are the same. A video is read 64 frames at a time and never held whole.
"""

import fcntl
import functools
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from vmod_jax.data.streams import VIDEO_ENDINGS, find_videos
from vmod_jax.errors import UserError, user_path

CHUNK = 64  # frames of a record
SHARD_BYTES = 256 * 2**20
FORMAT = 1
META, PLAN = "meta.json", "plan.json"

Encode = Callable[[np.ndarray], np.ndarray]  # u8[m, S, S, 3] -> [m, n, d_v]


class Item(NamedTuple):
    """One video of a plan. seconds: as its header says, 0 where that cannot be read."""

    name: str
    file: str
    bytes: int
    seconds: float


class Plan(NamedTuple):
    """What is to be written. about: what meta.json will say of the frames; shards: [first, stop) items of each."""

    fps: float
    size: int  # of pixels
    about: dict[str, Any]
    items: list[Item]
    shards: list[tuple[int, int]]

    @property
    def frames(self) -> int:
        return round(sum(item.seconds for item in self.items) * self.fps)


# --- reading ----------------------------------------------------------------------------------------------------------


class Features(Mapping[str, float]):
    """A folder that `write` has finished: the videos' durations in seconds by name, and any of their frames.

    Threads may share it. Raises UserError where the folder is none, is unfinished, or has another frame rate.
    """

    def __init__(self, path: str | Path, fps: float):
        self.path = user_path(path)
        if not (self.path / META).is_file():
            unfinished = (self.path / PLAN).is_file()
            advice = "run the same vmod data features again" if unfinished else "write it with vmod data features"
            raise UserError(f"{self.path}: {'an unfinished' if unfinished else 'no'} folder of features; {advice}")
        self.meta = json.loads((self.path / META).read_text(encoding="utf-8"))
        if self.meta["fps"] != fps:
            raise UserError(f"{self.path} has {self.meta['fps']:g} frames a second, data.fps is {fps:g}")
        self.fps = fps
        shards = [json.loads(file.read_text()) for file in sorted(self.path.glob("shard-*.json"))]
        self._place = {
            name: (number, *place) for number, shard in enumerate(shards) for name, place in shard["videos"].items()
        }
        self._local = threading.local()

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """The frames [start, stop) of a video: u8[F, S, S, 3] pixels or f32[F, n, d_v] features."""
        shard, first, frames = self._place[name]
        stop = min(stop, frames)
        if start >= stop:
            raise UserError(f"{self.path}: {name} has {frames} frames, none from {start} on")
        records = range(first + start // CHUNK, first + (stop - 1) // CHUNK + 1)
        raw = b"".join(self._reader(shard).read(list(records)))
        shape, dtype = self.meta["frame"], _dtype(self.meta["dtype"])
        found = np.frombuffer(raw, dtype).reshape(-1, *shape)[start % CHUNK :][: stop - start]
        return found if found.dtype == np.uint8 else found.astype(np.float32)

    def frames(self, name: str) -> np.ndarray:
        """All frames of a video."""
        return self.read(name, 0, self._place[name][2])

    def _reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        readers = self._local.__dict__.setdefault("readers", {})
        if shard not in readers:
            readers[shard] = ArrayRecordReader(str(_shard(self.path, shard)))
        return readers[shard]

    def __getitem__(self, name: str) -> float:
        return (self._place[name][2] - 1) / self.fps

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, name: object) -> bool:
        return name in self._place


def _dtype(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.array_record"


# --- planning ---------------------------------------------------------------------------------------------------------


def make_plan(
    root: str | Path,
    out: str | Path,
    fps: float,
    size: int,
    about: Mapping[str, Any],
    frame_bytes: int,
    only: Sequence[str] | None = None,
) -> Plan:
    """The plan of `out`, made of all videos (or `.pt` files) below `root` and written, or the one that is there.

    about: of the encoder, recorded; frame_bytes: of one frame as written, for shards of a sensible size; only: of these
    videos. Raises UserError where there is no video, or where `out` was begun with other videos or another encoder.
    """
    root, out = user_path(root), user_path(out)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    found = find_videos(root, nested=True, endings=VIDEO_ENDINGS) or find_videos(root, nested=True, endings=(".pt",))
    names = [name for name in found if only is None or name in set(only)]
    if not names:
        raise UserError(f"{root}: no video and no .pt file below it")
    here = {"format": FORMAT, "fps": fps, "size": size, "about": dict(about)}
    if (out / PLAN).is_file():
        there = json.loads((out / PLAN).read_text(encoding="utf-8"))
        differs = [key for key in here if there.get(key) != here[key]]
        if differs or [item[0] for item in there["items"]] != names:
            what = f"another {differs[0]}" if differs else "other videos"
            raise UserError(f"{out} was begun with {what}: choose another --out, or remove it")
        items = [Item(*item) for item in there["items"]]
        return Plan(fps, size, here["about"], items, [tuple(shard) for shard in there["shards"]])
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists and holds other files; choose another folder")
    items = [
        Item(name, str(found[name]), found[name].stat().st_size, _seconds(found[name], fps))
        for name in tqdm(names, "looking at videos", disable=None)
    ]
    plan = Plan(fps, size, here["about"], items, _shards(items, fps, frame_bytes))
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / PLAN, {**here, "items": items, "shards": plan.shards})
    return plan


def _shards(items: Sequence[Item], fps: float, frame_bytes: int) -> list[tuple[int, int]]:
    """Runs of items of about SHARD_BYTES each."""
    shards, first, filled = [], 0, 0.0
    for number, item in enumerate(items):
        filled += item.bytes if item.file.endswith(".pt") else item.seconds * fps * frame_bytes
        if filled >= SHARD_BYTES or number == len(items) - 1:
            shards.append((first, number + 1))
            first, filled = number + 1, 0.0
    return shards


def _seconds(path: Path, fps: float) -> float:
    """How long a file says it is; 0 where it cannot be read, which `write_shard` will say more about."""
    from vmod_jax.data import pt_files, video

    try:
        if path.suffix == ".pt":
            return len(pt_files.open_tensor(path)) / fps
        return video.probe(path).duration or 0.0
    except UserError:
        return 0.0


class Estimate(NamedTuple):
    videos: int
    hours: float  # of video
    bytes: float  # that will be written, before compression
    seconds: float  # that it takes, on so many workers
    free: int  # bytes on the disk


def estimate(plan: Plan, out: Path, encode: Encode | None, workers: int) -> Estimate:
    """Time and size of a plan, from its first readable video's first frames, which are decoded and encoded twice."""
    for item in plan.items:
        try:
            for _ in range(2):  # the first time compiles
                began = time.perf_counter()
                chunk = next(chunks(item, plan, encode))
                each = (time.perf_counter() - began) / len(chunk)
        except UserError:
            continue
        todo = plan.frames * (1 - _done(plan, out) / len(plan.shards))
        size = plan.frames * chunk[0].nbytes
        hours = sum(item.seconds for item in plan.items) / 3600
        return Estimate(len(plan.items), hours, size, todo * each / workers, shutil.disk_usage(out).free)
    raise UserError(f"none of the {len(plan.items)} videos can be read: {plan.items[0].file}, for one")


def _done(plan: Plan, out: Path) -> int:
    return sum(_shard(out, number).with_suffix(".json").exists() for number in range(len(plan.shards)))


# --- writing ----------------------------------------------------------------------------------------------------------


def chunks(item: Item, plan: Plan, encode: Encode | None) -> Iterator[np.ndarray]:
    """A video's frames, CHUNK at a time, as they are written. Raises UserError where it breaks off."""
    from vmod_jax.data import pt_files, video

    if item.file.endswith(".pt"):
        tensor = pt_files.open_tensor(item.file)
        for start in range(0, len(tensor), CHUNK):
            chunk = np.ascontiguousarray(tensor[start : start + CHUNK])
            if not np.isfinite(chunk.astype(np.float32)).all():
                raise UserError(f"{item.file}: frame {start} or one soon after it is not finite")
            yield chunk
        return
    frames = (frame for _, frame in video.decode(item.file, plan.fps, plan.size))
    while chunk := list(islice(frames, CHUNK)):
        yield encode(np.stack(chunk)) if encode else np.stack(chunk)


def write_shard(plan: Plan, number: int, out: str | Path, make_encoder: Callable[[], Encode | None]) -> bool:
    """Writes one shard; -> whether it is there now: False where another worker is at it.

    make_encoder: called where there is something to do, once a process.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = _shard(Path(out), number)
    done = path.with_suffix(".json")
    if done.exists():
        return True
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if done.exists():  # since then
            return True
        encode, part = _encoder(make_encoder), path.with_suffix(".part")
        writer = ArrayRecordWriter(str(part), "group_size:1,zstd:1")
        videos: dict[str, list[int]] = {}
        quarantined: dict[str, str] = {}
        count, frame = 0, None
        for item in plan.items[slice(*plan.shards[number])]:
            first, frames = count, 0
            try:
                for chunk in chunks(item, plan, encode):
                    about = [list(chunk.shape[1:]), chunk.dtype.name]
                    if frame not in (None, about):
                        raise UserError(f"{item.file}: its frames are {about}, those before {frame}")
                    frame = about
                    writer.write(chunk.tobytes())
                    count, frames = count + 1, frames + len(chunk)
                videos[item.name] = [first, frames]
            except UserError as error:  # what was written of it stays, and nothing leads there
                quarantined[item.name] = str(error)
        writer.close()
        part.replace(path)
        _write_json(done, {"videos": videos, "quarantined": quarantined, "frame": frame})
    path.with_suffix(".lock").unlink(missing_ok=True)
    return True


@functools.lru_cache(1)
def _encoder(make_encoder: Callable[[], Encode | None]) -> Encode | None:
    return make_encoder()


def write(
    plan: Plan, out: str | Path, make_encoder: Callable[[], Encode | None], workers: int = 1, beam: Sequence[str] = ()
) -> dict[str, Any]:
    """Writes what is missing of a plan; -> what meta.json says in the end.

    workers: processes here; beam: options of an Apache Beam pipeline, which writes the shards instead (the folder must
    then be one that its workers see). Several machines may run the same command on a folder that they share.
    Raises UserError where other workers are still at some shards, and where no video at all could be read.
    """
    out = user_path(out)
    one = functools.partial(write_shard, plan, out=str(out), make_encoder=make_encoder)
    todo = [number for number in range(len(plan.shards)) if not _shard(out, number).with_suffix(".json").exists()]
    if beam:
        _with_beam(todo, one, beam)
    else:
        seconds = [sum(item.seconds for item in plan.items[slice(*shard)]) for shard in plan.shards]
        with tqdm(total=round(sum(seconds)), unit="s of video", disable=None) as bar:
            bar.update(round(sum(seconds)) - round(sum(seconds[number] for number in todo)))
            for number in _each(todo, one, workers):
                bar.update(round(seconds[number]))
    return _finish(plan, out)


def _each(todo: Sequence[int], one: Callable[[int], bool], workers: int) -> Iterator[int]:
    if workers == 1:
        yield from (number for number in todo if one(number) in (True, False))
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(one, number): number for number in todo}
        for future in as_completed(futures):
            future.result()
            yield futures[future]


def _with_beam(todo: Sequence[int], one: Callable[[int], bool], options: Sequence[str]) -> None:
    try:
        import apache_beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("--beam needs Apache Beam: pip install 'vmod_jax[beam]', or leave it out") from error
    with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        shards = pipeline | apache_beam.Create(list(todo)) | apache_beam.Reshuffle()
        _ = shards | apache_beam.Map(one)


def _finish(plan: Plan, out: Path) -> dict[str, Any]:
    """meta.json and quarantine.json, once all shards are there."""
    done = [_shard(out, number).with_suffix(".json") for number in range(len(plan.shards))]
    if missing := sum(not file.exists() for file in done):
        raise UserError(
            f"{out}: {missing} of {len(done)} shards are with other workers, or theirs were killed; run again"
        )
    shards = [json.loads(file.read_text(encoding="utf-8")) for file in done]
    quarantined = {name: why for shard in shards for name, why in shard["quarantined"].items()}
    frames = [shard["frame"] for shard in shards if shard["frame"]]
    if not frames:
        raise UserError(
            f"{out}: none of the {len(quarantined)} videos could be read: {next(iter(quarantined.values()))}"
        )
    for shard, file in zip(shards, done, strict=True):
        if shard["frame"] not in (None, frames[0]):
            raise UserError(f"{file}: its frames are {shard['frame']}, those of the first shard {frames[0]}")
    shape, dtype = frames[0]
    counts = [place[1] for shard in shards for place in shard["videos"].values()]
    meta = {
        **plan.about,
        "kind": "pixels" if dtype == "uint8" else "features",
        "frame": shape,
        "dtype": dtype,
        "fps": plan.fps,
        "videos": len(counts),
        "frames": sum(counts),
        "quarantined": len(quarantined),
    }
    for left in [*out.glob("*.lock"), *out.glob("*.part"), *out.glob(".*.json.*")]:  # by workers that were killed
        left.unlink(missing_ok=True)
    _write_json(out / "quarantine.json", quarantined)
    _write_json(out / META, meta)
    return meta


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
