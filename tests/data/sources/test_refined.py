"""Refined narrations: streams as of any narrations, an instruction drawn from ten, failures left out."""

import json

import pytest

from vmod_jax.data.sources.ego4d import FAILED, REFINED_INSTRUCTIONS, refined_samples
from vmod_jax.errors import UserError


def samples(tmp_path, value, seed=0):
    file = tmp_path / "refined_narration_stream_train.json"
    file.write_text(json.dumps(value))
    return list(refined_samples(file, {"v": 10.0, "w": 10.0}, 2, seed))


def test_a_refined_narration_by_hand(tmp_path):
    said = [{"time": 1.2, "text": "You cut."}, {"time": 2.0, "text": FAILED}, {"time": 4.0, "text": "You wash up."}]
    (sample,) = samples(tmp_path, {"v": {"pass1": said}, "unknown": {"pass1": said}})
    instruction = sample.conversation[1].pop("content")
    assert instruction in REFINED_INSTRUCTIONS
    assert sample.conversation == [
        {"role": "stream", "num_frames": 1, "learn": False},
        {"role": "user"},
        {"role": "assistant", "content": "You cut.", "learn": True},
        {"role": "stream", "num_frames": 5, "learn": True},
        {"role": "assistant", "content": "You wash up.", "learn": True},
    ]
    assert (sample.video, sample.start, sample.stop) == ("v", 3, 9)


def test_instructions_are_drawn_by_seed_video_and_annotator(tmp_path):
    value = {v: {f"pass{i}": [{"time": 1.0, "text": "You cut."}] for i in range(20)} for v in "vw"}
    asked = lambda seed: [s.conversation[1]["content"] for s in samples(tmp_path, value, seed)]  # noqa: E731
    assert asked(0) == asked(0) != asked(1)
    assert len(set(asked(0))) > 5


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="video v: narration 0 has no 'time'"):
        samples(tmp_path, {"v": {"pass1": [{"text": "You cut."}]}})
