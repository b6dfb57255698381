"""The table of sources: where streams come from, each a function (config.data, split, image_size) -> Streams.

A data set's annotation files lie in data.root as it ships them, or in data.root/NAME where several data sets lie side
by side (NAME: ego4d, coin, egoexo4d). Its frames come from data.features (again that folder, or NAME below it), which
`vmod data features` has written, else from its videos, which are decoded.
"""

import functools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vmod_jax.caches import cache_folder
from vmod_jax.data.conversation import Sample
from vmod_jax.data.features import Features
from vmod_jax.data.sources import coin, dialogue, egoexo4d, lta
from vmod_jax.data.storage import open_source, read_meta
from vmod_jax.data.streams import Streams, Videos, spot_tokenizer
from vmod_jax.errors import UserError, user_path

Source = Callable[[Any, str, int], Streams]


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
    root = user_path(data.root) if data.root else cache_folder() / name
    if not (root / "narrations.json").exists():
        shapes.generate(root, **counts, seed=data.seed, world=world)
    there = {name: len(videos) for name, videos in json.loads((root / "splits.json").read_text()).items()}
    if there != counts:
        raise UserError(f"{root} holds {there} videos, the configuration says {counts}: name another data.root")
    return _narrated(root, data, split, image_size, shapes.sentences(world))


def narration(data: Any, split: str, image_size: int) -> Streams:
    """A folder of videos (NAME.mp4, ...) with narrations.json, in the schema of Ego4D's all_narrations_redacted.json.

    Its tokenizer is one trained on the spot on the narrations of the training split; for a large model name its own in
    data.tokenizer.
    """
    return _narrated(user_path(data.root), data, split, image_size)


def prepared(data: Any, split: str, image_size: int) -> Streams:
    """A folder that `vmod data` wrote: pixels, or features (then image_size does not matter)."""
    path = user_path(data.path)
    meta = read_meta(path)
    same = {"fps": float(data.fps)} | ({"size": image_size} if meta["kind"] == "pixels" else {})
    source = open_source(path, split, same)
    frames = source.frames if meta["kind"] == "pixels" else lambda sample: source.frames(sample).astype(np.float32)
    if (path / "tokenizer").is_dir():
        return Streams(source.samples, frames, path / "tokenizer")
    return Streams(source.samples, frames, spot_tokenizer(_replies(open_source(path, "train").samples)))


def _narrated(root: Path, data: Any, split: str, image_size: int, texts: Sequence[str] | None = None) -> Streams:
    from vmod_jax.data.sources.ego4d import narration_samples

    videos = Videos(root, data.fps, image_size)
    outside = data.allow_outside
    read = functools.partial(narration_samples, root / "narrations.json", videos, data.fps, allow_outside=outside)
    samples = read(split)
    if texts is None:
        texts = _replies(samples if split == "train" else read("train"))
    return Streams(samples, lambda s: videos.frames(s.video)[s.start : s.stop], spot_tokenizer(texts), root)


def _replies(samples: Sequence[Sample]) -> list[str]:
    return sorted({m["content"] for sample in samples for m in sample.conversation if m["role"] == "assistant"})


# --- data sets as they are shipped ------------------------------------------------------------------------------------


def folder_of(folder: str | Path, name: str) -> Path:
    """The data set's folder: `name` below the one given, or that one itself."""
    folder = user_path(folder)
    return folder / name if (folder / name).is_dir() else folder


def frames_of(data: Any, name: str, places: Sequence[str], image_size: int) -> Videos | Features:
    """A data set's frames: data.features, or the videos in the first of `places` that its folder has."""
    if data.features:
        return Features(folder_of(data.features, name), data.fps)
    root = folder_of(data.root, name)
    where = next((root / place for place in places if (root / place).is_dir()), root)
    return Videos(where, data.fps, image_size, nested=True)


def _streams(
    frames: Videos | Features, split: str, samples: Callable[[str], Iterable[Sample]], texts: Iterable[str] = ()
) -> Streams:
    """Streams whose tokenizer, where none is named, is made of the training split's texts, and of `texts`."""
    said = lambda: sorted({*texts, *_texts(samples("train"))})  # noqa: E731
    read = lambda sample: frames.read(sample.video, sample.start, sample.stop)  # noqa: E731
    return Streams(list(samples(split)), read, None, texts=said)


def _texts(samples: Iterable[Sample]) -> Iterator[str]:
    return (m["content"] for sample in samples for m in sample.conversation if m["role"] != "stream")


EGO4D_VIDEOS = ("v2/full_scale", "v2/video_540ss", "videos")


def ego4d_annotations(data: Any) -> Path:
    """The folder of Ego4D's annotation files."""
    root = folder_of(data.root, "ego4d")
    return root / "v2" / "annotations" if (root / "v2" / "annotations").is_dir() else root


def ego4d_narration(data: Any, split: str, image_size: int) -> Streams:
    """Ego4D's narrations as streams: all_narrations_redacted.json and the benchmarks' split files."""
    from vmod_jax.data.sources.ego4d import narration_samples

    frames, file = frames_of(data, "ego4d", EGO4D_VIDEOS, image_size), ego4d_annotations(data) / NARRATIONS
    outside = data.allow_outside
    read = functools.partial(narration_samples, file, frames, data.fps, allow_outside=outside)
    return _streams(frames, split, read)


