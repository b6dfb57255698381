"""Prepared streams on disk: a TFDS `array_record` folder, written whole or not at all, read at random.

    meta.json             what the frames are: kind, shape, dtype, fps, the encoder's name, examples a split
    samples-SPLIT.jsonl   the conversations without their frames, in the order of the examples
    streams-SPLIT.array_record-*, dataset_info.json, features.json      TFDS's own files

An example is one sample with its own frames, so that reading it costs its frames and no more, however long its video.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vmod_jax.data.conversation import Sample
from vmod_jax.errors import UserError

META = "meta.json"
EXAMPLES_PER_FILE = 100


def prepare(
    samples_by_split: Mapping[str, Iterable[Sample]],
    frames_of: Callable[[str], np.ndarray],
    fps: float,
    out: str | Path,
    meta: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the samples with their frames as the folder `out`; returns what meta.json then says.

    frames_of(video id) gives all of a video's frames at `fps`: u8[F, S, S, 3] pixels, or f32 / f16 / bf16 [F, n, d_v]
    features. It is called once a video, in whatever splits its samples are; only one video is in memory at a time.
    Samples of one video therefore stand together, otherwise in the order given. `meta` is added to meta.json.
    An existing data set is replaced at the end. Raises UserError when there is no sample at all, when videos differ in
    frame shape or dtype, and when a sample reaches beyond its video's end.
    """
    by_video: dict[str, list[tuple[str, Sample]]] = {}
    splits = {split: list(samples) for split, samples in samples_by_split.items()}
    for split, samples in splits.items():
        for sample in samples:
            by_video.setdefault(sample.video, []).append((split, sample))
    if not by_video:
        raise UserError(f"{out}: no samples to write; check the annotations and the videos' names")
    with replacing(out, META) as folder:
        writer = None
        about: dict[str, Any] = {}
        for name, wanted in tqdm(by_video.items(), "videos", disable=None):
            frames = np.asarray(frames_of(name))
            described = _describe(name, frames)
            if writer is None:
                about = described
                writer = _writer(folder, frames, [split for split, samples in splits.items() if samples])
            elif described != about:
                raise UserError(f"{name}: its frames are {described}, those before {about}; prepare them alike")
            for split, sample in wanted:
                if sample.stop > len(frames):
                    raise UserError(
                        f"{name}: a sample needs the frames {sample.start} to {sample.stop}, the video has "
                        f"{len(frames)} at {fps:g} a second; are the annotations of this video?"
                    )
                writer.add_examples({split: [_example(sample, frames[sample.start : sample.stop], fps)]})
                with (folder / f"samples-{split}.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(sample._asdict(), ensure_ascii=False) + "\n")
        assert writer is not None
        writer.close_all()
        counts = {split: len(samples) for split, samples in splits.items()}
        written = {**(meta or {}), **about, "fps": float(fps), "splits": counts}
        (folder / META).write_text(json.dumps(written, indent=1, ensure_ascii=False), encoding="utf-8")
    return written


class Source:
    """One split, at random: source[i] = {"sample": Sample, "frames": as prepared, [stop - start, ...]}.

    Files are opened at the first read; threads may share a source, and a pickled one opens its files anew.
    """

    def __init__(self, path: Path, split: str, meta: dict[str, Any]):
        self.path, self.split, self.meta = path, split, meta
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.meta["splits"][self.split]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"sample": self.samples[index], "frames": self._records[index]["frames"]}

    def __repr__(self) -> str:
        return f"Source({str(self.path)!r}, {self.split!r})"

    def __reduce__(self):
        return Source, (self.path, self.split, self.meta)

    @cached_property
    def samples(self) -> list[Sample]:
        """All samples, read without any frames."""
        with (self.path / f"samples-{self.split}.jsonl").open(encoding="utf-8") as file:
            return [Sample(**json.loads(line)) for line in file]

    def frames(self, sample: Sample) -> np.ndarray:
        """The frames of one of `samples`, which may have been cut short (a smaller `stop`)."""
        return self._records[self._index[sample.video, sample.start]]["frames"][: sample.stop - sample.start]

    @cached_property
    def _index(self) -> dict[tuple[str, int], int]:
        """(video, start) -> the example with most frames from there on."""
        order = sorted(range(len(self)), key=lambda index: self.samples[index].stop)
        return {(self.samples[index].video, self.samples[index].start): index for index in order}

    @property
    def _records(self) -> Any:
        with self._lock:  # TFDS builds its reader and its parser; once is enough
            return self._data_source

    @cached_property
    def _data_source(self) -> Any:
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder_from_directory(str(self.path))
        return builder.as_data_source(split=self.split)


