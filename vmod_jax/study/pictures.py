"""Pictures of what LayerExperts choose: kept cells bright, skipped ones dark, CLS as a mark in the corner.

Masks are `study.routing`'s: a frame's n tokens are CLS first, where the model has one, then h x w cells row by row. A
frame that is CLS alone is one cell. Frames without pixels (features) are drawn as grey ones: see `blank`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vmod_jax.data import video
from vmod_jax.study.routing import Choice, Grid

DIM = 0.4  # what is left of the brightness of a skipped cell
TINT = 0.5  # how much of a cell's colour is its score's
COLUMNS = 8  # frames of a strip, heat maps in a row


def strip(path: Path, frames: np.ndarray, kept: Mapping[int, np.ndarray], *, grid: Grid, cls: bool, fps: float) -> None:
    """A PNG: a row for each layer, a column for each of some frames, spread evenly over the stream.

    frames: u8[F, S, S, 3]; kept: of each layer bool[F, n].
    """
    shown = np.unique(np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int))
    figure = Figure(figsize=(1.3 * len(shown) + 0.7, 1.3 * len(kept) + 0.4), layout="constrained")
    places = figure.subplots(len(kept), len(shown), squeeze=False)
    for row, (layer, mask) in zip(places, kept.items(), strict=True):
        for axes, i in zip(row, shown, strict=True):
            axes.imshow(shade(frames[i], mask[i], grid, cls))
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"layer {layer}", fontsize=9)
    for axes, i in zip(places[0], shown, strict=True):
        axes.set_title(f"{i / fps:.1f} s", fontsize=9)
    figure.savefig(path, dpi=120)


def heat_video(
    path: Path, frames: np.ndarray, choices: Mapping[int, Choice], *, grid: Grid, cls: bool, fps: float
) -> None:
    """An .mp4 of the whole stream, one panel for each layer side by side, its cells in the colours of their scores.

    frames: u8[F, S, S, 3]. Colours run from the lowest to the highest score of a layer's cells in this stream.
    """
    side = 2 * int(np.clip(1024 // len(choices), 48, 128))  # pixels of a panel: h264 needs even sides
    at = np.arange(side) * frames.shape[1] // side
    tints = {layer: _tints(choice.scores, grid, cls) for layer, choice in choices.items()}
    heading = _heading([f"layer {layer}" for layer in choices], side)

    def pictures() -> Iterator[np.ndarray]:
        for i, frame in enumerate(frames):
            large = frame[at[:, None], at]
            panels = []
            for layer, choice in choices.items():
                colour = enlarge(tints[layer][i], grid, cls, large.shape[:2])
                tinted = ((1 - TINT) * large + TINT * colour).astype(np.uint8)
                panels.append(shade(tinted, choice.kept[i], grid, cls))
            yield np.concatenate([heading, np.concatenate(panels, axis=1)])

    video.write(path, pictures(), fps)


def positions(path: Path, rates: Mapping[int, np.ndarray], *, grid: Grid, cls: bool) -> None:
    """A PNG: for each layer the share of the frames in which each token was kept, f64[n]; cells as a heat map."""
    columns = min(len(rates), COLUMNS)
    rows = -(-len(rates) // columns)
    figure = Figure(figsize=(1.7 * columns + 0.9, 1.9 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False)
    for axes, (layer, rate) in zip(places.flat, rates.items(), strict=False):
        cells = _cells(rate, grid, cls)
        axes.imshow(cells, vmin=0, vmax=1, cmap="viridis")
        axes.set_title(f"layer {layer}" + (f": CLS {rate[0]:.2f}" if cls else ""), fontsize=9)
        if max(grid) <= 7:
            _write_values(axes, cells)
    for axes in places.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_visible(bool(axes.images))
    figure.colorbar(places[0, 0].images[0], ax=places, label="share of frames")
    figure.savefig(path, dpi=120)


def overlaps(path: Path, layers: Sequence[int], mean: np.ndarray, chance: np.ndarray) -> None:
    """A PNG: how much of what one layer keeps another keeps too, f64[L, L], and in the title what chance gives."""
    side = 0.45 * len(layers) + 2.2
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(mean, vmin=0, vmax=1, cmap="viridis")
    _write_values(axes, mean)
    ticks = range(len(layers))
    axes.set(xticks=ticks, yticks=ticks, xticklabels=layers, yticklabels=layers, xlabel="layer", ylabel="layer")
    low, high = (f"{value:.2f}" for value in (np.min(chance), np.max(chance)))
    axes.set_title(f"kept in common (chance {low if low == high else f'{low} to {high}'})", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=120)


# --- parts ------------------------------------------------------------------------------------------------------------


def blank(frames: int) -> np.ndarray:
    """Grey pictures in place of frames that have no pixels: u8[F, 96, 96, 3]."""
    return np.full((frames, 96, 96, 3), 160, np.uint8)


def shade(frame: np.ndarray, kept: np.ndarray, grid: Grid, cls: bool) -> np.ndarray:
    """u8[S, S, 3], bool[n] -> u8[S, S, 3]: skipped cells dark; CLS a square in the corner, white where it is kept."""
    bright = enlarge(kept, grid, cls, frame.shape[:2])[..., None]
    out = np.where(bright, frame, DIM * frame).astype(np.uint8)
    if cls:
        mark = max(4, len(frame) // 10)
        out[:mark, :mark] = 255
        out[1 : mark - 1, 1 : mark - 1] = 255 * kept[0]
    return out


def enlarge(values: np.ndarray, grid: Grid, cls: bool, size: tuple[int, int]) -> np.ndarray:
    """Values of a frame's tokens as a picture of its cells: [n, ...] -> [H, W, ...]."""
    cells = _cells(values, grid, cls)
    row, column = (np.arange(pixels) * count // pixels for pixels, count in zip(size, cells.shape, strict=False))
    return cells[row[:, None], column]


def _cells(values: np.ndarray, grid: Grid, cls: bool) -> np.ndarray:
    """[n, ...] -> [h, w, ...]; a frame that is CLS alone is one cell."""
    return values[int(cls) :].reshape(*grid, *values.shape[1:]) if all(grid) else values[None]


def _tints(scores: np.ndarray, grid: Grid, cls: bool) -> np.ndarray:
    """f32[F, n] -> f64[F, n, 3], colours of 0 to 255."""
    cells = np.stack([_cells(frame, grid, cls) for frame in scores])
    low, high = cells.min(), cells.max()
    return 255 * mpl.colormaps["viridis"]((scores - low) / max(high - low, 1e-12))[..., :3]


def _heading(texts: Sequence[str], side: int) -> np.ndarray:
    """One line of text above panels of `side` pixels: u8[24, side * len(texts), 3]."""
    figure = Figure(figsize=(side * len(texts) / 64, 24 / 64), dpi=64)  # 64 divides exactly: no pixel is lost
    for i, text in enumerate(texts):
        figure.text((i + 0.5) / len(texts), 0.5, text, ha="center", va="center", fontsize=11)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _write_values(axes, cells: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(cells):
        size = 8 if max(cells.shape) < 5 else 6
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", size=size, color="black" if value > 0.6 else "white"
        )
