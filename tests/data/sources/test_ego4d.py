"""Ego4D narrations as streaming dialogues."""

import json

import numpy as np
import pytest

from vmod_jax.data import video
from vmod_jax.data.conversation import num_frames
from vmod_jax.data.sources.ego4d import BENCHMARKS, clean_text, narration_samples
from vmod_jax.data.sources.table import SOURCES
from vmod_jax.errors import UserError
from vmod_jax.training.config import defaults


def write(folder, videos, name="narrations.json"):
    """videos: {uid: [(time, text), ...]} -> a narrations file."""
    entries = {
        uid: {"narrations": [{"time": time, "text": text, "_annotation_uid": "a"} for time, text in narrations]}
        for uid, narrations in videos.items()
    }
    path = folder / name
    path.write_text(json.dumps({"videos": entries}))
    return path


def said(sample):
    """[(frame, text)] of a sample's replies."""
    frame, replies = sample.start - 1, []
    for message in sample.conversation:
        if message["role"] == "stream":
            frame += message["num_frames"]
        elif message["role"] == "assistant":
            replies.append((frame, message["content"]))
    assert frame == sample.stop - 1
    return replies


@pytest.mark.goldens
@pytest.mark.parametrize("split", ["train", "val"])
def test_narrations_are_the_references(goldens, split):
    folder = goldens / "sources"
    expected = json.loads((folder / "expected.json").read_text())
    file = folder / "ego4d" / "v2" / "annotations" / "all_narrations_redacted.json"
    got = narration_samples(file, expected["durations"], fps=2, split=split)
    samples = [{"conversation": s.conversation, "frames": {s.video: [s.start, s.stop]}} for s in got]
    assert sorted(map(json.dumps, samples)) == [
        json.dumps({"conversation": sorted_keys(c["conversation"]), "frames": c["frames"]})
        for c in sorted(expected[f"narration_{split}"], key=order)
    ]


def sorted_keys(conversation):
    """The messages with their keys in the order that ours have."""
    order = ("role", "num_frames", "content", "learn")
    return [{key: message[key] for key in order if key in message} for message in conversation]


def order(case):
    return json.dumps({"conversation": sorted_keys(case["conversation"]), "frames": case["frames"]})


@pytest.mark.goldens
def test_splits_share_no_video(goldens):
    folder = goldens / "sources"
    durations = json.loads((folder / "expected.json").read_text())["durations"]
    file = folder / "ego4d" / "v2" / "annotations" / "all_narrations_redacted.json"
    videos = [{s.video for s in narration_samples(file, durations, 2, split)} for split in ("train", "val", "test")]
    assert all(videos)
    assert len(set.union(*videos)) == sum(map(len, videos))


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("#C C picks up a knife", "C picks up a knife."),
        ("#Unsure C washes hands\n", "C washes hands."),
        ("#C C looks around #unsure", "C looks around."),
        ("#C C  stirs , the   soup,", "C stirs , the soup."),
        ("#c c walks", "C walks."),
        ("#O a man X talks.", "A man X talks."),
        ("@c c sits", "C sits."),
        ("#unsure", "."),
        ("", "."),
    ],
)
def test_clean_text(text, clean):
    assert clean_text(text) == clean


def test_times(tmp_path):
    file = write(
        tmp_path,
        {
            "v": [
                (5.9, "c ends here"),  # past the video's end: moved to it
                (6.5, "c is never seen"),  # the sample has ended
                (1.0, "c starts now"),
                (1.2, "c waits first"),  # waits for the same frame as the next one
                (1.4, "c goes on"),
                (3.0, "c goes on"),  # said before
                (3.1, "#unsure"),  # no word
                (3.2, "c goes home"),
            ]
        },
    )
    (sample,) = narration_samples(file, {"v": 5.0}, fps=2)
    assert (sample.video, sample.start, sample.stop) == ("v", 2, 11)
    assert said(sample) == [(2, "C starts now."), (3, "C goes on."), (7, "C goes home."), (10, "C ends here.")]
    assert [m.get("learn") for m in sample.conversation[:4]] == [False, None, True, True]
    assert num_frames(sample.conversation) == sample.stop - sample.start


