"""Ego-Exo4D's keysteps as questions: what is the step in this part of the take, seen by whoever wears the camera?

takes.json                        [{"take_uid", "root_dir", "duration_sec", "frame_aligned_videos": {camera: {stream:
                                  {"relative_path"}}}}]
annotations/keystep_{split}.json  {"annotations": {take_uid: {"segments": [{"start_time", "end_time", "step_name",
                                  "step_unique_id"}]}}, "vocabulary": {step_unique_id: name}}
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vmod_jax.data.conversation import Sample
from vmod_jax.data.sources.annotations import NUMBER, get, read_json, texts
from vmod_jax.data.sources.coin import STEP_PROMPT, ask, frames, sentence
from vmod_jax.errors import UserError

log = logging.getLogger(__name__)
SPLITS = ("train", "val")


class Segment(NamedTuple):
    """One keystep. video: the Aria camera's file, below the data set's folder; label: its step's name."""

    take: str
    video: str
    frames: tuple[int, int]
    step: int
    label: str

    @property
    def sample(self) -> Sample:
        """The question about it; its video by name, as a folder of features has it."""
        return ask(STEP_PROMPT, sentence(self.label), str(PurePosixPath(self.video).with_suffix("")), self.frames)


def segments(root: str | Path, split: str, fps: float) -> Iterator[Segment]:
    """The split's keysteps in the file's order; takes without a video of the Aria camera are left out, counted.

    Raises UserError for files that are not Ego-Exo4D's, naming take and key.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r}: Ego-Exo4D's keysteps have {' and '.join(SPLITS)}")
    videos = _aria_videos(Path(root) / "takes.json")
    file = Path(root) / "annotations" / f"keystep_{split}.json"
    without = 0
    for take, entry in get(read_json(file), "annotations", dict, str(file)).items():
        where = f"{file.name}: take {take}"
        found = get(entry, "segments", list, where)
        if take not in videos:
            without += 1
            continue
        video, duration = videos[take]
        for number, segment in enumerate(found):
            here = f"{where}: segment {number}"
            start, end = (get(segment, key, NUMBER, here) for key in ("start_time", "end_time"))
            step, label = get(segment, "step_unique_id", int, here), get(segment, "step_name", str, here)
            yield Segment(take, video, frames(start, end, fps, int(duration * fps + 1e-9)), step, label)
    if without:
        log.warning("%s: %d takes have no video of an Aria camera and are left out", file, without)


def vocabulary(root: str | Path, split: str) -> list[str]:
    """The names of all steps, sorted."""
    file = Path(root) / "annotations" / f"keystep_{split}.json"
    return sorted(set(texts(read_json(file), "vocabulary", dict, str(file))))


def _aria_videos(file: Path) -> dict[str, tuple[str, float]]:
    """take_uid -> (path of stream "rgb" of its first Aria camera, seconds)."""
    takes = read_json(file)
    if not isinstance(takes, list):
        raise UserError(f"{file}: a list of takes is needed")
    found = {}
    for number, take in enumerate(takes):
        where = f"{file.name}: take {number}"
        cameras: Mapping[str, Any] = get(take, "frame_aligned_videos", dict, where)
        name = next((camera for camera in cameras if camera.lower().startswith("aria")), None)
        aria = get(cameras, name, dict, where) if name else {}
        rgb = get(aria, "rgb", dict, f"{where}, {name}") if aria.get("rgb") else {}
        if rgb.get("relative_path"):
            path = get(rgb, "relative_path", str, f"{where}, {name}")
            video = str(PurePosixPath(get(take, "root_dir", str, where)) / path)
            found[get(take, "take_uid", str, where)] = (video, float(get(take, "duration_sec", NUMBER, where)))
    return found