def ego4d_refined(data: Any, split: str, image_size: int) -> Streams:
    """Narrations that VideoLLM-online has refined: refined_narration_stream_{train,val}.json."""
    from vmod_jax.data.sources.ego4d import refined_samples

    frames, folder = frames_of(data, "ego4d", EGO4D_VIDEOS, image_size), ego4d_annotations(data)
    read = lambda split: refined_samples(  # noqa: E731
        folder / f"refined_narration_stream_{split}.json", frames, data.fps, data.seed, data.allow_outside
    )
    return _streams(frames, split, read)


def ego4d_livechat(data: Any, split: str, image_size: int) -> Streams:
    """GoalStep's live chats: goalstep_livechat_trainval_filtered_21k.json; all of them are for training."""
    frames, file = frames_of(data, "ego4d", EGO4D_VIDEOS, image_size), ego4d_annotations(data) / LIVECHAT
    read = lambda split: dialogue.live_chat_samples(file, frames, data.fps, split, data.seed)  # noqa: E731
    return _streams(frames, split, read)


def ego4d_lta(data: Any, split: str, image_size: int) -> Streams:
    """Long-term anticipation, version 2: fho_lta_{train,val}.json and its taxonomy."""
    frames = frames_of(data, "ego4d", EGO4D_VIDEOS, image_size)
    read = lambda split: [window.sample for window in lta_windows(data, split, frames)]  # noqa: E731
    return _streams(frames, split, read)


def lta_windows(data: Any, split: str, frames: Videos | Features) -> Iterator[lta.Window]:
    """The questions of a split, with the labels of what comes."""
    folder = ego4d_annotations(data)
    names = lta.taxonomy(folder / "fho_lta_taxonomy.json")
    return lta.windows(folder / f"fho_lta_{split}.json", names, frames, data.fps)


def coin_task(task: str) -> Source:
    """A task of COIN: coin.json."""

    def source(data: Any, split: str, image_size: int) -> Streams:
        frames, file = frames_of(data, "coin", ("videos",), image_size), folder_of(data.root, "coin") / "coin.json"
        return _streams(frames, split, lambda split: coin.samples(file, frames, data.fps, split, task))

    return source


def egoexo4d_keystep(data: Any, split: str, image_size: int) -> Streams:
    """Ego-Exo4D's keysteps: takes.json and annotations/keystep_{train,val}.json."""
    frames, root = frames_of(data, "egoexo4d", (), image_size), folder_of(data.root, "egoexo4d")
    read = lambda split: [  # noqa: E731
        segment.sample for segment in egoexo4d.segments(root, split, data.fps) if segment.sample.video in frames
    ]
    return _streams(frames, split, read)


def dialogues(data: Any, split: str, image_size: int) -> Streams:
    """Videos and conversations of one's own: dialogues.json or dialogues.jsonl (data/sources/dialogue.py says how)."""
    frames, root = frames_of(data, "dialogue", ("videos",), image_size), folder_of(data.root, "dialogue")
    file = next((root / name for name in DIALOGUES if (root / name).is_file()), root / DIALOGUES[0])
    return _streams(frames, split, lambda split: dialogue.dialogue_samples(file, frames, data.fps, split))


def instructions(data: Any, split: str, image_size: int) -> Streams:
    """LLaVA's instruction data, or a file like it, with its images below the same folder (data/sources/llava.py)."""
    from vmod_jax.data.sources.llava import Instructions

    folder = folder_of(data.root, "llava")
    names = [f"{split}.json", *(INSTRUCTIONS if split == "train" else ())]
    file = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    images = folder / "images" if (folder / "images").is_dir() else folder
    records = Instructions(file, images, data.plain, data.missing_images, cache_folder())
    return Streams(records, lambda s: records.frames(s, image_size), None, texts=lambda: sorted({*_texts(records)}))


INSTRUCTIONS = ("llava_v1_5_mix665k.json", "blip_laion_cc_sbu_558k.json")
NARRATIONS = "all_narrations_redacted.json"
LIVECHAT = "goalstep_livechat_trainval_filtered_21k.json"
DIALOGUES = ("dialogues.json", "dialogues.jsonl")

# name -> (config.data, split, image_size) -> Streams
SOURCES: dict[str, Source] = {
    "shapes": shapes,
    "narration": narration,
    "prepared": prepared,
    "ego4d_narration": ego4d_narration,
    "ego4d_refined": ego4d_refined,
    "ego4d_livechat": ego4d_livechat,
    "ego4d_lta": ego4d_lta,
    **{f"coin_{task}": coin_task(task) for task in coin.TASKS},
    "egoexo4d_keystep": egoexo4d_keystep,
    "dialogue": dialogues,
    "llava": instructions,
}


# --- splits, without any frames ---------------------------------------------------------------------------------------


def split_videos(root: str | Path, count: int) -> list[str]:
    """The first `count` videos of each split, by name, of the data set whose annotations lie in `root`.

    Raises UserError where no annotation file is known there.
    """
    from vmod_jax.data.sources.ego4d import video_splits

    root = user_path(root)
    found: dict[str, set[str]] = {}
    if (file := folder_of(root, "coin") / "coin.json").is_file():
        for split in ("train", "test"):
            found[split] = {video.name for video in coin.videos(file, _Any(), 1.0, split)}
    elif (folder_of(root, "egoexo4d") / "takes.json").is_file():
        for split in egoexo4d.SPLITS:
            found[split] = {s.sample.video for s in egoexo4d.segments(folder_of(root, "egoexo4d"), split, 1.0)}
    else:
        found = video_splits(ego4d_annotations(SimpleNamespace(root=root)))
    return [name for names in found.values() for name in sorted(names)[:count]]


class _Any(dict):
    """Durations where none are known: every video is there."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> float:
        return 1e9
