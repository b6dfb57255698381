"""Small worlds of narrated video: coloured shapes that appear, move, change colour and leave.

`plain` is the demo's. `cluttered` is the benchmark of the depth policies: smaller objects before a drifting background,
among distractors that look alike and hop about, of which nothing must be said until somebody asks.

The videos are real h264 files, the annotations have the schema of Ego4D's narrations, so that everything a user's own
streams go through is exercised. What is said *and when* can be known from the pixels alone: an event is complete for
the first time in the sampled frame whose time is its narration's, rounded up to 1 / sample_fps.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from vmod_jax.data import video
from vmod_jax.data.storage import replacing
from vmod_jax.errors import UserError

PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")


@dataclass(frozen=True)
class World:
    sample_fps: int = 2  # frames a second that a model sees; events fall on them
    fps: int = 8  # of the video files, a multiple of sample_fps
    seconds: tuple[int, int] = (8, 12)  # shortest and longest video
    side: int = 96  # pixels
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "cross")
    colours: tuple[tuple[str, tuple[int, int, int]], ...] = (
        ("red", (225, 45, 40)),
        ("green", (40, 175, 70)),
        ("blue", (50, 85, 235)),
        ("yellow", (245, 215, 60)),
    )
    max_objects: int = 2
    object_size: float = 0.9  # of a grid cell
    jitter: float = 0.05  # of a grid cell: how far off its middle an object may stand
    gap: tuple[float, float] = (1.5, 4.0)  # seconds from one event to the next
    lead: float = 0.1  # seconds by which a narration is earlier than the frame that shows it
    brightness: tuple[int, int] = (70, 120)  # of the background
    texture: float = 6.0  # of the background, standard deviation
    noise: float = 3.0  # of the camera, standard deviation
    drift: float = 0.0  # of the background, pixels a second
    distractors: tuple[str, ...] = ()  # shapes, one thing of each all the time, which are no narrator's business
    questions: float = 0.0  # chance of one about a distractor between two events
    # how often each event is drawn, among those possible
    appear: float = 2.0
    move: float = 3.0
    turn: float = 1.5
    leave: float = 1.0
    hop: float = 0.0  # of a distractor to another place, which is not narrated

    def __post_init__(self):
        if self.fps % self.sample_fps:
            raise UserError(f"world: fps {self.fps} must be a multiple of sample_fps {self.sample_fps}")
        most = len(PLACES) - 1 - len(self.distractors)
        if not 1 <= self.max_objects <= most:
            raise UserError(f"world: max_objects {self.max_objects} must be 1 to {most}: a move needs a free place")

    @property
    def kinds(self) -> list[tuple[str, str]]:
        return [(colour, shape) for colour, _ in self.colours for shape in self.shapes]


WORLDS = {
    "plain": World(),
    "cluttered": World(
        object_size=0.7,
        jitter=0.12,
        gap=(1.0, 5.0),
        texture=12.0,
        drift=6.0,
        distractors=("ring", "bar"),
        questions=0.3,
        hop=2.0,
    ),
}


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    place: int  # index into PLACES
    offset: tuple[float, float]  # x, y from the middle of its cell, in cells

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


class Event(NamedTuple):
    tick: int  # sampled frame that is the first to show it
    text: str  # "A red circle appears at the top left"; "" for what is not narrated
    things: dict[int, Thing]  # what is there from then on, by the object's number: distractors have negative ones


class Question(NamedTuple):
    tick: int  # the last sampled frame seen when it is asked
    text: str
    answer: str


def sentences(world: World | None = None) -> list[str]:
    """Everything that can be said in this world, as it stands in a conversation (final full stop included)."""
    world = world or World()
    texts = []
    for colour, shape in world.kinds:
        name = f"{colour} {shape}"
        for place in PLACES:
            texts += [_starts(name, place), _appears(name, place), _moves(name, place)]
        texts += [_turns(name, other) for other, _ in world.colours if other != colour]
        texts.append(_leaves(name))
    asked = [_asks(shape) for shape in world.distractors]
    answers = [f"{colour.capitalize()}." for colour, _ in world.colours if asked]
    return [f"{text}." for text in texts] + asked + answers


def script(rng: np.random.Generator, world: World) -> tuple[int, list[Event]]:
    """(number of sampled frames, events in order; the first at tick 0). No two objects ever look alike."""
    frames = world.sample_fps * int(rng.integers(world.seconds[0], world.seconds[1] + 1))
    gaps = [round(second * world.sample_fps) for second in world.gap]
    things: dict[int, Thing] = {}
    for number, shape in enumerate(world.distractors, 1):
        colour = world.colours[rng.integers(len(world.colours))][0]
        things[-number] = Thing(colour, shape, **_new_place(rng, world, things))
    first = _new_thing(rng, world, things)
    events = [Event(0, _starts(first.name, PLACES[first.place]), {**things, 0: first})]
    born = 1
    while (tick := events[-1].tick + int(rng.integers(gaps[0], gaps[1] + 1))) <= frames - world.sample_fps:
        things = dict(events[-1].things)
        told = [number for number in things if number >= 0]
        possible = {
            "appear": world.appear * (len(told) < world.max_objects),
            "move": world.move * bool(told),
            "turn": world.turn * any(_free_colours(world, things, number) for number in told),
            "leave": world.leave * bool(told),
        } | ({"hop": world.hop} if world.distractors else {})
        weights = np.array(list(possible.values()))
        kind = rng.choice(list(possible), p=weights / weights.sum())
        if kind == "appear":
            thing = things[born] = _new_thing(rng, world, things)
            text = _appears(thing.name, PLACES[thing.place])
            born += 1
        elif kind == "hop":
            number = -int(rng.integers(1, len(world.distractors) + 1))
            things[number] = replace(things[number], **_new_place(rng, world, things))
            text = ""
        else:
            able = [number for number in told if kind != "turn" or _free_colours(world, things, number)]
            number = int(rng.choice(able))
            colours = _free_colours(world, things, number)
            thing = things.pop(number)
            if kind == "leave":
                text = _leaves(thing.name)
            elif kind == "move":
                things[number] = replace(thing, **_new_place(rng, world, {**things, number: thing}))
                text = _moves(thing.name, PLACES[things[number].place])
            else:
                things[number] = replace(thing, colour=str(rng.choice(colours)))
                text = _turns(thing.name, things[number].colour)
        events.append(Event(tick, text, things))
    return frames, events


def ask(rng: np.random.Generator, world: World, events: list[Event]) -> list[Question]:
    """Questions about distractors, each between two events; what is true then is true from the first of them on."""
    asked = []
    for before, after in pairwise(events) if world.distractors else ():
        if after.tick - before.tick > 1 and rng.random() < world.questions:
            number = -int(rng.integers(1, len(world.distractors) + 1))
            tick = int(rng.integers(before.tick, after.tick - 1))
            thing = before.things[number]
            asked.append(Question(tick, _asks(thing.shape), f"{thing.colour.capitalize()}."))
    return asked


def render(rng: np.random.Generator, world: World, frames: int, events: list[Event]) -> Iterator[np.ndarray]:
    """Yields u8[side, side, 3] for every frame of the file: `frames` sampled ones and those between.

    A change happens in the frames between the sampled frame before it and its own, in which it is complete.
    """
    ratio = world.fps // world.sample_fps
    ground = _background(rng, world)
    noise = rng.normal(0, world.noise, (8, world.side, world.side, 3)).astype(np.float32)
    current, still, base = 0, None, ground
    for index in range(frames * ratio):
        if world.drift:
            ground, still = np.roll(base, round(world.drift * index / world.fps), axis=1), None
        if current + 1 < len(events) and index >= events[current + 1].tick * ratio:
            current, still = current + 1, None
        now = events[current].things
        done = (index / ratio - events[current + 1].tick + 1) if current + 1 < len(events) else 0.0
        if done > 0:
            image = _draw(ground, world, now, events[current + 1].things, done)
        else:
            image = still = _draw(ground, world, now, now, 0.0) if still is None else still
        yield (image + noise[rng.integers(len(noise))]).clip(0, 255).astype(np.uint8)


def boxes(world: World, frames: int, events: list[Event]) -> list[list[dict]]:
    """For every sampled frame its objects: {"object", "number", "place", "box": [left, top, right, bottom]} in pixels.

    A distractor has "distractor": True as well.
    """
    out, current = [], 0
    for tick in range(frames):
        if current + 1 < len(events) and tick >= events[current + 1].tick:
            current += 1
        out.append(
            [
                {
                    "object": thing.name,
                    "number": number,
                    "place": PLACES[thing.place],
                    "box": _box(_mask(world, thing.shape, _centre(world, thing), 1.0)),
                }
                | ({"distractor": True} if number < 0 else {})
                for number, thing in events[current].things.items()
            ]
        )
    return out


def generate(
    out: str | Path, train: int, val: int, test: int, seed: int = 0, world: World | None = None
) -> dict[str, int | float]:
    """Writes a folder of narrated videos, all of it or nothing; the same arguments give the same bytes.

    NAME.mp4 a video; narrations.json in the schema of Ego4D's all_narrations_redacted.json; questions.json, where the
    world has some, in that of its live chats; splits.json {"train": [NAME, ...], ...}; boxes.json {NAME: `boxes`};
    world.json the parameters. Video i of a split depends on
    the seed and its own number only, so a larger set holds the smaller one.
    Returns {"videos", "narrations", "sentences" (distinct), "seconds" (of video)}.
    Raises UserError for numbers that make no sense.
    """
    if min(train, val, test) < 0 or train + val + test == 0:
        raise UserError(f"{train} train, {val} val, {test} test videos: give numbers of at least 0, not all 0")
    world = world or World()
    splits = {
        split: [f"{split}-{index:04d}" for index in range(count)]
        for split, count in (("train", train), ("val", val), ("test", test))
    }
    streams = {
        name: np.random.SeedSequence([seed, which, index])
        for which, names in enumerate(splits.values())
        for index, name in enumerate(names)
    }
    with replacing(out, "narrations.json") as folder:

        def one(name: str) -> tuple[int, list[Event], list[Question]]:
            rng = np.random.default_rng(streams[name])
            frames, events = script(rng, world)
            asked = ask(rng, world, events)
            video.write(folder / f"{name}.mp4", render(rng, world, frames, events), world.fps)
            return frames, events, asked

        # Threads: drawing and encoding are NumPy and x264, which work outside the interpreter's lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = dict(zip(streams, tqdm(pool.map(one, streams), "videos", len(streams), disable=None), strict=True))
        narrations = {
            name: {"status": "complete", "narrations": _narrations(name, world, made[name][1])} for name in made
        }
        _write_json(folder / "narrations.json", {"version": "1", "videos": narrations})
        if world.questions:
            chats = [_chat(name, world, frames, asked) for name, (frames, _, asked) in made.items()]
            _write_json(folder / "questions.json", chats)
        _write_json(folder / "splits.json", splits)
        _write_json(folder / "boxes.json", {name: boxes(world, *made[name][:2]) for name in made})
        _write_json(folder / "world.json", {"seed": seed, **asdict(world)})
    texts = [event.text for _, events, _ in made.values() for event in events if event.text]
    return {
        "videos": len(made),
        "narrations": len(texts),
        "sentences": len(set(texts)),
        "seconds": sum(frames for frames, _, _ in made.values()) / world.sample_fps,
    }


def _starts(name: str, place: str) -> str:
    return f"A {name} is at the {place}"


def _appears(name: str, place: str) -> str:
    return f"A {name} appears at the {place}"


def _moves(name: str, place: str) -> str:
    return f"The {name} moves to the {place}"


def _turns(name: str, colour: str) -> str:
    return f"The {name} turns {colour}"


def _leaves(name: str) -> str:
    return f"The {name} leaves"


def _asks(shape: str) -> str:
    return f"What colour is the {shape}?"


def _chat(name: str, world: World, frames: int, asked: list[Question]) -> dict:
    """A video's questions in the schema of Ego4D's live chats; each is answered at once."""
    turns = [
        {"role": role, "content": content, "time": question.tick / world.sample_fps}
        for question in asked
        for role, content in (("user", question.text), ("assistant", question.answer))
    ]
    return {"video_uid": name, "duration": frames / world.sample_fps, "conversation": turns}


def _narrations(name: str, world: World, events: list[Event]) -> list[dict]:
    events = [event for event in events if event.text]
    times = [round(max(0.0, event.tick / world.sample_fps - world.lead), 3) for event in events]
    return [
        {
            "time": time,
            "text": f"#O {event.text}",
            "timestamp_frame": round(time * world.fps),
            "_annotation_uid": f"{name}-pass1",
        }
        for time, event in zip(times, events, strict=True)
    ]


def _new_place(rng: np.random.Generator, world: World, things: dict[int, Thing]) -> dict:
    """A place that none of `things` has, and where in its cell."""
    free = [place for place in range(len(PLACES)) if place not in {thing.place for thing in things.values()}]
    x, y = rng.uniform(-world.jitter, world.jitter, 2)
    return {"place": int(rng.choice(free)), "offset": (float(x), float(y))}


def _free_colours(world: World, things: dict[int, Thing], number: int) -> list[str]:
    """What `number` may turn without looking like another of its shape."""
    taken = {thing.colour for thing in things.values() if thing.shape == things[number].shape}
    return [colour for colour, _ in world.colours if colour not in taken]


def _new_thing(rng: np.random.Generator, world: World, things: dict[int, Thing]) -> Thing:
    taken = {(thing.colour, thing.shape) for thing in things.values()}
    free = [kind for kind in world.kinds if kind not in taken]
    colour, shape = free[rng.integers(len(free))]
    return Thing(colour, shape, **_new_place(rng, world, things))


def _background(rng: np.random.Generator, world: World) -> np.ndarray:
    """f32[side, side, 3]: a smooth grey texture, bilinear between 6 x 6 random values; without a seam if it drifts."""
    values = rng.uniform(*world.brightness) + rng.normal(0, world.texture, (6, 6))
    if world.drift:
        values[:, -1] = values[:, 0]
    at = np.linspace(0, 5, world.side)
    rows = np.stack([np.interp(at, np.arange(6), column) for column in values.T], 1)
    plane = np.stack([np.interp(at, np.arange(6), row) for row in rows])
    return np.repeat(plane[..., None], 3, -1).astype(np.float32)


def _centre(world: World, thing: Thing) -> np.ndarray:
    """f64[2]: x, y in pixels."""
    row, column = divmod(thing.place, 3)
    return (np.array([column, row]) + 0.5 + thing.offset) * world.side / 3


def _draw(ground: np.ndarray, world: World, now: dict[int, Thing], then: dict[int, Thing], done: float) -> np.ndarray:
    """f32[side, side, 3]: `done` of the way from one set of objects to the other."""
    image, rgb = ground, dict(world.colours)
    for number in now | then:
        before, after = now.get(number), then.get(number)
        scale = done if before is None else 1 - done if after is None else 1.0
        before, after = before or after, after or before
        assert before is not None
        assert after is not None
        centre = (1 - done) * _centre(world, before) + done * _centre(world, after)
        colour = (1 - done) * np.array(rgb[before.colour]) + done * np.array(rgb[after.colour])
        mask = _mask(world, before.shape, centre, scale)[..., None]
        image = image + mask * (colour.astype(np.float32) - image)
    return image


def _mask(world: World, shape: str, centre: np.ndarray, scale: float) -> np.ndarray:
    """f32[side, side]: how much of each pixel the shape covers, from its distance to the outline."""
    radius = max(scale * world.object_size * world.side / 6, 1e-3)
    pixels = np.arange(world.side, dtype=np.float32) + 0.5
    x, y = (pixels[None] - centre[0]) / radius, (pixels[:, None] - centre[1]) / radius
    return np.clip(0.5 - _OUTLINES[shape](x, y) * radius, 0, 1).astype(np.float32)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    along, across = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(along - 1, across - 0.3), np.maximum(along - 0.3, across - 1))


def _bar(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) - 1, np.abs(y) - 0.3)


# Signed distance to the outline (negative inside) of shapes within [-1, 1] x [-1, 1], y downwards.
_OUTLINES = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.95,
    "triangle": lambda x, y: np.maximum(y - 0.9, (1.9 * np.abs(x) - y - 1) / np.hypot(1.9, 1)),
    "cross": _cross,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) - 0.25,
    "bar": _bar,
}


def _box(mask: np.ndarray) -> list[int]:
    rows, columns = (np.flatnonzero((mask > 0.5).any(axis)) for axis in (1, 0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
