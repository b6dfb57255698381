"""The main job from end to end, with a few steps: what it writes and under which names."""

import json

import pytest

from vmod_jax.commands.demo import METRICS, POLICIES, demo
from vmod_jax.study.worlds import demo_config
from vmod_jax.training.loop import Summary


def test_a_signal_stops_the_whole_job(tmp_path, monkeypatch):
    trained = []

    def stopped(config, workdir):
        trained.append(workdir.name)
        return Summary(1, None, 0.0, None, 0.0, 0, 0, exit_code=75)

    monkeypatch.setattr("vmod_jax.training.loop.train", stopped)
    config = demo_config()
    config.data.train_videos, config.data.val_videos, config.data.test_videos = 1, 0, 1
    with pytest.raises(SystemExit) as ended:
        demo(tmp_path, config)
    assert ended.value.code == 75
    assert trained == ["base"]


@pytest.mark.slow
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
    assert {"always_silent", "always_speak", "copy_last"} == report["baselines"].keys()
    assert report["stream"]["frames"] > 10
    assert report["stream"]["replies"][0]["role"] == "user"
    times = [reply["time"] for reply in report["stream"]["replies"]]
    assert times == sorted(times)
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert "report.html" in capsys.readouterr().out
