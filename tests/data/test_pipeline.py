"""The pipeline: order, epochs, processes, resumption, and the data sets behind it."""

import json
import logging
import shutil
import tracemalloc

import ml_collections
import numpy as np
import pytest

from vmod_jax.data import video
from vmod_jax.data.batch import Bucket
from vmod_jax.data.conversation import Sample, stream_format
from vmod_jax.data.pipeline import Streams, batches, decoded, make_buckets, open_streams
from vmod_jax.data.storage import prepare
from vmod_jax.data.tokenizer import train_tokenizer
from vmod_jax.errors import UserError

SAMPLES, N = 10, 2


@pytest.fixture(scope="module")
def fmt(tmp_path_factory):
    return stream_format(train_tokenizer(["A ball rolls."], tmp_path_factory.mktemp("tokenizer")), N)


@pytest.fixture
def streams():
    """Stream i has 2 + i % 3 frames, all filled with i."""

    def sample(i):
        conversation = [
            {"role": "stream", "num_frames": 1, "learn": False},
            {"role": "assistant", "content": "A ball rolls.", "learn": True},
            {"role": "stream", "num_frames": 1 + i % 3, "learn": True},
            {"role": "assistant", "content": "A ball rolls.", "learn": True},
        ]
        return Sample(conversation, str(i), 5, 5 + 2 + i % 3)

    def frames(sample):
        return np.full((sample.stop - sample.start, N, 4), int(sample.video), np.float32)

    return Streams([sample(i) for i in range(SAMPLES)], frames, None)


BUCKETS = [Bucket(4, 128, 64)]


def _videos(batch):
    return batch["frames"][:, 0, 0, 0].astype(int).tolist()


def test_epochs_hold_every_stream_once_in_new_orders(streams, fmt):
    iterator = batches(streams, fmt, BUCKETS, 5, seed=3)
    epochs = [_videos(next(iterator)) + _videos(next(iterator)) for _ in range(4)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = batches(streams, fmt, BUCKETS, 5, seed=3, prefetch=1)
    assert [_videos(next(again)) + _videos(next(again)) for _ in range(4)] == epochs
    other = batches(streams, fmt, BUCKETS, 5, seed=4)
    assert _videos(next(other)) + _videos(next(other)) != epochs[0]


def test_processes_share_each_batch_and_its_bucket(streams, fmt):
    buckets = [Bucket(2, 128, 64), Bucket(3, 128, 64), Bucket(4, 128, 64)]
    whole = batches(streams, fmt, buckets, 4, seed=0)
    parts = [batches(streams, fmt, buckets, 4, seed=0, rows=rows) for rows in (slice(0, 1), slice(1, 4))]
    for _ in range(6):
        expected, given = next(whole), [next(part) for part in parts]
        for name, array in expected.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in given]), array)


def test_state_is_the_global_step(streams, fmt):
    """A run on two hosts continues as one on one host, with the batch that came next."""
    first = batches(streams, fmt, BUCKETS, 4, seed=0, rows=slice(0, 2))
    for _ in range(3):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = batches(streams, fmt, BUCKETS, 4, seed=0)
    second.set_state(state)
    expected, got = next(first), next(second)
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name][:2], array)
    assert second.get_state() == first.get_state()


def test_a_cut_stream_is_announced_once(streams, fmt, caplog):
    with caplog.at_level(logging.WARNING):
        iterator = batches(streams, fmt, [Bucket(3, 128, 64)], 5, seed=0)
        seen = [next(iterator) for _ in range(4)]
    # Streams 2, 5 and 8 have 4 frames, of which only the first is followed by a reply that fits.
    assert sorted(int(record.args[1]) for record in caplog.records) == [2, 5, 8]
    assert all("2 of 4 messages" in record.getMessage() for record in caplog.records)
    assert all(batch["frames"].shape[1] == 3 for batch in seen)


def test_a_bucket_for_everything(streams, fmt):
    (bucket,) = make_buckets((), streams, fmt, 1200)
    assert bucket.frames == 4
    assert bucket.text % 32 == bucket.labels % 32 == 0
    next(batches(streams, fmt, [bucket], SAMPLES, seed=0))
    assert make_buckets(((1, 2, 3),), streams, fmt, 1200) == [Bucket(1, 2, 3)]
    assert make_buckets((), streams, fmt, 3)[0].frames == 4


def test_chunks_of_whole_frames(streams, fmt, caplog):
    """A mesh with context=2 trains on the same tokens, each row cut in four."""
    with pytest.raises(
        UserError, match=r"the 6 frames of data.buckets' \(6, 128, 64\) do not divide over 2 x .* = 4 chunks"
    ):
        make_buckets([(8, 128, 64), (6, 128, 64)], streams, fmt, 1200, parts=4)
    (bucket,) = make_buckets((), streams, fmt, 3, parts=4)
    assert bucket.frames % 4 == bucket.text % 32 == 0
    whole = next(batches(streams, fmt, make_buckets((), streams, fmt, 3), SAMPLES, seed=0, max_frames=3))
    split = next(batches(streams, fmt, [bucket], SAMPLES, seed=0, parts=4, max_frames=3))
    assert split["input_ids"].shape == (SAMPLES, bucket.tokens(N))
    ids, frames = (split[name].reshape(SAMPLES, 4, -1, *split[name].shape[2:]) for name in ("input_ids", "frames"))
    for row in range(SAMPLES):
        length = split["length"][row]
        joined = np.concatenate([ids[row, part, : length[part]] for part in range(4)])
        np.testing.assert_array_equal(joined, whole["input_ids"][row, : whole["length"][row]])
        np.testing.assert_array_equal(split["first_position"][row], np.cumsum(length) - length)
        counts = (ids[row] == fmt.frame_token_id).sum(-1) // N
        np.testing.assert_array_equal(split["first_frame"][row], np.cumsum(counts) - counts)
        shown = np.concatenate([frames[row, part, : counts[part]] for part in range(4)])
        np.testing.assert_array_equal(shown, whole["frames"][row, : len(shown)])
        # Labels are those of the whole row, at the same tokens.
        there = split["label"][row] != -100
        part = np.arange(bucket.labels) // (bucket.labels // 4)
        place = (split["label_pos"][row] + split["first_position"][row][part])[there]
        listed = whole["label"][row] != -100
        np.testing.assert_array_equal(place, whole["label_pos"][row][listed])
        for name in ("label", "label_weight", "label_is_stream"):
            np.testing.assert_array_equal(split[name][row][there], whole[name][row][listed])
    with pytest.raises(UserError, match=r"split into 2 x mesh.context = 8 chunks of whole frames.*add a larger one"):
        next(batches(streams, fmt, [Bucket(4, 128, 64)], SAMPLES, seed=0, parts=8))


