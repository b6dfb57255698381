"""The narrated shapes: what the files say is what the pixels show, when they say it."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from vmod_jax.data import video
from vmod_jax.data.sources import shapes
from vmod_jax.data.sources.ego4d import narration_samples
from vmod_jax.errors import UserError

WORLD = shapes.World()


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "set"
    summary = shapes.generate(out, train=6, val=2, test=1, seed=3)
    assert summary["videos"] == 9
    return out


def narrated(folder):
    """(name, [(time, text)]) of every video."""
    for name, entry in load(folder / "narrations.json")["videos"].items():
        yield name, [(narration["time"], narration["text"]) for narration in entry["narrations"]]


def test_files(folder):
    splits = load(folder / "splits.json")
    assert {split: len(names) for split, names in splits.items()} == {"train": 6, "val": 2, "test": 1}
    names = [name for names in splits.values() for name in names]
    assert {path.stem for path in folder.glob("*.mp4")} == set(names)
    assert set(load(folder / "boxes.json")) == set(names)
    assert [name for name, _ in narrated(folder)] == names
    info = video.probe(folder / f"{names[0]}.mp4")
    assert (info.width, info.height, info.fps) == (96, 96, 8.0)
    assert info.duration is not None
    assert 12 <= info.duration <= 16


def test_the_schema_of_ego4d(folder, clips):
    ours, theirs = load(folder / "narrations.json"), load(clips / "streams" / "narrations.json")
    assert set(ours) == set(theirs)
    ours, theirs = (next(iter(data["videos"].values())) for data in (ours, theirs))
    assert set(ours) == set(theirs)
    first, other = (entry["narrations"][0] for entry in (ours, theirs))
    assert {key: type(value) for key, value in first.items()} == {key: type(value) for key, value in other.items()}


def test_every_frame_shows_its_objects_and_nothing_else(folder):
    """The decoded video against boxes.json: colour inside every box, grey in every other cell."""
    colours = dict(WORLD.colours)
    for name, frames in load(folder / "boxes.json").items():
        images = video.read(folder / f"{name}.mp4", fps=WORLD.sample_fps, size=WORLD.side).frames.astype(int)
        assert len(images) == len(frames)
        for image, things in zip(images, frames, strict=True):
            for thing in things:
                left, top, right, bottom = thing["box"]
                x, y = (left + right) // 2, (top + bottom) // 2
                middle = image[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))
                assert np.abs(middle - colours[thing["object"].split()[0]]).max() < 30, (name, thing)
            taken = {thing["place"] for thing in things}
            for index, place in enumerate(shapes.PLACES):
                row, column = divmod(index, 3)
                cell = image[row * 32 + 3 : row * 32 + 29, column * 32 + 3 : column * 32 + 29]
                assert (np.ptp(cell, axis=-1).max() > 90) == (place in taken), (name, place)


def test_the_first_frame_at_or_after_a_narration_is_the_first_that_shows_it(folder):
    scenes = load(folder / "boxes.json")
    for name, narrations in narrated(folder):
        frames = scenes[name]
        ticks = [math.ceil(time * WORLD.sample_fps) for time, _ in narrations]
        assert ticks[0] == 0
        assert ticks == [tick for tick in range(len(frames)) if tick == 0 or frames[tick] != frames[tick - 1]]


def test_narrations_are_true(folder):
    """Every sentence, read back, follows from the boxes before and after it."""
    scenes = load(folder / "boxes.json")
    for name, narrations in narrated(folder):
        for time, text in narrations:
            tick = math.ceil(time * WORLD.sample_fps)
            now = {thing["number"]: (thing["object"], thing["place"]) for thing in scenes[name][tick]}
            before = (
                {thing["number"]: (thing["object"], thing["place"]) for thing in scenes[name][tick - 1]} if tick else {}
            )
            words = text.removeprefix("#O ").split(" ", 3)
            thing, verb = " ".join(words[1:3]), words[3]
            gone, new = set(before.values()) - set(now.values()), set(now.values()) - set(before.values())
            if verb == "leaves":
                assert {what for what, _ in gone} == {thing}
                assert not new
            elif verb.startswith("turns "):
                ((old, place),) = gone
                assert old == thing
                assert new == {(f"{verb.removeprefix('turns ')} {words[2]}", place)}
            else:
                place = verb.split(" the ")[1]
                assert new == {(thing, place)}
                assert [what for what, _ in gone] == ([thing] if verb.startswith("moves") else [])


def test_every_narration_becomes_a_reply_at_its_frame(folder):
    """Through the same door as a user's own narrations: none is dropped, replaced or moved."""
    scenes = load(folder / "boxes.json")
    durations = {name: (len(frames) - 1) / WORLD.sample_fps for name, frames in scenes.items()}
    samples = {}
    for split, names in load(folder / "splits.json").items():
        found = narration_samples(folder / "narrations.json", durations, WORLD.sample_fps, split)
        assert [one.video for one in found] == names
        samples |= {one.video: one for one in found}
    for name, narrations in narrated(folder):
        frame, replies = samples[name].start - 1, []
        for message in samples[name].conversation:
            if message["role"] == "stream":
                frame += message["num_frames"]
            elif message["role"] == "assistant":
                replies.append((frame, message["content"]))
        said = [(math.ceil(time * WORLD.sample_fps), f"{text.removeprefix('#O ')}.") for time, text in narrations]
        assert replies == said
        assert {text for _, text in replies} <= set(shapes.sentences())


