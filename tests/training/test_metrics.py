"""metrics.jsonl across interruptions."""

import json

import pytest

from vmod_jax.training.metrics import MetricsLog, peak_flops, read_metrics


def test_lines_past_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, 0, 8) as log:
        for step in range(1, 7):
            log.write(step, {"loss": 1.0 / step})
            if step == 4:
                log.flush()
                assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    path.write_text(path.read_text() + '{"step": 7, "lo')  # killed while writing
    with MetricsLog(tmp_path, 4, 8) as log:
        log.write(5, {"loss": 9.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[3] == {"step": 4, "loss": 0.25}
    assert lines[4] == {"step": 5, "loss": 9.0}
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),  # v5e
        ("TPU v5", 459),  # v5p
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),  # v6e
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_what_jax_calls_a_device(kind, tera):
    assert peak_flops(kind) == (tera and tera * 1e12)


def test_lines_survive_a_kill_while_a_resumed_run_drops_some(tmp_path, monkeypatch):
    """Whatever is killed before the shortened file is in place leaves the old one."""
    with MetricsLog(tmp_path, 0, 8) as log:
        log.write(1, {"loss": 1.0})

    class KilledError(Exception):
        pass

    def killed(*_):
        raise KilledError

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KilledError):
        MetricsLog(tmp_path, 0, 8)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
