"""Where frames lie, and compaction: against plain loops over one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmod_jax.models.layout import by_frame, compact, compaction_slots, find_frames, invert, take_frames, take_rows

T, FRAMES, N, FRAME = 24, 4, 3, 9  # all rows are padded to this, so that everything compiles once


@st.composite
def rows(draw):
    """Two streams of text and whole frames: (input_ids i32[2, T], length i32[2]); padding holds anything."""
    ids, length = draw(st.lists(st.integers(0, FRAME), min_size=2 * T, max_size=2 * T)), []
    ids = np.array(ids, np.int32).reshape(2, T)
    for row in ids:
        pieces, text, frames = [], T - FRAMES * N, 0
        for is_frame in draw(st.lists(st.booleans(), max_size=T)):
            if is_frame and frames < FRAMES:
                pieces += [FRAME] * N
                frames += 1
            elif not is_frame and text:
                pieces.append(draw(st.integers(0, FRAME - 1)))
                text -= 1
        pieces = pieces or [0]
        row[: len(pieces)] = pieces
        length.append(len(pieces))
    return ids, np.array(length, np.int32)


def drawn(ids):
    """ "t" text, "F" frame token -> input_ids of one row."""
    return np.array([[FRAME if c == "F" else 1 for c in ids]], np.int32)


find = jax.jit(find_frames, static_argnames=("frame_token_id", "n", "num_frames"))


@settings(deadline=None, max_examples=60)
@given(rows(), st.integers(0, 50), st.integers(0, 9))
def test_frames_are_found_as_a_loop_finds_them(rows, first_position, first_frame):
    ids, length = rows
    got = find(ids, length, FRAME, N, FRAMES, np.full(2, first_position), np.full(2, first_frame))
    for b in range(2):
        seen, starts = 0, []
        for t in range(T):
            token = t < length[b] and ids[b, t] == FRAME
            assert got.vision[b, t] == (seen if token else -1)
            if token and seen % N == 0:
                starts.append(t)
            seen += token
            assert got.position[b, t] == first_position + t
            assert got.valid[b, t] == (t < length[b])
        assert got.frame_start[b].tolist() == starts + [T] * (FRAMES - len(starts))
        assert got.frame_index[b].tolist() == list(range(first_frame, first_frame + FRAMES))


@jax.jit
def compacted(ids, length, kept):
    layout = find_frames(ids, length, FRAME, N, kept.shape[1])
    return compact(layout, compaction_slots(layout, N, kept.shape[2]), kept)


def test_what_is_computed_drawn():
    """t text, F frame, f kept, . empty: two rows of one batch, n = 3, k = 2 and 0."""
    ids = np.concatenate([drawn("ttFFFtFFFFFFt"), drawn("FFFttttt" + "t" * 5)])
    kept = np.array([[[0, 2], [1, 2], [0, 1]], [[0, 2], [0, 1], [0, 1]]], np.int32)

    def draw(k):
        packed = compacted(ids, np.array([13, 6]), kept[:, :, :k])
        shown = [
            "".join("." if i == 13 else "f" if vision else "t" for i, vision in zip(*row, strict=True))
            for row in zip(np.asarray(packed.index), np.asarray(packed.vision), strict=True)
        ]
        return shown, np.asarray(packed.index).tolist()

    assert draw(2) == (
        ["ttfftfffft", "ffttt....."],
        [[0, 1, 2, 4, 5, 7, 8, 9, 10, 12], [0, 2, 3, 4, 5, 13, 13, 13, 13, 13]],
    )
    assert draw(0) == (["tttt", "ttt."], [[0, 1, 5, 12], [3, 4, 5, 13]])


@pytest.mark.parametrize("k", range(N + 1))
def test_compaction_is_the_kept_tokens_in_order(k):
    @settings(deadline=None, max_examples=25)
    @given(rows(), st.randoms(use_true_random=False))
    def check(rows, random):
        ids, length = rows
        kept = np.array([[sorted(random.sample(range(N), k)) for _ in range(FRAMES)] for _ in range(2)], np.int32)
        kept = kept.reshape(2, FRAMES, k)
        packed = compacted(ids, length, kept)
        size = T - FRAMES * (N - k)
        assert packed.index.shape == (2, size)
        for b in range(2):
            expected, vision, seen = [], [], 0
            for t in range(length[b]):
                if ids[b, t] == FRAME:
                    if seen % N in kept[b, seen // N]:
                        expected.append(t)
                        vision.append(True)
                    seen += 1
                else:
                    expected.append(t)
                    vision.append(False)
            assert packed.index[b].tolist() == expected + [T] * (size - len(expected))
            assert packed.vision[b].tolist() == vision + [False] * (size - len(expected))
            slot = {t: s for s, t in enumerate(expected)}
            assert packed.inverse[b].tolist() == [slot.get(t, size) for t in range(T)]

    check()


@settings(deadline=None, max_examples=25)
@given(rows(), st.randoms(use_true_random=False))
def test_values_of_frames_go_where_their_tokens_go_and_so_do_gradients(rows, random):
    ids, length = rows
    kept = np.array([[sorted(random.sample(range(N), 2)) for _ in range(FRAMES)] for _ in range(2)], np.int32)
    values = np.arange(1.0, 2 * FRAMES * N + 1, dtype=np.float32).reshape(2, FRAMES, N)
    layout = find_frames(ids, length, FRAME, N, FRAMES)
    packed = compact(layout, compaction_slots(layout, N, 2), kept)
    got, pull = jax.vjp(lambda values: take_frames(values, layout, packed), jnp.asarray(values))
    weight = np.random.default_rng(0).normal(size=got.shape).astype(np.float32)
    want, gradient = np.zeros(got.shape), np.zeros(values.shape)
    for b in range(2):
        for slot, token in enumerate(np.asarray(packed.index[b])):
            if token < T and ids[b, token] == FRAME:
                place = divmod(int(layout.vision[b, token]), N)
                want[b, slot] = values[b, *place]
                gradient[b, *place] = weight[b, slot]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(pull(jnp.asarray(weight))[0], gradient)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-3, 12), min_size=6, max_size=6, unique=True))
def test_invert(index):
    got = invert(jnp.array([index], jnp.int32), 8)[0]
    assert got.tolist() == [index.index(i) if i in index else 6 for i in range(8)]


def test_gradient_of_taking_rows_is_that_of_a_plain_gather():
    """Rows that are not taken get exactly zero, and places outside give zeros and no gradient."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 10, 4)), jnp.float32)
    index = np.array([[7, 0, 10, 3], [10, 10, 10, 10], [9, 8, 7, 6]], np.int32)
    weight = jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32)

    def plain(x):
        taken = jnp.where(index[..., None] < 10, jnp.take_along_axis(x, np.minimum(index, 9)[..., None], axis=1), 0)
        return taken, jnp.sum(jnp.sin(taken) * weight)

    def ours(x):
        taken = take_rows(x, index, invert(jnp.asarray(index), 10))
        return taken, jnp.sum(jnp.sin(taken) * weight)

    np.testing.assert_array_equal(ours(x)[0], plain(x)[0])
    expected, got = (np.asarray(jax.jit(jax.grad(lambda x, f=f: f(x)[1]))(x)) for f in (plain, ours))
    np.testing.assert_array_equal(got, expected)
    assert np.count_nonzero(got.any(-1)) == 7


def test_there_and_back_with_its_gradient():
    """What a routed layer does: gather, compute, add back where it came from; skipped rows get the identity's."""
    index = jnp.array([[1, 2, 4, 5]], jnp.int32)
    inverse = invert(index, 5)
    x = jnp.arange(10.0).reshape(1, 5, 2)

    def layer(x):
        return x + take_rows(3 * take_rows(x, index, inverse), inverse, index)

    factor = np.array([1, 4, 4, 1, 4])[:, None]
    np.testing.assert_array_equal(layer(x)[0], factor * x[0])
    np.testing.assert_array_equal(jax.grad(lambda x: layer(x).sum())(x)[0], factor * np.ones((5, 2)))


def test_values_by_frame():
    scores = np.arange(20, dtype=np.float32).reshape(2, 10)
    got = by_frame(scores, np.array([[1, 7], [4, 10]]), 3, 0)
    assert got.tolist() == [[[1, 2, 3], [7, 8, 9]], [[14, 15, 16], [0, 0, 0]]]  # row 1 has no second frame
