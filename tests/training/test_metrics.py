"""metrics.jsonl across interruptions."""

import json

from vmod_jax.training.metrics import MetricsLog, read_metrics


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
