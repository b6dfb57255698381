"""Prepared data sets: everything comes back, from threads and other processes too; nothing half-written opens."""

import json
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from vmod_jax.data import storage
from vmod_jax.data.conversation import Sample
from vmod_jax.errors import UserError

LENGTHS = {"a": 9, "b": 30, "c": 5}


def conversation(count: int, text: str) -> list[dict]:
    return [
        {"role": "stream", "num_frames": count, "learn": True},
        {"role": "assistant", "content": text, "learn": True},
    ]


def sample(video: str, start: int, stop: int, text: str = "été [x]\n") -> Sample:
    return Sample(conversation(stop - start, text), video, start, stop)


SPLITS = {
    "train": [sample("b", 3, 20), sample("a", 0, 9), sample("b", 3, 30, "longer"), sample("b", 28, 29)],
    "val": [sample("c", 1, 5), sample("b", 0, 2)],
    "test": [],
}


def features(dtype=np.float16, n=4, d=6):
    """frames_of, and how often each video was asked for."""
    calls = []

    def frames_of(video: str) -> np.ndarray:
        calls.append(video)
        rng = np.random.default_rng(ord(video))
        return rng.normal(size=(LENGTHS[video], n, d)).astype(dtype)

    return frames_of, calls


def pixels(video: str) -> np.ndarray:
    return np.random.default_rng(ord(video)).integers(0, 256, (LENGTHS[video], 8, 8, 3), np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, ml_dtypes.bfloat16])
def test_everything_comes_back(tmp_path, dtype):
    frames_of = pixels if dtype == np.uint8 else features(dtype)[0]
    storage.prepare(SPLITS, frames_of, 2.0, tmp_path / "set")
    for split in ("train", "val"):
        source = storage.open_source(tmp_path / "set", split)
        assert len(source) == len(source.samples) == len(SPLITS[split])
        assert sorted(source.samples, key=str) == sorted(SPLITS[split], key=str)
        for index in reversed(range(len(source))):
            item = source[index]
            one = item["sample"]
            assert one == source.samples[index]
            assert item["frames"].dtype == dtype
            np.testing.assert_array_equal(item["frames"], frames_of(one.video)[one.start : one.stop])
            np.testing.assert_array_equal(source.frames(one), item["frames"])
            np.testing.assert_array_equal(source.frames(one._replace(stop=one.start + 1)), item["frames"][:1])


def test_each_video_is_encoded_once(tmp_path):
    frames_of, calls = features()
    storage.prepare(SPLITS, frames_of, 2.0, tmp_path / "set")
    assert sorted(calls) == ["a", "b", "c"]


def test_more_examples_than_fit_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "EXAMPLES_PER_FILE", 2)
    frames_of, _ = features()
    storage.prepare(SPLITS, frames_of, 2.0, tmp_path / "set")
    assert len(list((tmp_path / "set").glob("*train*array_record*"))) == 2
    source = storage.open_source(tmp_path / "set", "train")
    for index, one in enumerate(source.samples):
        np.testing.assert_array_equal(source[index]["frames"], frames_of(one.video)[one.start : one.stop])


def test_it_is_an_ordinary_tfds_data_set(tmp_path):
    """Read without our code."""
    import tensorflow_datasets as tfds

    frames_of, _ = features()
    storage.prepare(SPLITS, frames_of, 2.0, tmp_path / "set")
    source = tfds.builder_from_directory(str(tmp_path / "set")).as_data_source(split="val")
    examples = {example["video"].decode(): example for example in source}
    assert set(examples) == {"b", "c"}
    example = examples["c"]
    assert json.loads(example["conversation"]) == SPLITS["val"][0].conversation
    assert (example["start"], example["stop"], example["fps"]) == (1, 5, 2.0)
    np.testing.assert_array_equal(example["frames"], frames_of("c")[1:5])
    assert "tensorflow" not in sys.modules


def test_threads_share_a_source_and_processes_get_their_own(tmp_path):
    frames_of, _ = features()
    storage.prepare(SPLITS, frames_of, 2.0, tmp_path / "set")
    source = storage.open_source(tmp_path / "set", "train")
    fresh = pickle.loads(pickle.dumps(source))
    source[0]
    opened = pickle.loads(pickle.dumps(source))
    for one in (source, fresh, opened):
        with ThreadPoolExecutor(8) as pool:
            items = list(pool.map(one.__getitem__, [index % len(source) for index in range(64)]))
        for item in items:
            video, start, stop = item["sample"][1:]
            np.testing.assert_array_equal(item["frames"], frames_of(video)[start:stop])


def test_grain_reads_it(tmp_path):
    import grain

    frames_of, _ = features()
    storage.prepare(SPLITS, frames_of, 2.0, tmp_path / "set")
    source = storage.open_source(tmp_path / "set", "train")
    data = grain.MapDataset.source(source).seed(0).shuffle().repeat(2)
    items = list(data.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)))
    assert len(items) == 8
    for item in items:
        video, start, stop = item["sample"][1:]
        np.testing.assert_array_equal(item["frames"], frames_of(video)[start:stop])