def open_source(path: str | Path, split: str, expect: Mapping[str, Any] | None = None) -> Source:
    """A prepared data set's split. Raises UserError when there is none or when meta.json differs from `expect`."""
    meta = read_meta(path)
    if not meta["splits"].get(split):
        there = ", ".join(f"{name} ({count})" for name, count in meta["splits"].items())
        raise UserError(f"{path}: no samples in the split '{split}'; it has {there}")
    for key, value in (expect or {}).items():
        if meta.get(key) != value:
            raise UserError(
                f"{path}: was prepared with {key} = {meta.get(key)}, but {value} is wanted; "
                "prepare it again or change the configuration"
            )
    return Source(Path(path).resolve(), split, meta)


def read_meta(path: str | Path) -> dict[str, Any]:
    """kind "pixels" with size, or "features" with n and d_v; dtype, fps, splits {name: count}; whatever was added."""
    file = Path(path) / META
    if not file.is_file():
        raise UserError(f"{path}: no prepared data set here ({META} is missing); make one with `vmod data`")
    return json.loads(file.read_text(encoding="utf-8"))


@contextmanager
def replacing(out: str | Path, proof: str) -> Iterator[Path]:
    """A new folder beside `out` which takes its place when the block ends well, and is removed when it does not.

    An existing `out` is replaced only when it is empty or holds the file `proof`, which shows that we wrote it.
    """
    out = Path(out).resolve()
    if out.exists() and not (out / proof).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists and holds other files; choose another folder")
    new, old = out.with_name(f".{out.name}.unfinished"), out.with_name(f".{out.name}.old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _describe(name: str, frames: np.ndarray) -> dict[str, Any]:
    if frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3 and frames.shape[1] == frames.shape[2]:
        return {"kind": "pixels", "size": frames.shape[1], "dtype": "uint8"}
    if frames.dtype.name in ("float32", "float16", "bfloat16") and frames.ndim == 3:
        return {"kind": "features", "n": frames.shape[1], "d_v": frames.shape[2], "dtype": frames.dtype.name}
    raise UserError(
        f"{name}: frames are {frames.dtype}{list(frames.shape)}; "
        "wanted uint8 [F, S, S, 3] pixels or float32 / float16 / bfloat16 [F, n, d_v] features"
    )


def _writer(folder: Path, frames: np.ndarray, splits: list[str]) -> Any:
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "video": tfds.features.Text(),
            "conversation": tfds.features.Text(),
            "start": np.int64,
            "stop": np.int64,
            "fps": np.float32,
            "frames": tfds.features.Tensor(
                shape=(None, *frames.shape[1:]), dtype=frames.dtype.type, encoding=tfds.features.Encoding.BYTES
            ),
        }
    )
    identity = tfds.core.DatasetIdentity(
        name="streams", version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    writer = tfds.core.SequentialWriter(info, EXAMPLES_PER_FILE, file_format="array_record")
    writer.initialize_splits(splits)
    return writer


def _example(sample: Sample, frames: np.ndarray, fps: float) -> dict[str, Any]:
    conversation = json.dumps(sample.conversation, ensure_ascii=False)
    return {**sample._asdict(), "conversation": conversation, "fps": fps, "frames": frames}
