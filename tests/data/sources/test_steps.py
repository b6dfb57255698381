"""COIN, Ego-Exo4D and anticipation: the reference's conversations, and what is said about broken files."""

import json

import pytest

from vmod_jax.data.sources import coin, egoexo4d, lta
from vmod_jax.errors import UserError


@pytest.fixture(scope="module")
def expected(goldens):
    return json.loads((goldens / "sources" / "expected.json").read_text())


def same(samples, wanted):
    """Whether they are the same ones, in any order."""
    key = lambda *parts: json.dumps(parts, sort_keys=True)  # noqa: E731
    frames = [next(iter(one["frames"].items())) for one in wanted]
    want = [key(one["conversation"], video, *span) for one, (video, span) in zip(wanted, frames, strict=True)]
    return sorted(want) == sorted(key(*sample) for sample in samples)


@pytest.mark.goldens
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", coin.TASKS)
def test_coin_is_the_references(goldens, expected, task, split):
    file = goldens / "sources" / "coin" / "coin.json"
    got = coin.samples(file, expected["coin_durations"], 2, split, task)
    assert got
    assert same(got, expected[f"coin_{task}_{split}"])


@pytest.mark.goldens
@pytest.mark.parametrize("task", coin.TASKS)
def test_coins_categories_are_the_references(goldens, expected, task):
    file = goldens / "sources" / "coin" / "coin.json"
    got = coin.categories(file, expected["coin_durations"], 2, "test", task)
    assert got == expected[f"coin_{task}_score"]["categories"]


@pytest.mark.goldens
def test_anticipation_is_the_references(goldens, expected):
    folder = goldens / "sources" / "ego4d" / "v2" / "annotations"
    names = lta.taxonomy(folder / "fho_lta_taxonomy.json")
    windows = list(lta.windows(folder / "fho_lta_val.json", names, expected["durations"], 2))
    assert same([window.sample for window in windows], expected["lta_val"])
    labels = sorted((window.verbs, window.nouns) for window in windows)
    assert labels == sorted((one["verbs"], one["nouns"]) for one in expected["lta_val"])
    assert len({window.key for window in windows}) == len(windows)


@pytest.mark.goldens
@pytest.mark.parametrize("split", egoexo4d.SPLITS)
def test_keysteps_are_the_expected_ones(goldens, split):
    expected = json.loads((goldens / "benchmarks" / "expected.json").read_text())["egoexo4d"]
    got = [
        {"take_uid": s.take, "video": s.video, "frames": [*s.frames], "step_unique_id": s.step, "label": s.label}
        for s in egoexo4d.segments(goldens / "benchmarks" / "egoexo4d", split, expected["fps"])
    ]
    assert got == expected[split]


def test_names_as_they_are_said():
    assert [
        coin.task_words(name) for name in ("WashTV", "MakePaperWindMill", "ReplaceCDDriveWithSSD", "MakeRJ45Cable")
    ] == ["wash TV", "make paper wind mill", "replace CD drive with SSD", "make RJ45 cable"]
    names = ("pot_(planter)", "turn_on", "cut_(trim,_slice)", "chip_(wood,_metal)", "nut_")
    assert [lta.spoken(name) for name in names] == ["flowerpot", "turn on", "cut", "chip", "nut"]


