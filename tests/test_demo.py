"""The main job from end to end, with a few steps: what it writes and under which names."""

import json

import pytest

from vmod_jax.demo import METRICS, POLICIES, demo, demo_config

pytestmark = pytest.mark.slow


def test_the_main_job_writes_its_report(tmp_path, capsys):
    config = demo_config()
    config.steps, config.checkpoint_every = 4, 4
    config.data.train_videos, config.data.val_videos, config.data.test_videos = 8, 1, 2
    demo(tmp_path, config, base_steps=4)
    report = json.loads((tmp_path / "report.json").read_text())
    for policy in POLICIES:
        assert {*METRICS, "train_seconds", "step_seconds", "flops"} <= report["policies"][policy].keys()
        assert (tmp_path / policy / "model.json").exists()
    assert report["policies"]["interleaved"]["flops"] < report["policies"]["full"]["flops"]
    assert {"always_silent", "always_speak"} == report["baselines"].keys()
    assert report["stream"]["frames"] > 10
    assert report["stream"]["replies"][0]["role"] == "user"
    times = [reply["time"] for reply in report["stream"]["replies"]]
    assert times == sorted(times)
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert "report.html" in capsys.readouterr().out