def _data(**values):
    return ml_collections.ConfigDict(
        {"fps": 2.0, "root": "", "seed": 0, "world": "plain", "allow_outside": False} | values
    )


def test_generated_streams(tmp_path, monkeypatch):
    monkeypatch.setenv("VMOD_CACHE", str(tmp_path))
    data = _data(name="shapes", train_videos=2, val_videos=1, test_videos=1)
    train, val = (open_streams(data, split, 24) for split in ("train", "val"))
    assert (len(train.samples), len(val.samples)) == (2, 1)
    assert {s.video for s in train.samples}.isdisjoint({s.video for s in val.samples})
    for sample in train.samples:
        frames = train.frames(sample)
        assert frames.shape == (sample.stop - sample.start, 24, 24, 3)
        assert frames.dtype == np.uint8
        assert frames.std() > 1
    fmt = stream_format(train.tokenizer, 10)
    next(batches(train, fmt, make_buckets((), train, fmt, 1200), 2, seed=0))
    # The second time nothing is generated; other numbers in the same folder are an error.
    again = open_streams(data, "train", 24)
    assert again.samples == train.samples
    assert again.tokenizer == train.tokenizer
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith("shapes"))
    with pytest.raises(UserError, match="name another data"):
        open_streams(_data(name="shapes", root=str(folder), train_videos=3, val_videos=1, test_videos=1), "train", 24)


def test_a_folder_of_real_videos(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("VMOD_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    root.mkdir()
    shutil.copy(clips / "streams" / "narrations.json", root)
    shutil.copy(clips / "streams" / "bottle-detection.mp4", root)
    streams = open_streams(_data(name="narration", root=str(root)), "train", 32)
    assert {sample.video for sample in streams.samples} == {"bottle-detection"}
    sample = streams.samples[0]
    np.testing.assert_array_equal(
        streams.frames(sample), decoded(root / "bottle-detection.mp4", 2.0, 32)[sample.start : sample.stop]
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.float16])
def test_prepared_streams(streams, tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("VMOD_CACHE", str(tmp_path / "cache"))
    shape = (12, 8, 8, 3) if dtype == np.uint8 else (12, N, 4)
    frames = {str(i): np.arange(np.prod(shape)).reshape(shape).astype(dtype) + i for i in range(SAMPLES)}
    splits = {"train": streams.samples[:7], "val": streams.samples[7:]}
    prepare(splits, frames.__getitem__, 2.0, tmp_path / "set")
    data = _data(name="prepared", path=str(tmp_path / "set"))
    for split, samples in splits.items():
        got = open_streams(data, split, 8)
        assert got.samples == samples
        for sample in samples:
            expected = frames[sample.video][sample.start : sample.stop]
            array = got.frames(sample)
            np.testing.assert_array_equal(array, expected)
            assert array.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    with pytest.raises(UserError, match="fps"):
        open_streams(_data(name="prepared", path=str(tmp_path / "set"), fps=4.0), "train", 8)
    if dtype == np.uint8:
        with pytest.raises(UserError, match="size"):
            open_streams(data, "train", 9)


def test_what_a_user_may_get_wrong(tmp_path):
    with pytest.raises(UserError, match=r"data.name='x' is unknown: use one of shapes"):
        open_streams(_data(name="x"), "train", 24)
    with pytest.raises(UserError, match="no such folder"):
        open_streams(_data(name="narration", root=str(tmp_path / "nothing")), "train", 24)


def test_memory_does_not_grow_with_a_video(tmp_path, monkeypatch):
    monkeypatch.setenv("VMOD_CACHE", str(tmp_path / "cache"))
    frames, size = 300, 128
    video.write(tmp_path / "long.mp4", (np.full((16, 16, 3), i % 256, np.uint8) for i in range(frames)), 10.0)
    tracemalloc.start()
    shown = decoded(tmp_path / "long.mp4", 10.0, size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shown.shape == (frames, size, size, 3)
    assert peak < shown.nbytes / 4


def test_of_a_broken_video_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("VMOD_CACHE", str(tmp_path / "cache"))
    video.write(tmp_path / "long.mp4", np.zeros((9, 32, 32, 3), np.uint8), 10.0)
    real = video.decode

    def breaks(*arguments):
        yield next(real(*arguments))
        raise UserError("decoding failed")

    monkeypatch.setattr(video, "decode", breaks)
    with pytest.raises(UserError, match="decoding failed"):
        decoded(tmp_path / "long.mp4", 10.0, 32)
    assert not list((tmp_path / "cache" / "frames").iterdir())