def test_events_are_irregular_and_keep_their_distance():
    rng = np.random.default_rng(0)
    gaps, texts = set(), set()
    for _ in range(300):
        frames, events = shapes.script(rng, WORLD)
        ticks = [event.tick for event in events]
        gaps |= set(np.diff(ticks).tolist())
        assert ticks[-1] <= frames - WORLD.sample_fps  # the last one is seen for a second
        texts |= {f"{event.text}." for event in events}
        assert all(len(event.things) <= WORLD.max_objects for event in events)
        assert all(a.text != b.text for a, b in pairwise(events))
        for event in events:
            assert len({thing.place for thing in event.things.values()}) == len(event.things)
            assert len({thing.name for thing in event.things.values()}) == len(event.things)
    assert gaps == set(range(3, 9))  # 1.5 to 4 s in half seconds
    assert len(texts) > 300
    assert texts <= set(shapes.sentences())


def test_a_crowded_world():
    """Few kinds and many objects: still no two alike, and every event is possible."""
    world = replace(WORLD, shapes=("circle",), max_objects=4, object_size=0.4, seconds=(20, 20))
    rng = np.random.default_rng(1)
    scripts = [shapes.script(rng, world) for _ in range(50)]
    crowds = [list(event.things.values()) for _, events in scripts for event in events]
    assert max(map(len, crowds)) == 4
    assert all(len({thing.name for thing in things}) == len(things) for things in crowds)
    images = list(shapes.render(rng, world, *scripts[0]))
    assert len(images) == 160
    assert images[0].shape == (96, 96, 3)


@pytest.mark.parametrize(("change", "message"), [({"fps": 9}, "multiple"), ({"max_objects": 9}, "free place")])
def test_impossible_worlds(change, message):
    with pytest.raises(UserError, match=message):
        replace(WORLD, **change)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shapes.generate(tmp_path / name, train=2, val=1, test=1, seed=seed)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 8
    for file in files:
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b
        assert a != c or file == "splits.json"


def test_more_videos_do_not_change_the_first_ones(tmp_path):
    for name, count in (("a", 1), ("b", 2)):
        shapes.generate(tmp_path / name, train=count, val=1, test=0, seed=0)
    for file in ("train-0000.mp4", "val-0000.mp4"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "b" / "train-0000.mp4").read_bytes() != (tmp_path / "b" / "train-0001.mp4").read_bytes()


def test_all_or_nothing(tmp_path, monkeypatch):
    out = tmp_path / "set"
    shapes.generate(out, train=1, val=0, test=0, seed=0)
    before = (out / "narrations.json").read_bytes()

    def fail(*_):
        raise RuntimeError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(shapes.video, "write", fail)
        with pytest.raises(RuntimeError, match="disk full"):
            shapes.generate(out, train=2, val=0, test=0, seed=1)
    assert (out / "narrations.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]

    shapes.generate(out, train=2, val=0, test=0, seed=1)
    assert (out / "train-0001.mp4").is_file()

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds other files"):
        shapes.generate(tmp_path / "mine", train=1, val=0, test=0)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep me"


CLUTTERED = shapes.WORLDS["cluttered"]


@pytest.fixture(scope="module")
def cluttered(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "cluttered"
    shapes.generate(out, train=6, val=1, test=1, seed=0, world=CLUTTERED)
    return out


def test_what_is_narrated_in_a_cluttered_world_is_what_the_told_ones_do(cluttered):
    """Distractors are there from end to end, hop about, and no narration is about them."""
    hops = 0
    for name, narrations in narrated(cluttered):
        frames = load(cluttered / "boxes.json")[name]
        told = [[t for t in things if not t.get("distractor")] for things in frames]
        others = [[t for t in things if t.get("distractor")] for things in frames]
        ticks = [math.ceil(time * CLUTTERED.sample_fps) for time, _ in narrations]
        assert ticks == [tick for tick in range(len(frames)) if tick == 0 or told[tick] != told[tick - 1]]
        assert all(sorted(t["object"].split()[1] for t in things) == ["bar", "ring"] for things in others)
        assert all(len({t["place"] for t in things}) == len(things) for things in frames)
        assert not any(shape in text for _, text in narrations for shape in CLUTTERED.distractors)
        hops += sum(before != now for before, now in pairwise(others))
    assert hops > 4


def test_questions_are_answered_by_what_is_there(cluttered):
    scenes, asked = load(cluttered / "boxes.json"), 0
    for one in load(cluttered / "questions.json"):
        turns = one["conversation"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            things = scenes[one["video_uid"]][round(question["time"] * CLUTTERED.sample_fps)]
            shape = question["content"].removeprefix("What colour is the ").removesuffix("?")
            assert f"{answer['content'].removesuffix('.').lower()} {shape}" in {t["object"] for t in things}
            assert {question["content"], answer["content"]} <= set(shapes.sentences(CLUTTERED))
            asked += 1
    assert asked > 4


def test_the_ground_drifts_and_has_no_seam():
    world = replace(
        CLUTTERED, distractors=(), noise=0.0, appear=0.0, move=0.0, turn=0.0, leave=1.0, questions=0.0, hop=0
    )
    rng = np.random.default_rng(0)
    first, *_, last = shapes.render(rng, world, 8, [shapes.Event(0, "", {})])
    shift = round(world.drift * (8 * world.fps // world.sample_fps - 1) / world.fps)
    assert shift > 10
    np.testing.assert_array_equal(np.roll(first, shift, axis=1), last)
    steps = np.abs(np.diff(last.astype(int), axis=1)).max()
    assert np.abs(last[:, 0].astype(int) - last[:, -1]).max() <= steps


def test_the_plain_world_has_no_questions(folder):
    assert not (folder / "questions.json").exists()