@pytest.mark.parametrize("fps", [2, 3, 10, 29.97])
def test_frames_are_not_lost_to_rounding(tmp_path, fps):
    """A narration exactly at frame k waits for frame k."""
    file = write(tmp_path, {"v": [(k / fps, f"event {k}") for k in range(300)]})
    (sample,) = narration_samples(file, {"v": 299 / fps}, fps)
    assert said(sample) == [(k, f"Event {k}.") for k in range(300)]


def test_videos_without_duration_are_left_out(tmp_path):
    file = write(tmp_path, {"v": [(1, "c walks")], "w": [(1, "c walks")], "empty": []})
    assert [s.video for s in narration_samples(file, {"w": 9.0, "empty": 9.0}, 2)] == ["w"]


def test_without_split_files_everything_is_train(tmp_path):
    file = write(tmp_path, {"v": [(1, "c walks")]})
    assert len(narration_samples(file, {"v": 9.0}, 2, "train")) == 1
    assert narration_samples(file, {"v": 9.0}, 2, "val") == []
    with pytest.raises(UserError, match="train, val, test"):
        narration_samples(file, {"v": 9.0}, 2, "validation")


def test_splits_json(tmp_path):
    file = write(tmp_path, {uid: [(1, "c walks")] for uid in "abcd"})
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a"], "val": ["b"], "test": ["c", "absent"]}))
    durations = dict.fromkeys("abcd", 9.0)
    got = {split: [s.video for s in narration_samples(file, durations, 2, split)] for split in ("train", "val", "test")}
    assert got == {"train": ["a"], "val": ["b"], "test": ["c"]}
    (tmp_path / "splits.json").write_text(json.dumps({"valid": ["a"]}))
    with pytest.raises(UserError, match="'valid'"):
        narration_samples(file, durations, 2)


def test_test_videos_are_those_that_are_not_val(tmp_path, caplog):
    file = write(tmp_path, {uid: [(1, "c walks")] for uid in "abc"})
    for benchmark in BENCHMARKS:
        (tmp_path / f"{benchmark}_val.json").write_text(json.dumps({"videos": [{"video_uid": "a"}]}))
        (tmp_path / f"{benchmark}_test_unannotated.json").write_text(
            json.dumps({"clips": [{"video_uid": "a"}, {"video_uid": "b"}]})
        )
    durations = dict.fromkeys("abc", 9.0)
    got = [[s.video for s in narration_samples(file, durations, 2, split)] for split in ("train", "val", "test")]
    assert got == [["c"], ["a"], ["b"]]
    assert "1 videos are in split files of val and in some of test: taken for val" in caplog.text
    (tmp_path / "nlq_val.json").unlink()
    with pytest.raises(UserError, match=r"missing: nlq_val\.json"):
        narration_samples(file, durations, 2)


@pytest.mark.parametrize("key", ["time", "text", "_annotation_uid"])
def test_missing_keys_are_named(tmp_path, key):
    file = write(tmp_path, {"fine": [(1, "c walks")], "broken": [(1, "c walks"), (2, "c sits")]})
    data = json.loads(file.read_text())
    del data["videos"]["broken"]["narrations"][1][key]
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"video broken: narration 1 has no '{key}'"):
        narration_samples(file, {"fine": 9.0, "broken": 9.0}, 2)
    data["videos"]["broken"]["narrations"][1][key] = None
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"video broken: narration 1 has None as its '{key}'"):
        narration_samples(file, {"broken": 9.0}, 2)


def test_unusable_files_are_named(tmp_path):
    file = tmp_path / "narrations.json"
    with pytest.raises(UserError, match=r"narrations\.json cannot be read"):
        narration_samples(file, {}, 2)
    file.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        narration_samples(file, {}, 2)
    file.write_text("{}")
    with pytest.raises(UserError, match="'videos'"):
        narration_samples(file, {}, 2)
    file.write_text('{"videos": {"v": {"status": "complete"}}}')
    with pytest.raises(UserError, match="video v has no list 'narrations'"):
        narration_samples(file, {"v": 9.0}, 2)


