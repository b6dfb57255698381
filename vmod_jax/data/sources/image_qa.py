"""A small world of pictures and questions about them, written in the benchmarks' own file formats.

    images/NAME.png                          three or four things on a 3 x 3 grid, no two of them alike
    train.json                               LLaVA's instruction form: all kinds of questions about each training image
    pope/, gqa/, mme/                        questions about the test images, laid out as those benchmarks are; LLaVA's
                                             question files beside them ask without its "Answer the question using ..."

Which things are there, where, and of which colour is all drawn alike, and yes and no are equally often right for every
kind of question, so that nothing but the picture tells the answer.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vmod_jax.data import stills
from vmod_jax.data.sources.shapes import PLACES, Event, Thing, World, render
from vmod_jax.data.storage import replacing
from vmod_jax.errors import UserError

WORLD = World(side=48, fps=2, max_objects=4, shapes=("circle", "square", "triangle"), texture=3.0)
SETTINGS = ("random", "popular", "adversarial")
YES_NO = ("Yes", "No")


class Asked(NamedTuple):
    """kind: existence, position, color (MME's tasks), query or verify (GQA's types)"""

    kind: str
    question: str
    answer: str


def draw(rng: np.random.Generator, world: World = WORLD) -> tuple[list[Thing], np.ndarray]:
    """(the things in a picture, the picture u8[side, side, 3])."""
    count = int(rng.integers(3, 5))
    kinds = rng.permutation(len(world.kinds))[:count]
    places = rng.permutation(len(PLACES))[:count]
    things = []
    for kind, place in zip(kinds, places, strict=True):
        x, y = rng.uniform(-world.jitter, world.jitter, 2)
        colour, shape = world.kinds[kind]
        things.append(Thing(colour, shape, int(place), (float(x), float(y))))
    return things, next(render(rng, world, 1, [Event(0, "", dict(enumerate(things)))]))


# --- questions --------------------------------------------------------------------------------------------------------


def exists(name: str, answer: str) -> Asked:
    return Asked("existence", f"Is there a {name} in the image?", answer)


def absent(rng: np.random.Generator, things: list[Thing], setting: str, common: list[str], world: World) -> str:
    """Something that is not there: anything; of the most frequent; or of colours and shapes that are there, apart."""
    there = {thing.name for thing in things}
    free = [f"{colour} {shape}" for colour, shape in world.kinds if f"{colour} {shape}" not in there]
    if setting == "popular":
        free = [name for name in common if name in free][:3] or free
    if setting == "adversarial":
        mixed = {f"{one.colour} {other.shape}" for one in things for other in things} - there
        free = sorted(mixed) or free
    return str(rng.choice(free))


def position(rng: np.random.Generator, things: list[Thing], answer: str) -> Asked:
    thing = things[rng.integers(len(things))]
    others = [place for place in PLACES if place != PLACES[thing.place]]
    place = PLACES[thing.place] if answer == "Yes" else str(rng.choice(others))
    return Asked("position", f"Is the {thing.name} at the {place}?", answer)


def colour(rng: np.random.Generator, things: list[Thing], answer: str, world: World) -> Asked:
    thing = things[rng.integers(len(things))]
    others = [name for name, _ in world.colours if name != thing.colour]
    name = thing.colour if answer == "Yes" else str(rng.choice(others))
    return Asked("color", f"Is the thing at the {PLACES[thing.place]} {name}?", answer)


def query(rng: np.random.Generator, things: list[Thing]) -> Asked:
    thing = things[rng.integers(len(things))]
    if rng.integers(2):
        return Asked("query", f"What colour is the thing at the {PLACES[thing.place]}?", thing.colour)
    return Asked("query", f"What is the shape of the thing at the {PLACES[thing.place]}?", thing.shape)


def pair(rng: np.random.Generator, kind: str, things: list[Thing], world: World) -> list[Asked]:
    """A question of one of MME's tasks that is right, and one that is not, in either order."""
    makers: dict[str, Callable[[str], Asked]] = {
        "existence": lambda answer: exists(_named(rng, things, answer, "random", world), answer),
        "position": lambda answer: position(rng, things, answer),
        "color": lambda answer: colour(rng, things, answer, world),
    }
    return [makers[kind](answer) for answer in rng.permutation(YES_NO)]


def _named(rng: np.random.Generator, things: list[Thing], answer: str, setting: str, world: World) -> str:
    return things[rng.integers(len(things))].name if answer == "Yes" else absent(rng, things, setting, [], world)


def lesson(rng: np.random.Generator, things: list[Thing], world: World = WORLD) -> list[Asked]:
    """All kinds of questions about a training picture, one each, in random order."""
    kinds = ("existence", "position", "color")
    asked = [pair(rng, kind, things, world)[0] for kind in kinds]
    answer = str(rng.choice(YES_NO))
    asked += [query(rng, things), exists(_named(rng, things, answer, "adversarial", world), answer)]
    return [asked[i] for i in rng.permutation(len(asked))]


