"""What LayerExperts choose: which tokens of a frame, whether layers agree, and whether the tokens show something.

Plain functions on NumPy arrays, for what `LanguageModel.routing` returns. A frame's n tokens are CLS first, where the
model has one, then the h x w cells row by row. What is kept is a mask, bool[F, n], made once by `kept_mask`; its frames
may be those of several streams, one after another, except where neighbouring frames are compared.

What chance gives stands beside what was found: k of the n tokens, drawn at random anew in every frame and layer. (Under
`always_keep_last` too, where one of the k places is given away.)
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vmod_jax.errors import UserError
from vmod_jax.models import layer_expert
from vmod_jax.models.depth import num_kept
from vmod_jax.models.experts import learned_layers
from vmod_jax.models.video_lm import VideoLMConfig

Grid = tuple[int, int]  # h and w; (0, 0) where a frame is CLS alone


class Choice(NamedTuple):
    """What one layer decided in one stream."""

    scores: np.ndarray  # f32[F, n], mu
    kept: np.ndarray  # bool[F, n]


Stream = dict[int, Choice]  # by layer


class Boxes(NamedTuple):
    """Where the objects of generated videos are."""

    side: int  # of the videos, in pixels
    fps: float  # sampled frames a second
    videos: dict[str, list[np.ndarray]]  # of each video, of each sampled frame: f64[O, 4], left, top, right, bottom


# --- from a model -----------------------------------------------------------------------------------------------------


def watch(lm: Any, rows: Sequence[tuple[np.ndarray, np.ndarray]], progress: str = "") -> list[Stream]:
    """What a model's LayerExperts choose in each of several streams, one after another.

    lm: a LanguageModel; rows: (input_ids i32[T], frames u8[F, S, S, 3] | f32[F, n, d_v]) of each stream.
    Raises UserError for a model in which no layer chooses.
    """
    n, layers = lm.config.tokens_per_frame, choosing_layers(lm.config)
    # Every row is given as many text tokens and frames as the longest: one shape, compiled once. What is added comes
    # behind the stream, so that no frame sees it.
    most_frames = max(len(frames) for _, frames in rows)
    most_text = max(len(ids) - n * len(frames) for ids, frames in rows)
    streams = []
    for ids, frames in tqdm(rows, progress, unit="stream", disable=not progress):
        padded_ids = np.zeros((1, most_text + n * len(frames)), np.int32)
        padded_ids[0, : len(ids)] = ids
        padded_frames = np.zeros((1, most_frames, *frames.shape[1:]), frames.dtype)
        padded_frames[0, : len(frames)] = frames
        routed = lm.routing(padded_ids, padded_frames)
        stream = {}
        for layer in layers:
            scores, kept = (np.asarray(x)[0, : len(frames)] for x in routed[layer])
            stream[layer] = Choice(scores, kept_mask(kept, n))
        streams.append(stream)
    return streams


def choosing_layers(config: VideoLMConfig) -> list[int]:
    """The layers whose LayerExpert chooses tokens. Raises UserError where there is none."""
    kept = {
        layer: num_kept(config.tokens_per_frame, config.policy[layer].keep) for layer in learned_layers(config.policy)
    }
    if not any(kept.values()):
        raise UserError(
            "no layer of this model has a LayerExpert that chooses tokens: "
            "train one under a routed policy, such as --config.policy=interleaved"
        )
    return [layer for layer, k in kept.items() if k]


def kept_mask(kept: np.ndarray, n: int) -> np.ndarray:
    """Indices of kept tokens as a mask: i32[..., k] -> bool[..., n]."""
    mask = np.zeros((*kept.shape[:-1], n), bool)
    np.put_along_axis(mask, kept, True, axis=-1)
    return mask


# --- what was kept ----------------------------------------------------------------------------------------------------


def keep_rate(kept: np.ndarray) -> np.ndarray:
    """Share of the frames in which each token was kept: bool[F, n] -> f64[n]. Chance: k / n."""
    return kept.mean(0)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|A ∩ B| / min(|A|, |B|) of each frame: bool[F, n], bool[F, n] -> f64[F]; 1 where one set lies in the other.

    Of two layers in the same frames; of one layer in neighbouring frames as `overlap(kept[1:], kept[:-1])`.
    """
    return (a & b).sum(-1) / np.minimum(a.sum(-1), b.sum(-1))