def test_frames_of_a_span():
    assert coin.frames(2.02, 5.84, 2, 70) == (5, 13)
    assert coin.frames(30.0, 99.0, 2, 70) == (60, 71)
    assert coin.frames(99.0, 99.5, 2, 70) == (70, 71)


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def entry(**changes):
    video = {
        "class": "WashTV",
        "start": 0,
        "end": 5,
        "subset": "training",
        "annotation": [{"segment": [0, 1], "label": "wash"}],
    }
    return {"database": {"v1": {**video, **changes}}}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{", "not a JSON file"),
        ([], "no 'database'"),
        (entry(subset=3), "coin.json: video v1: 'subset' is 3, not text"),
        (entry(annotation=[{"label": "wash"}]), "video v1: step 0: no 'segment'"),
        (entry(annotation=[{"label": "wash", "segment": [1]}]), "step 0: 'segment' is [1], not [start, end]"),
        (entry(start="0"), "video v1: 'start' is '0', not a number"),
        (entry(end=float("nan")), "video v1: 'end' is nan"),
        (entry(end=1e308), "video v1: 'end' is 1e+308, which is no time of a video"),
        (entry(end=10**400), "which is no time of a video"),
        (entry(annotation=[{"label": "wash", "segment": [0, 10**400]}]), "step 0: 'segment' is"),
        (entry(annotation=[{"label": "wash", "segment": [0, True]}]), "step 0: 'segment' is"),
        (entry(annotation=[{"label": "wa\ud800sh", "segment": [0, 1]}]), "step 0: 'label' is"),
        (entry(annotation=[{"label": ["x"] * 9999, "segment": [0, 1]}]), "step 0: 'label' is"),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_a_bad_coin_file_is_named_in_one_line(tmp_path, value, words):
    with pytest.raises(UserError) as error:
        coin.samples(write(tmp_path / "coin.json", value), {"v1": 9.0}, 2, "train", "step")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_mark_in_front_of_a_file(tmp_path):
    plain, marked = write(tmp_path / "coin.json", entry()), tmp_path / "marked.json"
    marked.write_text(plain.read_text(), encoding="utf-8-sig")
    assert coin.samples(marked, {"v1": 9.0}, 2, "train", "step") == coin.samples(plain, {"v1": 9.0}, 2, "train", "step")


TAKE = {
    "take_uid": "t",
    "root_dir": "takes/t",
    "duration_sec": 9.0,
    "frame_aligned_videos": {"aria01": {"rgb": {"relative_path": "a.mp4"}}},
}


@pytest.mark.parametrize(
    ("cameras", "words"),
    [
        ({"aria01": None}, "'aria01' is None, not an object"),
        ({"aria01": {"rgb": "a.mp4"}}, "'rgb' is 'a.mp4', not an object"),
        ({"aria01": {"rgb": {"relative_path": ["a.mp4"]}}}, "'relative_path' is ['a.mp4'], not text"),
    ],
)
def test_a_bad_take_is_named_in_one_line(tmp_path, cameras, words):
    write(tmp_path / "takes.json", [{**TAKE, "frame_aligned_videos": cameras}])
    with pytest.raises(UserError, match=r"takes\.json: take 0") as error:
        list(egoexo4d.segments(tmp_path, "train", 2))
    assert words in str(error.value)


@pytest.mark.parametrize("names", [[1], [None], [["cut"]], {"0": "cut"}])
def test_names_that_are_no_text(tmp_path, names):
    file = write(tmp_path / "taxonomy.json", {"verbs": names, "nouns": ["bread"]})
    with pytest.raises(UserError, match=r"taxonomy\.json: "):
        lta.taxonomy(file)
    (tmp_path / "annotations").mkdir()
    write(tmp_path / "annotations" / "keystep_train.json", {"vocabulary": {"1": names}})
    with pytest.raises(UserError, match="'vocabulary': '1' is"):
        egoexo4d.vocabulary(tmp_path, "train")


def test_a_label_that_the_taxonomy_lacks_is_named(tmp_path):
    names = lta.Taxonomy(["take"], ["cup"])
    clip = {"clip_uid": "c", "video_uid": "v", "clip_parent_start_sec": 0, "action_clip_start_sec": 0,
            "action_clip_end_sec": 1, "action_idx": 0, "verb_label": 7, "noun_label": 0}  # fmt: skip
    file = write(tmp_path / "fho_lta_val.json", {"clips": [clip]})
    with pytest.raises(UserError, match=r"fho_lta_val.json: action 0: 'verb_label' is 7, the taxonomy has 1"):
        list(lta.windows(file, names, {"v": 9.0}, 2))
