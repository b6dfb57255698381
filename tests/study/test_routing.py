"""What was kept, in numbers: against sets, rasters and enumerations; and from a tiny model."""

import dataclasses
import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from tiny_models import D_V, POLICIES, VOCAB, make_config, make_params

from vmod_jax.errors import UserError
from vmod_jax.lm import LanguageModel
from vmod_jax.study import routing
from vmod_jax.study.routing import Choice


def draw_kept(rng, frames, n, k):
    """i32[F, k], ascending, and the same as sets."""
    kept = np.sort(np.stack([rng.permutation(n)[:k] for _ in range(frames)]), -1).astype(np.int32)
    return kept, [set(row.tolist()) for row in kept]


# --- sets -------------------------------------------------------------------------------------------------------------


def test_masks_rates_and_overlaps_are_those_of_sets():
    rng = np.random.default_rng(0)
    n, frames = 7, 40
    a, sets_a = draw_kept(rng, frames, n, 3)
    b, sets_b = draw_kept(rng, frames, n, 5)
    mask_a, mask_b = routing.kept_mask(a, n), routing.kept_mask(b, n)
    assert mask_a.tolist() == [[token in kept for token in range(n)] for kept in sets_a]
    rates = [sum(token in kept for kept in sets_a) / frames for token in range(n)]
    np.testing.assert_allclose(routing.keep_rate(mask_a), rates, rtol=1e-12)
    both = [len(x & y) / 3 for x, y in zip(sets_a, sets_b, strict=True)]
    np.testing.assert_allclose(routing.overlap(mask_a, mask_b), both, rtol=1e-12)
    neighbours = [len(x & y) / 3 for x, y in itertools.pairwise(sets_a)]
    np.testing.assert_allclose(routing.overlap(mask_a[1:], mask_a[:-1]), neighbours, rtol=1e-12)
    assert routing.agreement(mask_a, mask_a) == {"same_frames": 1.0, "same_tokens": 1.0}
    changed = mask_a.copy()
    changed[:4] = ~changed[:4]  # frames that have nothing in common
    changed[:4, np.argmax(changed[:4], -1)] |= False
    assert routing.agreement(mask_a, changed) == {"same_frames": 0.9, "same_tokens": 0.9}


@pytest.mark.parametrize(("k", "other"), [(2, 2), (1, 4), (3, 2)])
def test_chance_of_an_overlap_is_the_mean_over_all_pairs_of_sets(k, other):
    n = 5
    first, second = (np.array([*itertools.combinations(range(n), size)]) for size in (k, other))
    pairs = [*itertools.product(routing.kept_mask(first, n), routing.kept_mask(second, n))]
    a, b = (np.stack(side) for side in zip(*pairs, strict=True))
    assert routing.overlap(a, b).mean() == pytest.approx(routing.chance_overlap(a, b).mean())


@pytest.mark.parametrize(
    ("gate", "function"),
    [
        ("raw", lambda mu: mu),
        ("tanh", lambda mu: 1 + 0.2 * math.tanh(mu)),
        ("sigmoid", lambda mu: 1 / (1 + math.exp(-mu))),
    ],
)
def test_statistics_of_gate_and_scores(gate, function):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(6, 5)).astype(np.float32)
    kept, sets = draw_kept(rng, 6, 5, 2)
    found = routing.score_statistics(scores, routing.kept_mask(kept, 5), gate)
    gates = [function(float(scores[i, token])) for i, tokens in enumerate(sets) for token in tokens]
    for name, values in (("gate", gates), ("mu", scores.ravel().tolist())):
        mean = sum(values) / len(values)
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        expected = {"mean": mean, "std": std, "min": min(values), "max": max(values)}
        assert found[name] == pytest.approx(expected, abs=1e-5)


# --- boxes ------------------------------------------------------------------------------------------------------------

SIDE = 24


def draw_boxes(rng, count):
    """f64[count, 4] of whole pixels within SIDE."""
    corners = np.sort(np.array([rng.permutation(SIDE + 1)[:2] for _ in range(2 * count)]).reshape(count, 2, 2), -1)
    return np.stack([corners[:, 0, 0], corners[:, 1, 0], corners[:, 0, 1], corners[:, 1, 1]], -1).astype(float)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (7, 7), (1, 1)])
