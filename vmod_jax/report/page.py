"""report.html: what a run learned, on one self-contained page (pictures and figures inside, nothing from a network)."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np


class Event(TypedDict):
    """Something said at a time of the stream."""

    time: float  # seconds
    text: str
    role: NotRequired[str]  # "assistant" (where absent) or "user"


class Timeline(TypedDict):
    """One stream: its frames, what the model said (and was asked), and what it should have said."""

    fps: float
    frames: np.ndarray  # u8[F, S, S, 3], RGB
    replies: Sequence[Event]
    truth: Sequence[Event]


COLOURS = ("#d97706", "#2563eb", "#64748b", "#059669", "#9333ea", "#dc2626")
THUMBNAILS, ROUTED_FRAMES = 12, 8
THUMBNAIL_PIXELS = 160  # longer frames are shrunk to this before they are embedded


def write_report(
    out_dir: Path,
    report: Mapping[str, Any],
    *,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    timeline: Timeline,
    routing: Mapping[int, np.ndarray],
    grid: tuple[int, int],
    cls: bool,
) -> Path:
    """Writes OUT_DIR/report.html and returns its path.

    report: report.json's contents; `policies` and `baselines` ({name: {metric: value}}) become the table.
    curves: the rows of metrics.jsonl of each policy.
    timeline: the stream that was watched.
    routing: for each routed layer (index from 0) the tokens kept of each frame, i32[F, k], as indices into the frame's
        tokens: CLS first where there is one, then the h x w grid row by row.
    grid, cls: h and w (0, 0 where there is only CLS), and whether a frame has a CLS token.
    """
    import jinja2

    frames = np.asarray(timeline["frames"])
    if not len(frames):
        raise ValueError("a report needs at least one frame")
    kept_of = {layer: np.asarray(kept) for layer, kept in sorted(routing.items())}
    thumbnails = _spread(len(frames), THUMBNAILS)
    shown = _spread(len(frames), ROUTED_FRAMES) if kept_of else []

    source = Path(__file__).with_name("template.html").read_text()
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = page.from_string(source).render(
        table=_table(report),
        stream=report.get("stream", {}),
        colours=dict(zip(curves, _cycle(COLOURS, len(curves)), strict=True)),
        curves=_curves_svg(curves),
        pictures={i: _picture(frames[i]) for i in sorted({*thumbnails, *shown})},
        timeline=_timeline(timeline, thumbnails),
        frame_times=[(i, i / timeline["fps"]) for i in shown],
        routed=[
            {
                "layer": layer,
                "kept": kept.shape[1],
                "cls_share": float((kept == 0).any(axis=1).mean()) if cls else None,
                "masks": [{"frame": i, **_mask(kept[i], grid, cls)} for i in shown],
                "heat": _heat(kept, grid, cls),
            }
            for layer, kept in kept_of.items()
        ],
        grid=grid,
        cls=cls,
        tokens=int(cls) + grid[0] * grid[1],
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def _spread(length: int, count: int) -> list[int]:
    """At most `count` indices, evenly spread over `length`, the middle of each share."""
    count = min(length, count)
    return [int((i + 0.5) * length / count) for i in range(count)]


def _cycle(values: Sequence[str], count: int) -> list[str]:
    return [values[i % len(values)] for i in range(count)]


# --- the table --------------------------------------------------------------------------------------------------------

# key, heading, which way is better, how a value is written
METRICS = (
    ("lm_ppl", "LM-PPL", "↓", "{:.2f}"),
    ("time_diff", "TimeDiff, s", "↓", "{:.2f}"),
    ("fluency", "Fluency", "↑", "{:.3f}"),
    ("fluency_strict", "strict Fluency", "↑", "{:.3f}"),
    ("lm_correctness", "LM-Correctness", "↑", "{:.3f}"),
    ("flops", "FLOPs", "↓", "si"),
    ("step_seconds", "step, ms", "↓", "ms"),
    ("train_seconds", "training, s", "↓", "{:.0f}"),
)


def _table(report: Mapping[str, Any]) -> dict[str, Any]:
    """Headings, and a row for each policy and each blind baseline; metrics that nobody has are left out."""
    groups = [("policy", report.get("policies", {})), ("baseline", report.get("baselines", {}))]
    entries = [(kind, name, values) for kind, group in groups for name, values in group.items()]
    metrics = [metric for metric in METRICS if any(metric[0] in values for _, _, values in entries)]
    rows = [
        {"kind": kind, "name": name.replace("_", " "), "cells": [_cell(values.get(m[0]), m[3]) for m in metrics]}
        for kind, name, values in entries
    ]
    return {"headings": [(m[1], m[2]) for m in metrics], "rows": rows}


def _cell(value: float | None, style: str) -> str:
    if value is None:
        return "-"
    if style == "si":
        for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
            if value >= factor:
                return f"{value / factor:.3g} {unit}"
        return f"{value:.3g}"
    return f"{value * 1000:.1f}" if style == "ms" else style.format(value)


# --- curves -----------------------------------------------------------------------------------------------------------

PANELS = (("loss", "loss"), ("lm_loss", "LM loss (words)"), ("stream_loss", "stream loss (speak or stay silent)"))


def _curves_svg(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str | None:
    """The losses against the step, one panel each: every logged value faintly, their running mean in full colour."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(panel[0] in row for rows in curves.values() for row in rows)]
    if not panels:
        return None
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "vmod",
        "font.family": "sans-serif",
        "font.size": 9,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(11, 3), layout="constrained")
        for axes, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for colour, rows in zip(_cycle(COLOURS, len(curves)), curves.values(), strict=True):
                points = np.array([(row["step"], row[key]) for row in rows if key in row], dtype=float).reshape(-1, 2)
                window = max(1, len(points) // 40)
                mean = np.convolve(points[:, 1], np.ones(window) / window, "valid") if len(points) else []
                axes.plot(*points.T, color=colour, alpha=0.25, linewidth=0.8)
                axes.plot(points[window - 1 :, 0], mean, color=colour, linewidth=1.8)
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("step")
            axes.set_ylim(bottom=0)
            axes.margins(x=0.01)
            axes.grid(color="#e2e8f0", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color("#94a3b8")
            axes.tick_params(color="#94a3b8", labelcolor="#475569")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img" aria-label="training curves"', svg, count=1)


# --- the stream -------------------------------------------------------------------------------------------------------

LANE, LETTER, GAP = 22, 6.3, 10  # pixels: height of a line of labels, width of a letter, least room between two labels


def _timeline(timeline: Timeline, thumbnails: Sequence[int]) -> dict[str, Any]:
    """Where everything goes on a drawing with time from left to right, in pixels."""
    seconds = len(timeline["frames"]) / timeline["fps"]
    said = [event for event in timeline["replies"] if event.get("role", "assistant") != "user"]
    asked = [event for event in timeline["replies"] if event.get("role") == "user"]
    tracks = [("truth", "truth", timeline["truth"]), ("asked", "asked", asked), ("said", "replies", said)]
    longest = max((len(event["text"]) for _, _, events in tracks for event in events), default=0)
    left, thumb = 64, 76
    width = max(1000.0, 28 * seconds, len(thumbnails) * (thumb + 4.0))
    scale = width / seconds
    top, placed = thumb + 34, []
    for kind, title, events in tracks:
        if not events:
            continue
        labels = _lanes([(left + event["time"] * scale, event) for event in events])
        where = [(x, top + lane * LANE, event) for x, lane, event in labels]
        placed.append({"kind": kind, "title": title, "top": top, "labels": where})
        top += (max(lane for _, lane, _ in labels) + 1) * LANE + 16
    step = next((s for s in (1, 2, 5, 10, 20, 30, 60, 120, 300) if s * scale >= 60), 600)
    return {
        "width": left + width + min(longest * LETTER, 360),
        "height": top,
        "end": left + width,
        "thumb": thumb,
        "axis": thumb + 22,
        "ticks": [(left + t * scale, t) for t in range(0, int(seconds) + 1, step)],
        "thumbnails": [(left + (j + 0.5) * width / len(thumbnails) - thumb / 2, i) for j, i in enumerate(thumbnails)],
        "tracks": placed,
    }


def _lanes(events: Sequence[tuple[float, Event]]) -> list[tuple[float, int, Event]]:
    """Each label (its x, the event) in the first lane in which it does not run into the label before it."""
    ends: list[float] = []
    placed = []
    for x, event in sorted(events, key=lambda item: item[0]):
        lane = next((i for i, end in enumerate(ends) if end <= x), len(ends))
        ends[lane : lane + 1] = [x + len(event["text"]) * LETTER + GAP]
        placed.append((x, lane, event))
    return placed


def _picture(frame: np.ndarray) -> str:
    """u8[S, S, 3] -> a PNG as a data URI."""
    from PIL import Image

    image = Image.fromarray(frame)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# --- kept tokens ------------------------------------------------------------------------------------------------------


def _mask(kept: np.ndarray, grid: tuple[int, int], cls: bool) -> dict[str, Any]:
    """One frame's kept tokens i32[k] on the grid: (row, column) of kept and of skipped cells, and whether CLS was."""
    chosen = {int(index) for index in kept}
    cells = {int(cls) + row * grid[1] + column: (row, column) for row in range(grid[0]) for column in range(grid[1])}
    return {
        "inside": [cell for index, cell in cells.items() if index in chosen],
        "outside": [cell for index, cell in cells.items() if index not in chosen],
        "cls": cls and 0 in chosen,
    }


def _heat(kept: np.ndarray, grid: tuple[int, int], cls: bool) -> list[tuple[int, int, float]]:
    """(row, column, share of the frames in which the cell's token was kept)."""
    counts = np.bincount(kept.ravel(), minlength=int(cls) + grid[0] * grid[1])[int(cls) :]
    shares = counts / max(1, len(kept))
    return [(i // grid[1], i % grid[1], float(share)) for i, share in enumerate(shares)]
