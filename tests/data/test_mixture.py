"""Mixtures: drawn by weight, each source its own epochs, and resumed to the bit."""

import json
from collections import Counter

import numpy as np
import pytest

from vmod_jax.data.conversation import Sample, stream_format
from vmod_jax.data.mixture import BLOCK, mixture, order
from vmod_jax.data.pipeline import batches, make_buckets
from vmod_jax.data.streams import Streams
from vmod_jax.data.tokenizer import train_tokenizer
from vmod_jax.errors import UserError


def streams(count, text):
    said = [{"role": "stream", "num_frames": 2, "learn": True}, {"role": "assistant", "content": text, "learn": True}]
    samples = [Sample(said, f"{text}{i}", i, i + 2) for i in range(count)]
    return Streams(
        samples, lambda s: np.full((s.stop - s.start, 1, 2), s.start, np.float32), None, texts=lambda: [text]
    )


@pytest.fixture(scope="module")
def mixed():
    return mixture({"a": streams(5, "Left."), "b": streams(3, "Right.")}, {"a": 3.0, "b": 1.0}, "train")


@pytest.fixture(scope="module")
def fmt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Left.", "Right."], folder)
    return stream_format(folder, 1)


def test_samples_stand_one_source_after_another(mixed):
    assert len(mixed.samples) == 8
    assert [s.video for s in mixed.samples] == [*(f"a:Left.{i}" for i in range(5)), *(f"b:Right.{i}" for i in range(3))]
    assert mixed.samples[-1] == mixed.samples[7]
    assert mixed.frames(mixed.samples[6])[0, 0, 0] == 1
    assert mixed.texts() == ["Left.", "Right."]


def test_sources_are_drawn_by_weight_and_go_through_their_own_epochs(mixed):
    at = order(mixed.parts, seed=1)
    drawn = [at(g) for g in range(2 * BLOCK + 100)]  # over the borders of what is drawn at once
    of_a = [i for i in drawn if i < 5]
    assert len(of_a) / len(drawn) == pytest.approx(0.75, abs=0.03)
    for own, size in ((of_a, 5), ([i for i in drawn if i >= 5], 3)):
        whole = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in whole)
        assert len({tuple(epoch) for epoch in whole}) > 1
    assert Counter(order(mixed.parts, seed=2)(g) for g in range(4000)) != Counter(drawn[:4000])


def test_any_place_can_be_asked_for_first(mixed):
    places = [3 * BLOCK + 7, 5, BLOCK, BLOCK - 1]
    at = order(mixed.parts, seed=1)
    in_order = {g: at(g) for g in sorted(places)}
    assert {g: order(mixed.parts, seed=1)(g) for g in places} == in_order


def test_resumed_is_not_interrupted_to_the_bit(mixed, fmt):
    buckets = make_buckets((), mixed, fmt, 8)
    make = lambda: batches(mixed, fmt, buckets, 4, seed=3, corrections=0.5)  # noqa: E731
    through = make()
    want = [next(through) for _ in range(6)]
    stopped = make()
    for _ in range(3):
        next(stopped)
    state = json.loads(json.dumps(stopped.get_state()))
    again = make()
    again.set_state(state)
    for expected in want[3:]:
        got = next(again)
        assert got.keys() == expected.keys()
        for name in got:
            np.testing.assert_array_equal(got[name], expected[name])


def test_mistakes():
    with pytest.raises(UserError, match="'b' has no streams in its split 'val'"):
        mixture({"a": streams(1, "x"), "b": streams(0, "y")}, {"a": 1, "b": 1}, "val")
    with pytest.raises(UserError, match="below zero"):
        mixture({"a": streams(1, "x")}, {"a": -1}, "train")