def test_cells_of_boxes_are_those_of_a_raster(grid):
    """A raster so fine that every cell has SIDE x SIDE of its pixels, whatever the grid."""
    h, w = grid
    rng = np.random.default_rng(h * w)
    for count in (0, 1, 3, 3, 3):
        boxes = draw_boxes(rng, count)
        raster = np.zeros((SIDE * h, SIDE * w), bool)
        centres = []
        for left, top, right, bottom in boxes.astype(int).tolist():
            raster[top * h : bottom * h, left * w : right * w] = True
            row, column = (math.floor(Fraction(low + high, 2) * size / SIDE) for low, high, size in
                           ((top, bottom, h), (left, right, w)))  # fmt: skip
            centres.append(row * w + column)
        covered = raster.reshape(h, SIDE, w, SIDE).any((1, 3)).ravel()
        np.testing.assert_array_equal(routing.covered_cells(boxes, SIDE, grid), covered)
        assert routing.centre_cells(boxes, SIDE, grid).tolist() == centres


@pytest.mark.parametrize("cls", [True, False])
def test_chance_of_hits_is_the_mean_over_all_sets(cls):
    """Every set of k tokens once, over the same frame: what is found then is what chance is said to give."""
    grid, k = (2, 3), 2
    n = int(cls) + 6
    masks = routing.kept_mask(np.array([*itertools.combinations(range(n), k)]), n)
    boxes = [np.array([[0.0, 0, 8, 12], [10, 13, 23, 24]])] * len(masks)
    found = routing.box_hits(masks, boxes, SIDE, grid, cls)
    assert found["objects"] == 2 * len(masks)
    assert found["hit_rate"] == pytest.approx(found["hit_rate_chance"])
    assert found["hit_rate_chance"] == pytest.approx(k / n)
    assert found["precision"] == pytest.approx(found["precision_chance"])
    assert found["precision_chance"] == pytest.approx(3 / 6)  # one cell, and two of the second row


def test_hits_are_counted_object_by_object():
    kept = routing.kept_mask(np.array([[0, 1], [5, 9], [0, 5]]), 10)  # of CLS and 3 x 3 cells
    middle, corner = [9.0, 9, 15, 15], [0.0, 0, 8, 8]
    boxes = [np.array(frame).reshape(-1, 4) for frame in ([corner, middle], [middle], [])]
    found = routing.box_hits(kept, boxes, SIDE, (3, 3), True)
    assert (found["objects"], found["hit_rate"]) == (3, pytest.approx(2 / 3))
    assert found["precision"] == 2 / 4  # kept cells: corner; middle, last; middle, where nothing is now
    nothing = routing.box_hits(kept[2:], boxes[2:], SIDE, (3, 3), True)
    assert (nothing["objects"], nothing["hit_rate"], nothing["precision"]) == (0, None, 0.0)
    only_cls = routing.box_hits(np.eye(1, 10, dtype=bool), boxes[:1], SIDE, (3, 3), True)
    assert (only_cls["hit_rate"], only_cls["precision"]) == (0.0, None)


def test_boxes_are_read_without_distractors(tmp_path):
    assert routing.read_boxes(tmp_path) is None
    ball = {"object": "red ball", "number": 0, "place": "top", "box": [32, 0, 64, 30]}
    other = ball | {"number": -1, "box": [0, 0, 10, 10], "distractor": True}
    third = ball | {"number": 2, "box": [1, 2, 3, 4], "distractor": False}
    (tmp_path / "boxes.json").write_text(json.dumps({"a": [[ball, other], [other], [third, ball]]}))
    with pytest.raises(UserError, match="damaged"):
        routing.read_boxes(tmp_path)
    (tmp_path / "world.json").write_text('{"side": 96, "sample_fps": 2, "more": 1}')
    read = routing.read_boxes(tmp_path)
    assert (read.side, read.fps) == (96, 2)
    assert [boxes.tolist() for boxes in read.videos["a"]] == [[ball["box"]], [], [third["box"], ball["box"]]]
    (tmp_path / "boxes.json").write_text('{"a": [["ball"]]}')
    with pytest.raises(UserError, match="damaged"):
        routing.read_boxes(tmp_path)


# --- all of it --------------------------------------------------------------------------------------------------------


def draw_streams(rng, frames=(4, 1, 3), n=7, sizes=((1, 2), (3, 3))):
    """Streams of random scores and choices, of layers that keep so many."""
    out = []
    for count in frames:
        draw = lambda k, count=count: routing.kept_mask(draw_kept(rng, count, n, k)[0], n)  # noqa: E731
        scores = rng.normal(size=(len(sizes), count, n)).astype(np.float32)
        out.append({layer: Choice(scores[i], draw(k)) for i, (layer, k) in enumerate(sizes)})
    return out


