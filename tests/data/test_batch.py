"""Batches: every array, its padding, and what happens to rows that do not fit."""

import numpy as np
import pytest

from vmod_jax.data.batch import Bucket, collate, fit, make_row, pick, size
from vmod_jax.data.conversation import encode, stream_format
from vmod_jax.data.tokenizer import train_tokenizer
from vmod_jax.errors import UserError

N = 3


@pytest.fixture(scope="module")
def fmt(tmp_path_factory):
    texts = ["A ball rolls.", "It stops.", "The cat sleeps."]
    return stream_format(train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer")), N)


def _conversation(*frames):
    out = [{"role": "stream", "num_frames": 1, "learn": False}, {"role": "user", "content": "What happens?"}]
    for count in frames:
        out.append({"role": "stream", "num_frames": count, "learn": True})
        out.append({"role": "assistant", "content": "A ball rolls.", "learn": True})
    return out


def _row(fmt, *frames, weight=1.0):
    encoded = encode(_conversation(*frames), fmt)
    pixels = np.arange((1 + sum(frames)) * 12, dtype=np.float32).reshape(-1, N, 4) + 1
    return encoded, make_row(encoded, pixels, fmt, weight)


def test_rows_are_padded_and_nothing_is_lost(fmt):
    pairs = [_row(fmt, 2, 3, weight=0.5), _row(fmt, 1)]
    buckets = [Bucket(8, 200, 64), Bucket(6, 150, 40)]
    batch = collate([row for _, row in pairs], buckets, N)
    capacity = 150 + 6 * N
    shapes = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    assert shapes == {
        "input_ids": ((2, capacity), "int32"),
        "length": ((2,), "int32"),
        "frames": ((2, 6, N, 4), "float32"),
        "label_pos": ((2, 40), "int32"),
        "label": ((2, 40), "int32"),
        "label_weight": ((2, 40), "float32"),
        "label_is_stream": ((2, 40), "bool"),
    }
    for b, (encoded, row) in enumerate(pairs):
        length = len(encoded.input_ids)
        assert batch["length"][b] == length
        np.testing.assert_array_equal(batch["input_ids"][b, :length], encoded.input_ids)
        assert not batch["input_ids"][b, length:].any()
        np.testing.assert_array_equal(batch["frames"][b, : len(row.frames)], row.frames)
        assert not batch["frames"][b, len(row.frames) :].any()
        # The lists of labels, spread out again, are the labels.
        there = batch["label"][b] != -100
        spread = np.full(length, -100)
        spread[batch["label_pos"][b, there]] = batch["label"][b, there]
        np.testing.assert_array_equal(spread, encoded.labels)
        assert (batch["label_pos"][b, ~there] == capacity).all()
        assert not batch["label_weight"][b, ~there].any()
        assert not batch["label_is_stream"][b, ~there].any()
        is_frame = encoded.input_ids[batch["label_pos"][b, there]] == fmt.frame_token_id
        np.testing.assert_array_equal(batch["label_is_stream"][b, there], is_frame)
        weight = 0.5 if b == 0 else 1.0
        np.testing.assert_array_equal(batch["label_weight"][b, there], np.where(is_frame, np.float32(weight), 1))
        assert is_frame.sum() == (5 if b == 0 else 1)


def test_smallest_bucket_that_holds_all(fmt):
    buckets = [Bucket(8, 200, 64), Bucket(4, 100, 32), Bucket(4, 100, 16)]
    assert pick([Bucket(3, 20, 9), Bucket(4, 9, 16)], buckets, N) == Bucket(4, 100, 16)
    assert pick([Bucket(3, 20, 9), Bucket(4, 9, 17)], buckets, N) == Bucket(4, 100, 32)
    assert pick([Bucket(5, 1, 1)], buckets, N) == Bucket(8, 200, 64)
    with pytest.raises(UserError, match="no bucket holds 9 frames, 1 text tokens and 70 labels"):
        pick([Bucket(9, 1, 1), Bucket(1, 1, 70)], buckets, N)


def test_frames_must_be_as_many_as_the_text_says(fmt):
    encoded = encode(_conversation(2), fmt)
    with pytest.raises(UserError, match="3 frames came with 2"):
        make_row(encoded, np.zeros((2, N, 4), np.float32), fmt)


def test_too_long_a_stream_ends_with_the_last_reply_that_fits(fmt):
    conversation = _conversation(2, 2, 2)
    need = size(encode(conversation[:6], fmt), fmt)
    encoded, left_out = fit(conversation, fmt, [Bucket(1, 1, 1), need])
    assert left_out == 2
    assert encoded.conversation == conversation[:6]
    assert size(encoded, fmt) == need
    assert fit(conversation, fmt, [Bucket(99, 999, 999)])[1] == 0
    with pytest.raises(UserError, match="up to its first reply"):
        fit(conversation, fmt, [Bucket(2, 999, 999)])
