"""Real video, decoded from files, through training, evaluation and streaming (`configs/real_clips.py`)."""

import json

import pytest

from vmod_jax.commands import cli

pytestmark = pytest.mark.slow


def test_two_real_clips_are_learned_and_streamed(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VMOD_DATA", str(clips))
    work = str(tmp_path / "run")
    assert cli.main(["train", "--config", "configs/real_clips.py", "--workdir", work]) == 0
    assert cli.main(["evaluate", "--workdir", work]) == 0
    scores = json.loads((tmp_path / "run/eval/narration.json").read_text())
    assert scores["metrics"]["fluency"] >= 0.9
    files = ["streams/car-detection.mp4", "streams/bottle-detection.mp4"]
    for name in [*files, "video/flipping_a_pancake.mkv", "video/rabbit320.mp4"]:
        out = tmp_path / "said.jsonl"
        assert cli.main(["stream", str(clips / name), "--workdir", work, "--jsonl", str(out)]) == 0
        *turns, summary = map(json.loads, out.read_text().splitlines())
        times = [turn["time"] for turn in turns]
        assert times == sorted(times)
        assert sum(turn["role"] == "assistant" for turn in turns) >= 1
        assert summary["frames"] > 10
