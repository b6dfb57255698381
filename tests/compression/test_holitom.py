"""Token merging: the golden cases, the search against brute force, and what must not matter."""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmod_jax.compression import holitom

outer = jax.jit(holitom.outer, static_argnames=("share", "tau", "beta", "longest"))
window = jax.jit(holitom.window, static_argnames=("share", "tau", "beta"))


@pytest.fixture(scope="module")
def golden(goldens):
    folder = goldens / "compression"
    if not (folder / "holitom.npz").exists():
        pytest.skip(f"no {folder}/holitom.npz")
    return np.load(folder / "holitom.npz"), json.loads((folder / "holitom.json").read_text())["cases"]


def spans(first) -> list[tuple[int, int]]:
    """The segments of `segments`' answer, as (first, last)."""
    first = np.asarray(first).tolist()
    return [(start, len(first) - 1 - first[::-1].index(start)) for start in sorted(set(first))]


def close(got, expected):
    np.testing.assert_allclose(np.asarray(got), expected, atol=1e-5, rtol=0)


def test_every_golden_video(golden):
    arrays, cases = golden
    for i, case in enumerate(cases):
        x, a = arrays[f"frames_{i}"], arrays[f"attention_{i}"]
        frames, n, _ = x.shape
        similar = holitom.similarity(jnp.asarray(x))
        close(similar, arrays[f"similarity_{i}"])
        removed, first = holitom.segments(similar > case["tau"])
        expected = [tuple(segment) for segment in arrays[f"segments_{i}"].tolist()]
        assert (spans(first), int(removed)) == (expected, case["removed"]), case["name"]
        assert holitom.segments_reference(np.asarray(similar) > case["tau"]) == (int(removed), expected)
        after = holitom.share_after(case["share"], int(removed), frames * n)
        assert after == pytest.approx(case["share_after"], abs=1e-12)
        for beta, name in ((case["beta"], f"tokens_{i}"), (None, f"tokens_{i}_mean")):
            if name not in arrays:
                continue
            got = outer(x, a, case["share"], case["tau"], beta)
            assert int(got.valid.sum()) == case["total"] == len(arrays[name]), case["name"]
            close(got.tokens[: case["total"]], arrays[name])
            counts = [int((got.valid & (got.frame >= s) & (got.frame <= e)).sum()) for s, e in expected]
            assert counts == arrays[f"counts_{i}"].tolist()


def test_every_golden_frame(golden):
    arrays, cases = golden
    for i, case in enumerate(cases):
        x, a = arrays[f"frames_{i}"], arrays[f"attention_{i}"]
        kept = [
            holitom.frame(x[t], x[t - 1] if t else None, a[t], case["share"], case["tau"]).tolist()
            for t in range(len(x))
        ]
        assert kept == arrays[f"frame_kept_{i}"].tolist(), case["name"]


def test_every_golden_window(golden):
    arrays, cases = golden
    for name in (name for name in arrays if name.startswith("window_kept_")):
        i, start = map(int, name.split("_")[2:])
        part = slice(start, start + 4)
        got = window(
            arrays[f"frames_{i}"][part], arrays[f"attention_{i}"][part],
            *(cases[i][key] for key in ("share", "tau", "beta")),
        )  # fmt: skip
        rows = np.stack([got.frame, got.position, got.kind], -1)
        np.testing.assert_array_equal(rows, arrays[name])
        close(got.tokens, arrays[f"window_tokens_{i}_{start}"])


def test_the_golden_searches(golden):
    arrays, _ = golden
    for name in (name for name in arrays if name.startswith("dp_similarity_")):
        j = name.split("_")[-1]
        static = arrays[name] > 0.5
        total, longest = map(int, arrays[f"dp_removed_{j}"])
        expected = [tuple(segment) for segment in arrays[f"dp_segments_{j}"].tolist()]
        assert holitom.segments_reference(static, longest) == (total, expected)
        removed, first = holitom.segments(jnp.asarray(static), longest)
        assert (int(removed), spans(first)) == (total, expected)


def test_the_golden_inner_merge(golden):
    arrays, _ = golden
    first, count = map(int, arrays["inner_span"])
    received = arrays["inner_attention"][0, :, -1].mean(0)
    for merge in ("halving", "mean"):
        tokens, kept = holitom.inner(jnp.asarray(arrays["inner_hidden"][0]), received, first, count, merge=merge)
        np.testing.assert_array_equal(kept, arrays["inner_kept"])
        close(tokens, arrays[f"inner_{merge}"][0])