def chance_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What `overlap` is expected to be for sets as large as these, drawn at random: f64[F], max(|A|, |B|) / n."""
    return np.maximum(a.sum(-1), b.sum(-1)) / a.shape[-1]


def agreement(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """How far two computations of one choice agree: bool[F, n], bool[F, n] -> shares of equal frames, common tokens."""
    return {"same_frames": float((a == b).all(-1).mean()), "same_tokens": float(overlap(a, b).mean())}


def score_statistics(scores: np.ndarray, kept: np.ndarray, gate: str) -> dict[str, dict[str, float]]:
    """Mean, std, min and max of the gate over kept tokens, and of mu over all: f32[F, n], bool[F, n]."""
    values = {"gate": np.asarray(layer_expert.gate(gate, jnp.asarray(scores[kept]))), "mu": scores}
    return {
        name: {key: float(getattr(x.astype(np.float64), key)()) for key in ("mean", "std", "min", "max")}
        for name, x in values.items()
    }


# --- against boxes ----------------------------------------------------------------------------------------------------


def read_boxes(root: Path) -> Boxes | None:
    """boxes.json of a folder of generated videos, without distractors; None where the folder has none."""
    if not (root / "boxes.json").is_file():
        return None
    try:
        world = json.loads((root / "world.json").read_text())
        side, fps = int(world["side"]), float(world["sample_fps"])
        videos = {
            name: [
                np.array([entry["box"] for entry in frame if not entry.get("distractor", False)], float).reshape(-1, 4)
                for frame in frames
            ]
            for name, frames in json.loads((root / "boxes.json").read_text()).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{root}: boxes.json or world.json is damaged ({error!r}): make the videos again") from error
    return Boxes(side, fps, videos)


def centre_cells(boxes: np.ndarray, side: int, grid: Grid) -> np.ndarray:
    """The cell of each object, the one in which the middle of its box lies: f64[O, 4] in pixels -> i64[O]."""
    h, w = grid
    left, top, right, bottom = boxes.T
    row, column = (top + bottom) * h // (2 * side), (left + right) * w // (2 * side)
    return (row.clip(0, h - 1) * w + column.clip(0, w - 1)).astype(int)


def covered_cells(boxes: np.ndarray, side: int, grid: Grid) -> np.ndarray:
    """The cells that any box reaches into, by however little: f64[O, 4] in pixels -> bool[h * w]."""
    left, top, right, bottom = boxes.T[:, :, None]
    row, column = (np.arange(count) for count in grid)
    rows = (top * grid[0] < (row + 1) * side) & (bottom * grid[0] > row * side)  # [O, h]
    columns = (left * grid[1] < (column + 1) * side) & (right * grid[1] > column * side)
    return (rows[:, :, None] & columns[:, None, :]).any(0).ravel()


def box_hits(
    kept: np.ndarray, boxes: Sequence[np.ndarray], side: int, grid: Grid, cls: bool
) -> dict[str, float | int | None]:
    """How often the objects' tokens are among those kept, and what chance gives.

    kept: bool[F, n]; boxes: of each frame f64[O, 4], in pixels of a square video, over which the grid is spread.
    hit_rate: share of the objects, counted frame by frame, whose cell (`centre_cells`) is kept; chance k / n.
    precision: share of the kept cells that a box reaches into; chance the mean share of cells that one reaches into.
    CLS competes for the k places but is no cell. None where nothing is there to be counted.
    """
    cells = kept[:, int(cls) :]
    hits = np.concatenate([frame[centre_cells(box, side, grid)] for frame, box in zip(cells, boxes, strict=True)])
    covered = np.stack([covered_cells(box, side, grid) for box in boxes])
    return {
        "objects": len(hits),
        "hit_rate": _mean(hits),
        "hit_rate_chance": float(kept.mean()),
        "precision": _mean(covered[cells]),
        "precision_chance": float(covered.mean()),
    }


# --- all of it --------------------------------------------------------------------------------------------------------


def summarise(
    streams: Sequence[Stream],
    *,
    gate: str,
    grid: Grid,
    cls: bool,
    boxes: Sequence[Sequence[np.ndarray]] | None = None,
    side: int = 0,
    others: Sequence[Stream] | None = None,
) -> dict[str, Any]:
    """Everything above over several streams, as JSON has it: {"layers": {layer: {...}}, "overlap": {...}}.

    gate, grid, cls: of the model's config; boxes: of each stream, of each frame f64[O, 4], with the videos' side;
    others: the same streams computed otherwise (in bfloat16), for "agreement".
    """
    kept = {layer: np.concatenate([stream[layer].kept for stream in streams]) for layer in streams[0]}
    layers = {}
    for layer, mask in kept.items():
        scores = np.concatenate([stream[layer].scores for stream in streams])
        next_to = [overlap(stream[layer].kept[1:], stream[layer].kept[:-1]) for stream in streams]
        entry: dict[str, Any] = {
            "kept": int(mask[0].sum()),
            "chance": float(mask.mean()),
            "keep_rate": keep_rate(mask).tolist(),
            "neighbour_overlap": _mean(np.concatenate(next_to)),
            **score_statistics(scores, mask, gate),
        }
        if boxes is not None and all(grid):
            entry["boxes"] = box_hits(mask, [box for stream in boxes for box in stream], side, grid, cls)
        if others is not None:
            entry["agreement"] = agreement(mask, np.concatenate([other[layer].kept for other in others]))
        layers[layer] = entry
    pairs = [[(a, b) for b in kept.values()] for a in kept.values()]
    return {
        "frames": len(next(iter(kept.values()))),
        "layers": layers,
        "overlap": {
            "layers": [*kept],
            "mean": [[float(overlap(a, b).mean()) for a, b in row] for row in pairs],
            "chance": [[float(chance_overlap(a, b).mean()) for a, b in row] for row in pairs],
        },
    }


def _mean(values: np.ndarray) -> float | None:
    """None, which JSON knows, for the mean of nothing."""
    return float(values.mean()) if len(values) else None