def test_our_own_clips(clips):
    file = clips / "streams" / "narrations.json"
    durations = dict.fromkeys(json.loads(file.read_text())["videos"], 1e4)
    samples = narration_samples(file, durations, fps=2)
    assert {s.video for s in samples} == set(durations)
    assert dict(said(next(s for s in samples if s.video == "car-detection")))[10] == (
        "A white car enters from the bottom."
    )


def chat(video, *turns):
    """A video's questions (seconds, question, answer) in the schema of live chats."""
    return {
        "video_uid": video,
        "duration": 9.0,
        "conversation": [
            {"role": role, "content": content, "time": time}
            for time, question, answer in turns
            for role, content in (("user", question), ("assistant", answer))
        ],
    }


def test_questions_stand_where_they_are_asked(tmp_path):
    """After the last frame that was seen; the frames up to there are not learned, those after it are."""
    file = write(tmp_path, {"v": [(1.0, "c starts now"), (5.0, "c goes home")], "w": [(1.0, "c walks on")]})
    asked = [(4.9, "Who?", "C."), (0.2, "Too early?", "Yes."), (1.0, "When?", "Now."), (5.0, "Too late?", "Yes.")]
    questions = [chat("v", *asked), chat("unknown", (1.0, "A?", "B."))]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    sample, other = narration_samples(file, {"v": 9.0, "w": 9.0}, fps=2)
    messages = [(m["role"], m.get("content", m.get("num_frames")), m.get("learn")) for m in sample.conversation[2:]]
    assert messages == [
        ("assistant", "C starts now.", True),
        ("stream", 0, False),
        ("user", "When?", None),
        ("assistant", "Now.", True),
        ("stream", 7, False),
        ("user", "Who?", None),
        ("assistant", "C.", True),
        ("stream", 1, True),
        ("assistant", "C goes home.", True),
    ]
    assert num_frames(sample.conversation) == sample.stop - sample.start
    assert [m["role"] for m in other.conversation] == ["stream", "user", "assistant"]


def test_questions_outside_the_narrated_span_are_counted(tmp_path, caplog):
    spans = [(1.0, "c starts now"), (5.0, "c goes home")]
    file = write(tmp_path, {"v": spans, "w": [(1.0, "c walks on")]})
    asked = [(4.9, "Who?", "C."), (-3.0, "Before?", "Yes."), (0.9, "Too early?", "Yes."), (5.0, "Too late?", "Yes.")]
    questions = [chat("v", *asked), chat("w", (1.0, "Alone?", "Yes.")), chat("unknown", (1.0, "A?", "B."))]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    narration_samples(file, {"v": 9.0, "w": 9.0}, fps=2)
    assert [record.message for record in caplog.records] == [
        "questions.json: 4 of the 5 questions about videos of the split train are left out: they are asked before the "
        "first narration or after the last"
    ]
    caplog.clear()
    (tmp_path / "questions.json").write_text(json.dumps([chat("v", (-1e308, "Who?", "C."))]))
    narration_samples(file, {"v": 9.0, "w": 9.0}, fps=2)
    assert "1 of the 1 questions" in caplog.text
    caplog.clear()
    (tmp_path / "questions.json").write_text(json.dumps([chat("v", *asked[:1])]))
    narration_samples(file, {"v": 9.0, "w": 9.0}, fps=2)
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read"),
        ('{"v": 1}', "not a list of conversations"),
        ('[{"video_uid": "v"}]', "not a list of conversations"),
        (json.dumps([chat("v", (1.0, "A?", "B."), (2.0, "C?", "D."))]).replace("user", "assistant"), "a question, its"),
    ],
)
def test_questions_that_cannot_be_read(tmp_path, content, message):
    file = write(tmp_path, {"v": [(1.0, "c starts now")]})
    (tmp_path / "questions.json").write_text(content)
    with pytest.raises(UserError, match=message):
        narration_samples(file, {"v": 9.0}, fps=2)


