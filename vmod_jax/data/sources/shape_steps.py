"""Generated videos of steps, with annotation files in the schemas of COIN, Ego4D and Ego-Exo4D: stand-ins to try on.

A video shows one shape that takes on one colour after another. Which shape it is can be seen, and decides in which
order the colours come: round the circle of them forwards or backwards. So the step, the activity and whatever comes
next can be known from any of the frames, and from nothing else.
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from vmod_jax.data import video
from vmod_jax.data.sources.shapes import Event, Thing, World, render
from vmod_jax.data.storage import replacing
from vmod_jax.errors import UserError

PROOF = "steps.json"  # shows that a folder is one of ours
WORLD = World(side=48, shapes=("circle", "bar"), object_size=2.5, texture=3.0)
COLOURS = [colour for colour, _ in WORLD.colours]
CENTRE = 4  # of the nine places
DIRECTION = {"circle": 1, "bar": -1}
CLASSES = {"circle": "PaintBall", "bar": "PaintBeam"}
VERBS = {"circle": "roll_(a_ball)", "bar": "lift_(a_beam)"}


class Steps(NamedTuple):
    """One video: from which sampled frame on it shows which colour; `frames` in all."""

    name: str
    split: str
    shape: str
    colours: list[tuple[int, str]]
    frames: int

    @property
    def segments(self) -> list[tuple[str, float, float]]:
        """(colour, start, end) in seconds; the end is that of its last frame."""
        ends = [*self.colours[1:], (self.frames, "")]
        fps = WORLD.sample_fps
        return [(c, tick / fps, (end - 1) / fps) for (tick, c), (end, _) in zip(self.colours, ends, strict=True)]

    def label(self, colour: str) -> str:
        return f"paint the {self.shape} {colour}"


def generate(root: str | Path, schema: str, train: int, test: int, seed: int = 0) -> int:
    """Writes `train` + `test` videos and the annotation files of one of `SCHEMAS`; -> the number of videos.

    An existing data set of ours is replaced at the end. Raises UserError for an unknown schema.
    """
    if schema not in SCHEMAS:
        raise UserError(f"unknown schema '{schema}': use one of {', '.join(SCHEMAS)}")
    write, place, count = SCHEMAS[schema]
    names = [(f"{split}-{n:04d}", split) for split, many in (("train", train), ("test", test)) for n in range(many)]
    with replacing(root, PROOF) as folder:
        made = []
        for number, (name, split) in enumerate(tqdm(names, "videos", disable=None)):
            rng = np.random.default_rng([seed, number])
            one = script(rng, name, split, count)
            events = [
                Event(tick, colour, {0: Thing(colour, one.shape, CENTRE, (0.0, 0.0))}) for tick, colour in one.colours
            ]
            file = folder / place.format(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            video.write(file, render(rng, WORLD, one.frames, events), WORLD.fps)
            made.append(one)
        write(folder, made)
        write_json(folder / PROOF, {"schema": schema, "seed": seed, "train": train, "test": test})
    return len(made)


def script(rng: np.random.Generator, name: str, split: str, count: tuple[int, int]) -> Steps:
    """A shape, the colour it begins with, and `count` (least, most) steps of 2 or 3 frames each."""
    shape = str(rng.choice(list(DIRECTION)))
    first, tick, colours = int(rng.integers(len(COLOURS))), 0, []
    for step in range(int(rng.integers(count[0], count[1] + 1))):
        colours.append((tick, COLOURS[(first + step * DIRECTION[shape]) % len(COLOURS)]))
        tick += int(rng.integers(2, 4))
    return Steps(name, split, shape, colours, tick)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


# --- schemas ----------------------------------------------------------------------------------------------------------


def coin(root: Path, made: Sequence[Steps]) -> None:
    """coin.json."""
    subsets = {"train": "training", "test": "testing"}
    entries = {
        one.name: {
            "class": CLASSES[one.shape],
            "start": one.segments[0][1],
            "end": one.segments[-1][2],
            "subset": subsets[one.split],
            "video_url": "",
            "annotation": [
                {"id": str(i), "segment": [start, end], "label": one.label(colour)}
                for i, (colour, start, end) in enumerate(one.segments)
            ],
        }
        for one in made
    }
    write_json(root / "coin.json", {"database": entries})


def lta(root: Path, made: Sequence[Steps]) -> None:
    """fho_lta_{train,val}.json with their taxonomy, a clip a video."""
    folder = root / "v2" / "annotations"
    write_json(folder / "fho_lta_taxonomy.json", {"verbs": list(VERBS.values()), "nouns": COLOURS})
    for split, ours in (("train", "train"), ("val", "test")):
        clips = [
            {
                "clip_uid": f"clip-{one.name}",
                "video_uid": one.name,
                "clip_parent_start_sec": 0.0,
                "action_clip_start_sec": start,
                "action_clip_end_sec": end,
                "action_idx": index,
                "verb_label": list(VERBS).index(one.shape),
                "noun_label": COLOURS.index(colour),
            }
            for one in made
            if one.split == ours
            for index, (colour, start, end) in enumerate(one.segments)
        ]
        write_json(folder / f"fho_lta_{split}.json", {"clips": clips})


def egoexo4d(root: Path, made: Sequence[Steps]) -> None:
    """takes.json and annotations/keystep_{train,val}.json."""
    labels = [f"paint the {shape} {colour}" for shape in DIRECTION for colour in COLOURS]
    takes = [
        {
            "take_uid": f"uid-{one.name}",
            "take_name": one.name,
            "root_dir": f"takes/{one.name}",
            "duration_sec": one.frames / WORLD.sample_fps,
            "frame_aligned_videos": {"aria01": {"rgb": {"relative_path": "frame_aligned_videos/aria01_214-1.mp4"}}},
        }
        for one in made
    ]
    write_json(root / "takes.json", takes)
    for split, ours in (("train", "train"), ("val", "test")):
        annotations = {
            f"uid-{one.name}": {
                "take_uid": f"uid-{one.name}",
                "segments": [
                    {
                        "start_time": start,
                        "end_time": end,
                        "step_name": one.label(colour),
                        "step_unique_id": labels.index(one.label(colour)),
                    }
                    for colour, start, end in one.segments
                ],
            }
            for one in made
            if one.split == ours
        }
        vocabulary = {str(number): label for number, label in enumerate(labels)}
        write_json(
            root / "annotations" / f"keystep_{split}.json",
            {"annotations": annotations, "taxonomy": {}, "vocabulary": vocabulary},
        )


def narration(root: Path, made: Sequence[Steps]) -> None:
    """all_narrations_redacted.json and refined narrations, with splits.json in place of the benchmarks' files."""
    folder = root / "v2" / "annotations"
    said = {one.name: [(start, f"paints the {one.shape} {c}") for c, start, _ in one.segments] for one in made}
    uid = "{}-pass1".format
    videos = {
        name: {"narrations": [{"time": t, "text": f"#C C {text}", "_annotation_uid": uid(name)} for t, text in texts]}
        for name, texts in said.items()
    }
    write_json(folder / "all_narrations_redacted.json", {"videos": videos})
    write_json(
        folder / "splits.json",
        {name: [one.name for one in made if one.split == ours] for name, ours in (("train", "train"), ("val", "test"))},
    )
    for split, ours in (("train", "train"), ("val", "test")):
        refined = {
            one.name: {uid(one.name): [{"time": t, "text": f"You {text}."} for t, text in said[one.name]]}
            for one in made
            if one.split == ours
        }
        write_json(folder / f"refined_narration_stream_{split}.json", refined)