def test_summary_of_several_streams():
    rng = np.random.default_rng(2)
    streams, others = draw_streams(rng), draw_streams(rng)
    boxes = [[draw_boxes(rng, 2) for _ in stream[1].kept] for stream in streams]
    found = routing.summarise(streams, gate="raw", grid=(2, 3), cls=True, boxes=boxes, side=SIDE, others=others)
    json.dumps(found, allow_nan=False)
    assert found["frames"] == 8
    for layer, k in ((1, 2), (3, 3)):
        entry = found["layers"][layer]
        assert (entry["kept"], entry["chance"]) == (k, pytest.approx(k / 7))
        assert sum(entry["keep_rate"]) == pytest.approx(k)
        # Frames of different streams are no neighbours: 3 + 0 + 2 pairs.
        pairs = [pair for stream in streams for pair in itertools.pairwise(stream[layer].kept)]
        assert len(pairs) == 5
        assert entry["neighbour_overlap"] == pytest.approx(np.mean([(a & b).sum() / k for a, b in pairs]))
        assert entry["mu"]["max"] == max(float(stream[layer].scores.max()) for stream in streams)
        assert entry["boxes"]["objects"] == 16
        same = [(a == b).all() for s, o in zip(streams, others, strict=True)
                for a, b in zip(s[layer].kept, o[layer].kept, strict=True)]  # fmt: skip
        assert entry["agreement"]["same_frames"] == pytest.approx(np.mean(same))
    both = [(a & b).sum() / 2 for s in streams for a, b in zip(s[1].kept, s[3].kept, strict=True)]
    assert found["overlap"]["layers"] == [1, 3]
    np.testing.assert_allclose(found["overlap"]["mean"], [[1, np.mean(both)], [np.mean(both), 1]])
    np.testing.assert_allclose(found["overlap"]["chance"], [[2 / 7, 3 / 7], [3 / 7, 3 / 7]])


def test_summary_without_boxes_cells_or_neighbours():
    streams = draw_streams(np.random.default_rng(3), frames=(1,), n=1, sizes=((1, 1),))
    found = routing.summarise(streams, gate="tanh", grid=(0, 0), cls=True, boxes=[[np.zeros((0, 4))]], side=SIDE)
    assert found["layers"][1].keys().isdisjoint({"boxes", "agreement"})
    assert found["layers"][1]["neighbour_overlap"] is None


def draw_rows(config, frames, rng):
    """Rows of so many frames each with a little text around them: (ids, features)."""
    n = config.tokens_per_frame
    rows = []
    for count in frames:
        parts = [[*rng.integers(0, VOCAB, 2), *[config.frame_token_id] * n] for _ in range(count)]
        ids = np.array([*itertools.chain(*parts), *rng.integers(0, VOCAB, 1 + count)], np.int32)
        rows.append((ids, rng.normal(size=(count, n, D_V)).astype(np.float32)))
    return rows


def test_streams_are_watched_as_they_are():
    """Padded to one shape, each decides what it decides alone; only learned layers that keep something are there."""
    config = make_config("two_ratios")
    lm = LanguageModel(config, make_params(config))
    rows = draw_rows(config, (3, 1), np.random.default_rng(4))
    streams = routing.watch(lm, rows)
    assert lm._forward._cache_size() == 1
    assert len(streams) == 2
    for (ids, frames), stream in zip(rows, streams, strict=True):
        alone = lm.routing(ids[None], frames[None])
        assert [*stream] == [0, 1, 2]
        for layer, choice in stream.items():
            np.testing.assert_allclose(choice.scores, alone[layer].scores[0], atol=1e-5)
            assert [np.flatnonzero(row).tolist() for row in choice.kept] == np.asarray(alone[layer].kept[0]).tolist()


@pytest.mark.parametrize("policy", ["full", "layer_skip", "random", "uniform"])
def test_a_model_that_chooses_nothing(policy):
    config = make_config(policy)
    with pytest.raises(UserError, match="no layer of this model has a LayerExpert") as error:
        routing.watch(LanguageModel(config, {}), draw_rows(config, (1,), np.random.default_rng(5)))
    assert "\n" not in str(error.value)


def test_bfloat16_agrees_where_scores_lie_apart():
    """In one layer whose scores are the input's alone: a choice differs only where a gap is below its rounding."""
    config = dataclasses.replace(make_config(), policy=(POLICIES["all"][0], *POLICIES["full"][1:]))
    params = make_params(config)
    rows = draw_rows(config, (30,), np.random.default_rng(6))
    (single,) = routing.watch(LanguageModel(config, params), rows)
    (half,) = routing.watch(LanguageModel(dataclasses.replace(config, dtype="bfloat16"), params), rows)
    scores = -np.sort(-single[0].scores, -1)
    k = int(single[0].kept[0].sum())
    apart = scores[:, k - 1] - scores[:, k] > 0.1 * np.abs(single[0].scores).max()
    assert apart.sum() > 5
    np.testing.assert_array_equal(half[0].kept[apart], single[0].kept[apart])
    assert routing.agreement(single[0].kept[apart], half[0].kept[apart])["same_frames"] == 1