def test_opening_reads_no_frames(tmp_path):
    """The records may even be gone: text needs none of them."""
    frames_of, _ = features()
    storage.prepare(SPLITS, frames_of, 2.0, tmp_path / "set")
    for file in (tmp_path / "set").glob("*array_record*"):
        file.unlink()
    source = storage.open_source(tmp_path / "set", "train")
    assert [one.video for one in source.samples] == ["b", "b", "b", "a"]


def test_meta(tmp_path):
    frames_of, _ = features(n=4, d=6)
    written = storage.prepare(SPLITS, frames_of, 2.0, tmp_path / "f", {"encoder": "siglip", "grid": [1, 3]})
    assert written == {
        **{"encoder": "siglip", "grid": [1, 3], "kind": "features", "n": 4, "d_v": 6, "dtype": "float16", "fps": 2.0},
        "splits": {"train": 4, "val": 2, "test": 0},
    }
    assert storage.read_meta(tmp_path / "f") == written
    storage.prepare(SPLITS, pixels, 1.5, tmp_path / "p")
    about = storage.read_meta(tmp_path / "p")
    assert (about["kind"], about["size"], about["dtype"], about["fps"]) == ("pixels", 8, "uint8", 1.5)


def test_mismatches_are_told(tmp_path):
    frames_of, _ = features(n=4)
    storage.prepare(SPLITS, frames_of, 2.0, tmp_path / "set", {"encoder": "siglip"})
    storage.open_source(tmp_path / "set", "val", {"kind": "features", "n": 4, "fps": 2, "encoder": "siglip"})
    for key, value in (("kind", "pixels"), ("n", 10), ("fps", 1), ("encoder", "clip"), ("grid", [3, 3])):
        with pytest.raises(UserError, match=f"{key} = .* wanted"):
            storage.open_source(tmp_path / "set", "val", {key: value})
    with pytest.raises(UserError, match=r"'other'; it has train \(4\), val \(2\), test \(0\)"):
        storage.open_source(tmp_path / "set", "other")
    with pytest.raises(UserError, match="no samples in the split 'test'"):
        storage.open_source(tmp_path / "set", "test")
    with pytest.raises(UserError, match=r"meta\.json is missing"):
        storage.open_source(tmp_path / "nothing", "train")


def different(video):
    return np.zeros((LENGTHS[video], 4, 6 if video == "b" else 7), np.float32)


def double(video):
    return np.zeros((LENGTHS[video], 4, 6), np.float64)


def short(video):
    return np.zeros((8, 4, 6), np.float32)


@pytest.mark.parametrize(("frames_of", "message"), [(different, "alike"), (double, "wanted uint8"), (short, "has 8")])
def test_bad_frames(tmp_path, frames_of, message):
    with pytest.raises(UserError, match=message):
        storage.prepare(SPLITS, frames_of, 2.0, tmp_path / "set")
    assert not any(tmp_path.iterdir())


def test_no_samples(tmp_path):
    with pytest.raises(UserError, match="no samples"):
        storage.prepare({"train": []}, pixels, 2.0, tmp_path / "set")
    assert not any(tmp_path.iterdir())


def test_a_failed_run_leaves_the_old_set_and_the_next_replaces_it(tmp_path):
    storage.prepare(SPLITS, pixels, 2.0, tmp_path / "set")
    with pytest.raises(UserError):
        storage.prepare(SPLITS, different, 2.0, tmp_path / "set")
    assert storage.open_source(tmp_path / "set", "train").meta["kind"] == "pixels"
    storage.prepare({"train": SPLITS["train"][:1]}, features()[0], 2.0, tmp_path / "set")
    assert len(storage.open_source(tmp_path / "set", "train")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_killed_run_leaves_nothing_that_opens(tmp_path):
    """SIGKILL in the middle of writing; the next run cleans up."""
    code = """
import sys, time
import numpy as np
from vmod_jax.data import storage
from vmod_jax.data.conversation import Sample
def frames_of(video):
    if video == "b":
        print("half-way", flush=True)
        time.sleep(60)
    return np.zeros((3, 4, 6), np.float32)
storage.prepare({"train": [Sample([], "a", 0, 3), Sample([], "b", 0, 3)]}, frames_of, 2.0, sys.argv[1])
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "set")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half-way\n"
        os.kill(process.pid, signal.SIGKILL)
    leftovers = list(tmp_path.iterdir())
    assert leftovers
    for path in [*leftovers, tmp_path / "set"]:
        with pytest.raises(UserError, match="no prepared data set"):
            storage.open_source(path, "train")
    storage.prepare(SPLITS, pixels, 2.0, tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_other_peoples_folders_are_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds other files"):
        storage.prepare(SPLITS, pixels, 2.0, tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "keep me"