@pytest.mark.parametrize("time", [True, float("nan"), float("inf"), 10**400, "1", None])
def test_times_that_are_no_times(tmp_path, time):
    with pytest.raises(UserError, match="as its 'time'") as error:
        narration_samples(write(tmp_path, {"v": [(time, "c starts now")]}), {"v": 10.0}, 2.0)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("factor", [1000, -1])
def test_narrations_that_cannot_be_those_of_the_video(tmp_path, factor):
    times = [(factor * float(i), f"c takes {i}") for i in range(1, 9)]
    file = write(tmp_path, {"v": times})
    with pytest.raises(UserError, match=r"8 of the 8 narrations of video v lie outside its 10\.0 s"):
        narration_samples(file, {"v": 10.0}, 2.0, allow_outside=False)
    assert len(narration_samples(file, {"v": 10.0}, 2.0, allow_outside=True)) == 1


@pytest.mark.parametrize("source", ["narration", "ego4d_narration", "ego4d_refined"])
def test_a_source_refuses_them_until_told_otherwise(tmp_path, source):
    told = [{"time": 1000.0 * i, "text": f"c takes {i}", "_annotation_uid": "a"} for i in range(1, 9)]
    of_all = {"videos": {"v": {"narrations": told}}}
    for name, content in (
        ("narrations.json", of_all),
        ("all_narrations_redacted.json", of_all),
        ("refined_narration_stream_train.json", {"v": {"a": told}}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    video.write(tmp_path / "v.mp4", np.zeros((20, 16, 16, 3), np.uint8), 2.0)
    config = defaults()
    config.data.root = str(tmp_path)
    with pytest.raises(UserError, match=r"8 of the 8 narrations of video v lie outside .*data\.allow_outside"):
        SOURCES[source](config.data, "train", 16)
    config.data.allow_outside = True
    assert len(SOURCES[source](config.data, "train", 16).samples) == 1


def test_one_narration_of_many_may_lie_outside(tmp_path):
    times = [(i / 20, f"c takes {i}") for i in range(199)] + [(1e308, "c leaves them")]
    assert narration_samples(write(tmp_path, {"v": times}), {"v": 10.0}, 2.0, allow_outside=False)


def test_a_mark_in_front_halves_of_characters_and_depth(tmp_path):
    file = write(tmp_path, {"v": [(1.0, "c starts now")]})
    whole = narration_samples(file, {"v": 10.0}, 2.0)
    text = file.read_text()
    file.write_text(text, encoding="utf-8-sig")
    assert narration_samples(file, {"v": 10.0}, 2.0) == whole
    for broken, message in ((text.replace("now", "\\ud800"), "as its 'text'"), ("[" * 200_000, "nested too deeply")):
        file.write_text(broken)
        with pytest.raises(UserError, match=message):
            narration_samples(file, {"v": 10.0}, 2.0)


def test_a_video_in_two_splits(tmp_path):
    file = write(tmp_path, {"v": [(1.0, "c starts now")]})
    (tmp_path / "splits.json").write_text('{"train": ["v", "w"], "val": ["v"]}')
    with pytest.raises(UserError, match="v in more than one split"):
        narration_samples(file, {"v": 10.0}, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content": None}, "'content'"),
        ({"time": None}, "'time'"),
        ({"time": 1e999}, "'time'"),
        ({"time": True}, "'time'"),
    ],
)
def test_questions_of_nulls(tmp_path, change, message):
    file = write(tmp_path, {"v": [(1.0, "c starts now")]})
    asked = {"role": "user", "content": "what?", "time": 1.0} | change
    turns = [asked, {"role": "assistant", "content": "that", "time": 1.0}]
    (tmp_path / "questions.json").write_text(json.dumps([{"video_uid": "v", "conversation": turns}]))
    with pytest.raises(UserError, match=message):
        narration_samples(file, {"v": 10.0}, 2.0)