def test_the_search_is_the_best_of_all_partitions():
    rng = np.random.default_rng(0)
    search = jax.jit(holitom.segments)
    for _ in range(12):
        static = rng.random((7, 4)) < 0.7
        best = 0
        for cuts in itertools.product([False, True], repeat=7):
            edges = [0, *(t + 1 for t in range(7) if cuts[t]), 8]
            gain = sum((e - s - 1) * static[s : e - 1].all(0).sum() for s, e in itertools.pairwise(edges) if e - s > 1)
            best = max(best, int(gain))
        removed, first = search(static)
        assert (int(removed), spans(first)) == holitom.segments_reference(static)
        assert int(removed) == best


def slow_peaks(x, count, beta):
    """Density peaks as their definition says, in float64 and one token at a time."""
    x = np.asarray(x, np.float64)
    distance = np.linalg.norm(x[:, None] - x, axis=-1) / math.sqrt(x.shape[1])
    density = [np.exp(-np.sort(row**2)[: min(7, count)].mean()) for row in distance]
    score = []
    for i, row in enumerate(distance):
        denser = [row[j] for j in range(len(x)) if density[j] > density[i]]
        score.append(density[i] * (min(denser) if denser else distance.max()))
    centres = sorted(sorted(range(len(x)), key=lambda i: (-score[i], i))[:count])
    members = {c: [] for c in centres}
    for i in set(range(len(x))) - set(centres):
        members[min(centres, key=lambda c: (distance[i, c], c))].append(x[i])
    return centres, [beta * x[c] + (1 - beta) * np.mean(m, 0) if m else x[c] for c, m in members.items()]


def test_density_peaks_are_their_slow_definition():
    peaks = jax.jit(functools.partial(holitom.density_peaks, beta=0.6))
    for seed, count in ((0, 3), (1, 9), (2, 12), (3, 1)):
        x = jax.random.normal(jax.random.key(seed), (20, 5))
        there = jnp.arange(20) % 5 != 2
        out, centre = peaks(x, there, jnp.int32(count))
        centres, expected = slow_peaks(x[there], count, 0.6)
        assert np.flatnonzero(np.asarray(centre)[np.asarray(there)]).tolist() == centres
        close(out[centre], np.array(expected))


def video(seed=0, frames=6, n=9, width=8, moving=4):
    """A still picture of which `moving` positions change from frame to frame."""
    keys = jax.random.split(jax.random.key(seed), 3)
    still = jnp.broadcast_to(jax.random.normal(keys[0], (n, width)), (frames, n, width))
    x = still.at[:, :moving].set(jax.random.normal(keys[1], (frames, moving, width)))
    return x, jax.random.uniform(keys[2], (frames, n))


def test_permuting_positions_permutes_what_is_static_and_doubling_frames_loses_nothing():
    x, _ = video()
    order = np.random.default_rng(0).permutation(9)
    still = lambda x: holitom.similarity(x) > 0.8  # noqa: E731
    np.testing.assert_array_equal(still(x[:, order]), still(x)[:, order])
    removed = lambda x: int(holitom.segments(still(x))[0])  # noqa: E731
    assert removed(x[:, order]) == removed(x) > 0
    assert removed(jnp.repeat(x, 2, 0)) >= removed(x)


def test_a_window_that_is_the_video_is_the_video():
    x, a = video(frames=4)
    whole = outer(x, a, 0.5)
    part = window(x, a, 0.5)
    if int(whole.valid.sum()) == len(part.tokens):
        order = np.lexsort((whole.position, whole.frame))
        close(part.tokens, np.asarray(whole.tokens)[order[: len(part.tokens)]])
    assert len(part.tokens) == math.ceil(0.5 * 36)
    assert not (part.kind == 0).any()


@pytest.mark.parametrize(("frames", "n", "share"), [(1, 9, 0.3), (4, 9, 0.05), (3, 1, 0.5), (2, 4, 1.0)])
def test_single_frames_small_budgets_and_whole_ones(frames, n, share):
    x, a = video(frames=frames, n=n, moving=n // 2)
    got = outer(x, a, share)
    count = int(got.valid.sum())
    assert count <= len(got.tokens) == holitom.most_tokens(share, frames, n)
    assert not np.asarray(got.tokens)[count:].any()
    assert np.isfinite(got.tokens).all()
    part = window(x, a, share)
    assert len(part.tokens) == math.ceil(share * frames * n)
    kept = holitom.frame(x[0], None, a[0], share)
    assert len(kept) == math.ceil(share * n)
    assert kept[-1] == n - 1


def test_identical_frames_are_one():
    x = jnp.broadcast_to(video()[0][0], (8, 9, 8))
    got = outer(x, jnp.ones((8, 9)), 0.1)
    removed, first = holitom.segments(holitom.similarity(x) > 0.8)
    assert int(removed) == 9 * 7
    assert not np.asarray(first).any()
    assert int(got.valid.sum()) == round(9 * holitom.share_after(0.1, 63, 72))
