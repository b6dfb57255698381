"""Dialogues with times: conversations worked out by hand, ties, and broken records in one line."""

import json

import pytest

from vmod_jax.data.sources.dialogue import dialogue_samples, live_chat_samples
from vmod_jax.errors import UserError

STREAM = lambda frames, learn: {"role": "stream", "num_frames": frames, "learn": learn}  # noqa: E731
USER = lambda text: {"role": "user", "content": text}  # noqa: E731
REPLY = lambda text, learn=True: {"role": "assistant", "content": text, "learn": learn}  # noqa: E731


def turns(*said):
    return [{"role": role, "content": content, "time": time} for role, content, time in said]


def samples(tmp_path, *records, **options):
    file = tmp_path / "dialogues.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records))
    return list(dialogue_samples(file, {"v": 10.0}, 2, **options))


def test_a_dialogue_by_hand(tmp_path):
    said = turns(("user", "Where  is\nit?", 2.3), ("assistant", "Here.", 2.3), ("assistant", "Gone.", 5.1))
    (sample,) = samples(tmp_path, {"video": "v", "start": 1, "conversation": said})
    # Frame 2 is at `start`; the question is heard at frame 4 (2.0 s), so is its answer; the next is due at frame 11.
    assert sample.conversation == [
        STREAM(3, 2), USER("Where is it?"), STREAM(1, True), REPLY("Here."), STREAM(6, True), REPLY("Gone."),
    ]  # fmt: skip
    assert (sample.video, sample.start, sample.stop) == ("v", 2, 12)


def test_a_reply_at_the_questions_frame_comes_at_once(tmp_path):
    said = turns(("user", "Now?", 2.0), ("assistant", "Yes.", 2.0))
    (sample,) = samples(tmp_path, {"video": "v", "conversation": said})
    assert sample.conversation == [STREAM(5, 4), USER("Now?"), REPLY("Yes.")]


def test_a_reply_to_the_same_frame_replaces_the_one_before(tmp_path):
    said = turns(("assistant", "One.", 2.1), ("assistant", "Two.", 2.4), ("assistant", "Three.", 3.0))
    (sample,) = samples(tmp_path, {"video_uid": "v", "conversation": said})
    assert sample.conversation == [STREAM(6, True), REPLY("Two."), STREAM(1, True), REPLY("Three.")]


@pytest.mark.parametrize("late", [("user", "Again?", 2.0), ("assistant", "Back.", 1.0), ("assistant", "Late.", 10.5)])
def test_what_ends_a_conversation(tmp_path, late):
    said = turns(("assistant", "One.", 2.0), late, ("assistant", "Never.", 9.0))
    (sample,) = samples(tmp_path, {"video": "v", "conversation": said})
    assert sample.conversation == [STREAM(5, True), REPLY("One.")]


def test_system_learn_end_and_split(tmp_path):
    said = [{"role": "system", "content": "Be short."}, {**turns(("assistant", "One.", 1.0))[0], "learn": False}]
    record = {"video": "v", "end": 4, "conversation": said + turns(("assistant", "Two.", 5.0)), "split": "val"}
    (sample,) = samples(tmp_path, record, {"video": "other", "conversation": []}, split="val")
    assert sample.conversation == [
        {"role": "system", "content": "Be short."}, STREAM(3, 2), REPLY("One.", False),
    ]  # fmt: skip
    assert samples(tmp_path, record) == []


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"conversation": []}, "line 1: no 'video_uid'"),
        ({"video": "v"}, "line 1, video v: no 'conversation'"),
        ({"video": "v", "conversation": turns(("robot", "x", 1))}, "turn 0: 'role' is 'robot'"),
        ({"video": "v", "conversation": turns(("user", "x", "1"))}, "video v: turn 0: 'time' is '1', not a number"),
        ({"video": "v", "conversation": turns(("user", "x", 1e308))}, "'time' is 1e+308, which is no time of a video"),
        ({"video": "v", "conversation": turns(("user", "x", 10**400))}, "which is no time of a video"),
        ({"video": "v", "conversation": turns(("user", "\ud800", 1))}, "which holds half a character"),
        ({"video": "v", "start": 3, "conversation": turns(("user", "x", 1))}, "before its 'start' at 3"),
    ],
)
def test_a_bad_record_is_named_in_one_line(tmp_path, record, words):
    with pytest.raises(UserError) as error:
        samples(tmp_path, record)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_line_that_is_no_json_is_named(tmp_path):
    file = tmp_path / "dialogues.jsonl"
    file.write_text('{"video": "w", "conversation": []}\n{')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        list(dialogue_samples(file, {"v": 10.0}, 2))
    file.write_text("[" * 200_000)
    with pytest.raises(UserError, match="line 1 is nested too deeply"):
        list(dialogue_samples(file, {"v": 10.0}, 2))


def test_a_mark_in_front_of_the_lines(tmp_path):
    file = tmp_path / "dialogues.jsonl"
    file.write_text('{"video": "w", "conversation": []}\n', encoding="utf-8-sig")
    assert list(dialogue_samples(file, {"v": 10.0}, 2)) == []


# --- live chats -------------------------------------------------------------------------------------------------------


def chats(tmp_path, *conversations, seed=0):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps([{"video_uid": "v", "duration": 30.0, "conversation": said} for said in conversations]))
    return list(live_chat_samples(file, {"v": 40.0}, 2, seed=seed))


def test_a_live_chat_waits_before_its_question(tmp_path):
    said = turns(("user", "How?", 10.0), ("assistant", "So.", 10.4), ("assistant", "Well.", 12.0))
    found = [chats(tmp_path, said, seed=seed)[0] for seed in range(30)]
    for sample in found:
        waiting, rest = sample.conversation[:-5], sample.conversation[-5:]
        assert rest == [USER("How?"), STREAM(1, True), REPLY("So."), STREAM(3, True), REPLY("Well.")]
        assert (sample.start, sample.stop) == (21 - sum(m["num_frames"] for m in waiting), 25)
        assert all(m["learn"] == m["num_frames"] - 1 for m in waiting)
    assert len({sample.start for sample in found}) > 5
    assert min(sample.start for sample in found) >= 1
    assert chats(tmp_path, said, seed=3) == [found[3]]


def test_chats_that_do_not_begin_with_a_question_are_left_out(tmp_path):
    good = turns(("user", "How?", 1.0), ("assistant", "So.", 2.0))
    bad = [
        turns(("assistant", "So.", 1.0)), turns(("user", "", 1.0)), turns(("user", "How?", 0.0)),
        turns(("user", "How?", 30.5)), [],
    ]  # fmt: skip
    assert len(chats(tmp_path, good, *bad)) == 1
    assert list(live_chat_samples(tmp_path / "chat.json", {"v": 40.0}, 2, "val")) == []
