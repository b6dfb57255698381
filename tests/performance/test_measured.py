"""The measuring benchmarks on tiny shapes: what their rows say, and that contenders compute the same thing."""

import json

import numpy as np
import pytest

from vmod_jax.commands import bench as command
from vmod_jax.data.conversation import IGNORE
from vmod_jax.errors import UserError
from vmod_jax.performance import harness as bench
from vmod_jax.performance import setup, summary, train_step

SIZES = {"hidden": 32, "intermediate": 48, "layers": 2, "heads": 4, "vocab": 64, "features": 12, "lora": 4}
TINY = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
KEYS = {
    "name", "kind", "candidate", "baseline", "ratio", "formula_ratio", "spread", "dtype", "remat", "tokens_per_frame",
    "frames", "text_tokens",
}  # fmt: skip


def run(tmp_path, name, *options):
    path = tmp_path / f"{name}.json"
    command.main([name, "--json", str(path), *options])
    results = json.loads(path.read_text())
    assert {"machine", "versions", "rows"} <= results.keys()
    for entry in results["rows"]:
        assert entry.keys() >= KEYS
        assert entry["ratio"] == entry["candidate"] / entry["baseline"] > 0
    return results


def test_train_step(tmp_path, capsys):
    pytest.importorskip("peft")
    results = run(tmp_path, "train-step", *TINY, "--streams", "5x6+20", "--rounds", "1")
    rows = {entry["kind"]: entry for entry in results["rows"]}
    assert [entry["kind"] for entry in results["rows"]] == [
        "forward",
        "train_step",
        "limit",
        "limit",
        "carried",
        "memory",
        "memory_same_units",
        "peer",
        "peer",
    ]
    assert (rows["train_step"]["remat"], rows["train_step"]["dtype"]) == ("attention", "float32")
    # L = 2 T 32 (32 + 2 16 + 32 + 3 48) and so on, by hand: keep 0.2 of 5 leaves 1 token a frame.
    work = []
    for tokens in (50, 26):
        weights = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48
        adapters = 4 * (2 * 64 + 2 * 48 + 3 * 80)
        work.append(2 * tokens * (3 * weights + 4 * adapters) + 3.5 * 2 * tokens**2 * 32)
    assert rows["train_step"]["formula_ratio"] == pytest.approx((work[0] + work[1]) / (2 * work[0]))
    assert rows["memory"]["formula_ratio"] == rows["carried"]["formula_ratio"] == pytest.approx((50 + 26) / 100)
    # The machine's time for as many FLOPs, those of the head at the labels among them: 6 frames' ends and 10 words.
    limits = [entry for entry in results["rows"] if entry["kind"] == "limit"]
    seconds = [entry["baseline"] * entry["matmul_tflops"] * 1e12 for entry in limits]
    head = 2 * 16 * (2 * 32 * 64 + 3 * 4 * (32 + 64))
    assert seconds == pytest.approx([2 * work[0] + head, work[0] + work[1] + head])
    # Carried: the input and the attention's output [T, d] and its log-sum-exp [T, H], tiles of 8 tokens.
    assert rows["carried"]["baseline"] * 2**20 == 2 * 4 * (50 * 32 + 56 * (32 + 4))
    (check,) = results["checks"]
    assert check["bit_equal"] == {"mod": True, "full": True}
    assert check["losses"]["peer"] == pytest.approx(check["losses"]["full"], rel=1e-5)
    assert abs(check["losses"]["mod"] - check["losses"]["full"]) > 1e-4
    assert "train step MoD/full" in capsys.readouterr().out


@pytest.mark.slow
def test_stream(tmp_path):
    pytest.importorskip("peft")
    results = run(tmp_path, "stream", *TINY, "--tokens", "5", "--context", "6", "--at-once", "3", "--rounds", "1")
    assert results["dense_logits_apart"] < 1e-5
    rows = {entry["name"]: entry for entry in results["rows"]}
    assert rows["cache (MiB) MoD/full"]["ratio"] == pytest.approx(rows["cache (MiB) MoD/full"]["formula_ratio"])
    assert [entry["kind"] for entry in results["rows"]].count("peer") == 2


def test_a_part_that_fails_loses_nothing_else(tmp_path, monkeypatch):
    def fails(*_):
        raise KeyError("num_carry")

    monkeypatch.setattr(train_step.Step, "carried_bytes", property(fails))
    path = tmp_path / "rows.json"
    command.main(["train-step", "--json", str(path), *TINY, "--streams", "5x6+20", "--rounds", "1", "--no-peer"])
    rows = json.loads(path.read_text())["rows"]
    assert [entry["kind"] for entry in rows] == [
        "forward", "train_step", "limit", "limit", "carried", "memory", "memory_same_units",
    ]  # fmt: skip
    assert {entry["kind"]: entry["error"] for entry in rows if "error" in entry} == {"carried": "KeyError: 'num_carry'"}