def dialogue(root: Path, made: Sequence[Steps]) -> None:
    """dialogues.jsonl, and the same as GoalStep's live chats: a question at the first frame, then every new colour."""
    records, chats = [], []
    for one in made:
        asked = {"role": "user", "content": "Tell me every new colour.", "time": one.segments[0][2]}
        news = [
            {"role": "assistant", "content": f"{after[0].capitalize()}.", "time": after[1]}
            for _, after in pairwise(one.segments)
        ]
        split = {"test": "val"}.get(one.split, one.split)
        records.append({"video": one.name, "split": split, "conversation": [asked, *news]})
        seconds = one.frames / WORLD.sample_fps
        if one.split == "train":
            chats.append({"video_uid": one.name, "duration": seconds, "conversation": [asked, *news]})
    (root / "dialogues.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    write_json(root / "goalstep_livechat_trainval_filtered_21k.json", chats)


# name -> (annotations of the videos, where a video lies, fewest and most steps)
SCHEMAS: dict[str, tuple[Callable[[Path, Sequence[Steps]], None], str, tuple[int, int]]] = {
    "coin": (coin, "videos/{}.mp4", (3, 6)),
    "lta": (lta, "v2/full_scale/{}.mp4", (28, 30)),
    "egoexo4d": (egoexo4d, "takes/{}/frame_aligned_videos/aria01_214-1.mp4", (3, 6)),
    "narration": (narration, "v2/full_scale/{}.mp4", (3, 6)),
    "dialogue": (dialogue, "videos/{}.mp4", (3, 6)),
}