# --- files ------------------------------------------------------------------------------------------------------------


def generate(out: str | Path, train: int, test: int, seed: int = 0, world: World = WORLD) -> dict[str, int]:
    """Writes the folder, all of it or nothing; the same arguments give the same bytes. train, test: images.

    Returns the numbers of questions. Raises UserError for numbers that make no sense.
    """
    if min(train, test) < 1:
        raise UserError(f"{train} training and {test} test images: give at least one of each")
    with replacing(out, "train.json") as folder:
        (folder / "images").mkdir()
        records = []
        for index in range(train):
            rng = np.random.default_rng([seed, 0, index])
            things, picture = draw(rng, world)
            stills.save(folder / "images" / f"train{index:05d}.png", picture)
            records.append(_record(f"train{index:05d}", lesson(rng, things, world)))
        shown = {}
        for index in range(test):
            rng = np.random.default_rng([seed, 1, index])
            shown[f"test{index:05d}"] = (rng, *draw(rng, world))
        _json(folder / "train.json", records)
        counts = {
            "pope": _pope(folder / "pope", shown, world),
            "gqa": _gqa(folder / "gqa", shown, world),
            "mme": _mme(folder / "mme", shown, world),
        }
    return {"train": sum(len(record["conversations"]) // 2 for record in records), **counts}


def _record(name: str, asked: list[Asked]) -> dict:
    turns = []
    for i, one in enumerate(asked):
        turns.append({"from": "human", "value": ("<image>\n" if i == 0 else "") + one.question})
        turns.append({"from": "gpt", "value": one.answer})
    return {"id": name, "image": f"{name}.png", "conversations": turns}


def _pope(folder: Path, shown: dict, world: World) -> int:
    (folder / "val2014").mkdir(parents=True)
    (folder / "coco").mkdir()
    seen = Counter(thing.name for _, things, _ in shown.values() for thing in things)
    common = [name for name, _ in seen.most_common()]
    rows: dict[str, list[dict]] = {setting: [] for setting in SETTINGS}
    for name, (rng, things, picture) in shown.items():
        stills.save(folder / "val2014" / f"{name}.png", picture)
        for setting in SETTINGS:
            there = [things[i].name for i in rng.permutation(len(things))[:3]]
            for thing in there:
                other = absent(rng, things, setting, common, world)
                for one in (exists(thing, "yes"), exists(other, "no")):
                    row = {"question_id": len(rows[setting]) + 1, "image": f"{name}.png"}
                    rows[setting].append(row | {"text": one.question, "label": one.answer})
    for setting, lines in rows.items():
        _lines(folder / "coco" / f"coco_pope_{setting}.json", lines)
    asked = [line | {"category": setting} for setting, lines in rows.items() for line in lines]
    _lines(folder / "llava_pope_test.jsonl", [line | {"question_id": i} for i, line in enumerate(asked)])
    return len(asked)


def _gqa(folder: Path, shown: dict, world: World) -> int:
    (folder / "images").mkdir(parents=True)
    questions = {}
    for name, (rng, things, picture) in shown.items():
        stills.save(folder / "images" / f"{name}.jpg", picture)
        verified = [one._replace(kind="verify") for one in pair(rng, "color", things, world)]
        for one in [query(rng, things), query(rng, things), *verified]:
            group = {"query": "colour" if "colour" in one.question else "shape"}.get(one.kind)
            questions[f"{len(questions):08d}"] = {
                "question": one.question,
                "answer": one.answer.lower(),
                "fullAnswer": one.answer,
                "imageId": name,
                "isBalanced": True,
                "groups": {"global": group, "local": None},
                "types": {"structural": one.kind, "semantic": "attr", "detailed": one.kind},
                "semantic": [],
            }
    _json(folder / "testdev_balanced_questions.json", questions)
    asked = [{"question_id": key, "text": one["question"]} for key, one in questions.items()]
    _lines(folder / "llava_gqa_testdev_balanced.jsonl", asked)
    return len(questions)


def _mme(folder: Path, shown: dict, world: World) -> int:
    recorded: list[dict] = []
    for kind in ("existence", "position", "color"):
        task = folder / "MME_Benchmark_release_version" / kind
        task.mkdir(parents=True)
        for number, (rng, things, picture) in enumerate(shown.values(), 1):
            stills.save(task / f"{number:04d}.png", picture)
            asked = pair(rng, kind, things, world)
            lines = [f"{one.question} Please answer yes or no.\t{one.answer}\n" for one in asked]
            (task / f"{number:04d}.txt").write_text("".join(lines))
            name = f"{kind}/{number:04d}.png"
            recorded += [{"question_id": name, "image": name, "text": one.question} for one in asked]
    _lines(folder / "llava_mme.jsonl", recorded)
    return len(recorded)


def _lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