def test_a_gpu_without_room_for_pytorch_loses_nothing_else(tmp_path, monkeypatch, caplog):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB.\nMore about it")

    monkeypatch.setattr("vmod_jax.performance.peer.Peer.step", full)
    results = run(tmp_path, "train-step", *TINY, "--streams", "5x6+20", "--rounds", "1")
    assert [entry["kind"] for entry in results["rows"]].count("train_step") == 1
    assert "peer" not in [entry["kind"] for entry in results["rows"]]
    (line,) = results["checks"][0]["left_out"]
    assert line in caplog.text
    assert line.startswith("PyTorch is left out, there was no room for it: CUDA out of memory. Tried to allocate 16.00")
    assert "XLA_PYTHON_CLIENT_ALLOCATOR=platform" in line
    monkeypatch.setattr("vmod_jax.performance.stream.Theirs.feed", full)
    results = run(tmp_path, "stream", *TINY, "--tokens", "5", "--context", "6", "--at-once", "3", "--rounds", "1")
    assert len(results["left_out"]) == 1
    assert {entry["kind"] for entry in results["rows"]} == {"stream", "int8", "prefill", "cache"}


def test_routing_and_attention(tmp_path):
    rows = run(tmp_path, "routing", *TINY, "--streams", "5x6+20", "--rounds", "1")["rows"]
    assert [entry["name"] for entry in rows] == ["5x6+20 forward routing/layer", "5x6+20 gradient routing/layer"]
    results = run(tmp_path, "attention", "--sizes", "40", "--heads", "4", "--width", "8", "--rounds", "1", "--no-peer")
    assert results["backend"] == "blocked"
    assert [entry["name"] for entry in results["rows"]] == [
        f"40 {what} blocked/reference" for what in ("forward", "gradient", "against a cache")
    ]
    assert all(entry["apart_from_reference"] < 1e-6 for entry in results["rows"])
    apart = results["apart_on_packed_and_padded"]
    assert apart.keys() == {"out", "dq", "dk", "dv", "cache"}
    assert 0 < max(apart.values()) < 1e-5


def test_decode_video(tmp_path):
    from vmod_jax.data import video

    path = tmp_path / "a.mp4"
    video.write(path, (np.full((48, 64, 3), 4 * i, np.uint8) for i in range(30)), 10.0)
    (entry,) = run(tmp_path, "decode-video", "--videos", str(path), "--rounds", "1", "--size", "32")["rows"]
    assert (entry["decoded"], entry["yielded"]) == (30, 6)
    with pytest.raises(UserError, match="missing"):
        command.main(["decode-video", "--videos", "missing.mp4"])


def test_a_batch_has_the_stream_it_was_asked_for():
    stream = setup.Stream(frames=9, tokens=4, text=50)
    args = _arguments(*TINY)
    batch = setup.make_batch(setup.make_config(args, "full", 4), stream)
    ids = batch["input_ids"][0]
    assert len(ids) == stream.size == 86
    assert (ids == 64).sum() == 36
    ends = batch["label_pos"][0][batch["label_is_stream"][0]]
    assert len(ends) == 9
    assert (ids[ends] == 64).all()
    assert (ids[ends + 1] != 64).all()
    assert not (batch["label"] == IGNORE).any()
    assert (np.diff(batch["label_pos"][0]) > 0).all()


def _arguments(*options):
    import argparse

    parser = argparse.ArgumentParser()
    setup.add_model_arguments(parser)
    return parser.parse_args(options)


@pytest.mark.parametrize("text", ["10x600", "ax6+2", "10x0+5", "x+"])
def test_a_stream_that_cannot_be_read_is_one_line(text):
    with pytest.raises(UserError, match="--streams"):
        train_step.read_stream(text)


def test_summary_has_a_line_for_every_row(tmp_path, capsys):
    more = {"formula_ratio": 0.7, "remat": "full", "spread": 0.01, "dtype": "float32", "tokens_per_frame": 10}
    entry = bench.row("x MoD/full", "train_step", 3.0, 4.0, **more, frames=6, text_tokens=20)
    for name in ("a", "b"):
        bench.write_json(tmp_path / f"{name}.json", {"rows": [entry]})
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    command.main(["summary", *files, "--out", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text()
    cells = "x MoD/full | train_step | 3 | 4 | 0.750 | 0.700 | 0.010 | float32 | full | 10 x 6 + 20"
    assert [line for line in text.splitlines() if "MoD" in line] == [f"| {cells} | {n}.json |" for n in "ab"]
    assert text.count("###") == 1  # one machine
    (tmp_path / "c.json").write_text("[]")
    for wrong, message in (("c.json", "no result"), ("d.json", "no file")):
        with pytest.raises(UserError, match=message):
            command.main(["summary", str(tmp_path / wrong)])
    assert summary.COLUMNS[0] == "row"
