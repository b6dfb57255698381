"""Shards of features: the same bytes however they are written, broken videos set apart, and frames read back."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from vmod_jax.commands import cli
from vmod_jax.data import features, video
from vmod_jax.errors import UserError

SIZE = 16


def no_encoder():
    return None


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Nine short videos in two folders, two of them broken."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "below").mkdir()
    rng = np.random.default_rng(0)
    for number in range(9):
        frames = rng.integers(0, 255, (4 * (number + 3), 32, 48, 3), dtype=np.uint8)
        video.write(folder / ("below" if number % 2 else "") / f"v{number}.mp4", frames, 4.0)
    whole = (folder / "v4.mp4").read_bytes()
    (folder / "v4.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "v8.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "SHARD_BYTES", 20 * 3 * SIZE * SIZE)


def plan_of(root, out):
    return features.make_plan(root, out, 2.0, SIZE, {}, 3 * SIZE * SIZE)


@pytest.fixture(scope="module")
def written(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "features"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "SHARD_BYTES", 20 * 3 * SIZE * SIZE)
        patch.setattr(features, "CHUNK", 4)
        plan = plan_of(root, out)
        features.write(plan, out, no_encoder)
    assert len(plan.shards) > 2
    return out


@pytest.fixture(autouse=True)
def small_records(monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 4)


def content(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_frames_come_back(root, written):
    there = features.Features(written, 2.0)
    assert set(there) == {"v0", "below/v1", "v2", "below/v3", "below/v5", "v6", "below/v7"}
    for name in there:
        frames = video.read(root / f"{name}.mp4", 2.0, SIZE).frames
        np.testing.assert_array_equal(there.frames(name), frames)
        np.testing.assert_array_equal(there.read(name, 3, 6), frames[3:6])
        assert there[name] == (len(frames) - 1) / 2


def test_broken_videos_are_set_apart(written):
    why = json.loads((written / "quarantine.json").read_text())
    assert why.keys() == {"v4", "v8"}
    assert all(name in line for name, line in why.items())
    assert json.loads((written / "meta.json").read_text())["quarantined"] == 2


def test_written_again_nothing_changes(root, written):
    before = content(written)
    features.write(plan_of(root, written), written, no_encoder)
    assert content(written) == before


def test_what_a_killed_worker_left_is_made_again(root, written, tmp_path):
    out = tmp_path / "out"
    plan = plan_of(root, out)
    assert features.write_shard(plan, 1, out, no_encoder)
    (out / "shard-00000.part").write_bytes(b"torn")
    features.write(plan, out, no_encoder)
    assert content(out) == content(written)


def test_two_workers_write_the_shards_of_one(root, written, tmp_path):
    plan = plan_of(root, tmp_path / "out")
    for worker in (range(0, len(plan.shards), 2), range(1, len(plan.shards), 2)):
        assert all(features.write_shard(plan, number, tmp_path / "out", no_encoder) for number in worker)
    features.write(plan, tmp_path / "out", no_encoder)
    assert content(tmp_path / "out") == content(written)


def test_a_shard_that_another_worker_is_at_is_left_to_it(root, tmp_path):
    import fcntl

    out = tmp_path / "out"
    plan = plan_of(root, out)
    with (out / "shard-00000.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not features.write_shard(plan, 0, out, no_encoder)
        with pytest.raises(UserError, match=r"1 of .* shards are with other workers"):
            features.write(plan, out, no_encoder)
        with pytest.raises(UserError, match="unfinished folder of features"):
            features.Features(out, 2.0)


def test_mistakes(root, written, tmp_path):
    with pytest.raises(UserError, match=r"no video and no \.pt file"):
        features.make_plan(tmp_path, tmp_path / "out", 2.0, SIZE, {}, 1)
    with pytest.raises(UserError, match="begun with another fps"):
        features.make_plan(root, written, 4.0, SIZE, {}, 1)
    with pytest.raises(UserError, match=r"data\.fps is 4"):
        features.Features(written, 4.0)
    with pytest.raises(UserError, match="no folder of features"):
        features.Features(tmp_path, 2.0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="holds other files"):
        features.make_plan(root, tmp_path / "full", 2.0, SIZE, {}, 1)
    with pytest.raises(UserError, match="none from 99 on"):
        features.Features(written, 2.0).read("v0", 99, 100)


@pytest.mark.goldens
def test_pt_files_are_taken_over_and_bad_ones_set_apart(goldens, tmp_path, capsys):
    folder = goldens / "benchmarks" / "features"
    for name in ("bf16", "dict", "legacy", "calls_print", "truncated"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.pt").write_bytes((folder / f"{name}.pt").read_bytes())
    assert cli.main(["data", "features", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert "4 videos could not be read" in (said := capsys.readouterr().out)
    assert "code ran" not in said
    there = features.Features(tmp_path / "out", 2.0)
    assert [*there] == ["bf16"]
    with np.load(folder / "expected.npz") as expected:
        np.testing.assert_array_equal(there.frames("bf16"), expected["bf16"])


@pytest.mark.slow
def test_killed_at_ten_moments_it_ends_the_same(root, tmp_path):
    """The command itself, by SIGKILL; what it has written in the end is what one run without kills writes."""
    command = [sys.executable, "-m", "vmod_jax", "data", "features", str(root), "--image-size", "256", "--out"]
    environment = {**os.environ, "VMOD_CACHE": str(tmp_path)}
    began = time.perf_counter()
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True, capture_output=True)
    seconds = time.perf_counter() - began
    rng = np.random.default_rng(0)
    for moment in rng.uniform(0.3, 0.95, 10) * seconds:
        process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stderr=subprocess.DEVNULL)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(tmp_path / "killed")], env=environment, check=True, capture_output=True)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
