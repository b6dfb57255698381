"""`vmod routing`: what the LayerExperts of a trained model choose, in numbers and pictures.

On a split of the data that the model was trained on, or, with --video, on any file. The text around the frames is the
data's conversations; a file's frames come as one stream in which nothing is said.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vmod_jax import workdir as folder
from vmod_jax.data import video
from vmod_jax.errors import ArgumentParser, UserError, user_path
from vmod_jax.lm import LanguageModel, load
from vmod_jax.study import pictures
from vmod_jax.study.material import MAX_FRAMES, from_file, from_split
from vmod_jax.study.routing import choosing_layers, summarise, watch

OTHER = {"float32": "bfloat16", "bfloat16": "float32"}  # the precision that the choice is compared with


def study(
    workdir: str | Path, split: str | None = None, videos: int = 32, file: str | Path | None = None, out: Any = None
) -> dict[str, Any]:
    """Runs the model, writes routing.json and the pictures to `out` (default: WORKDIR/routing); -> the former.

    split: of the workdir's own data (default: its data.eval_split), whose first `videos` streams are watched; or file,
    a video file. Raises UserError where no layer of the model chooses tokens.
    """
    workdir = user_path(workdir)
    folder.read_model(workdir)  # is it a workdir at all?
    lm = load(workdir)
    choosing_layers(lm.config)  # does any? before videos are read
    material = from_file(lm, file) if file else from_split(lm, workdir, split, videos)
    c = lm.config
    streams = watch(lm, material.rows, f"watching in {c.dtype}")
    other = LanguageModel(dataclasses.replace(c, dtype=OTHER[c.dtype]), lm.params, lm.tokenizer)
    others = watch(other, material.rows, f"watching in {other.config.dtype}")
    model = {
        "tokens_per_frame": c.tokens_per_frame,
        **{name: getattr(c, name) for name in ("cls", "grid", "gate", "always_keep_last", "dtype")},
        "compared_with": other.config.dtype,
    }
    summary = summarise(
        streams, gate=c.gate, grid=c.grid, cls=c.cls, boxes=material.boxes, side=material.side, others=others
    )
    result = {**material.about, "model": model, **summary}

    out = user_path(out) if out else workdir / "routing"
    out.mkdir(parents=True, exist_ok=True)
    (out / "routing.json").write_text(json.dumps(result, indent=1) + "\n")
    frames, first = material.rows[0][1], streams[0]
    shown = frames if frames.ndim == 4 else pictures.blank(len(frames))
    kept = {layer: choice.kept for layer, choice in first.items()}
    rates = {layer: np.array(entry["keep_rate"]) for layer, entry in result["layers"].items()}
    overlap = result["overlap"]
    pictures.strip(out / "strip.png", shown, kept, grid=c.grid, cls=c.cls, fps=c.fps)
    pictures.positions(out / "positions.png", rates, grid=c.grid, cls=c.cls)
    pictures.overlaps(out / "overlap.png", overlap["layers"], np.array(overlap["mean"]), np.array(overlap["chance"]))
    pictures.heat_video(out / "stream.mp4", shown, first, grid=c.grid, cls=c.cls, fps=c.fps)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("vmod routing", description=__doc__)
    parser.add_argument("--workdir", required=True, type=user_path, help="a trained model")
    parser.add_argument("--split", choices=("train", "val", "test"), help="of its own data (default: data.eval_split)")
    parser.add_argument("--videos", type=int, default=32, metavar="N", help="streams to watch, at most (32)")
    parser.add_argument(
        "--video", type=user_path, metavar="FILE", help=f"watch this file instead, up to {MAX_FRAMES} frames of it"
    )
    parser.add_argument("--out", type=user_path, help="where everything goes (WORKDIR/routing)")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.videos < 1:
        raise UserError("--videos must be at least 1")
    if args.video:
        video.probe(args.video)  # a wrong file is found before the model is loaded
    result = study(args.workdir, args.split, args.videos, args.video, args.out)
    print_summary(result)
    out = args.out or args.workdir / "routing"
    print(f"wrote {out}: routing.json, strip.png, positions.png, overlap.png, stream.mp4")
    print(f"next: open {out}/strip.png and {out}/stream.mp4; the numbers of every cell are in {out}/routing.json")
    return 0


def print_summary(result: dict[str, Any]) -> None:
    """A row for each layer; what chance gives stands in brackets."""
    model, n = result["model"], result["model"]["tokens_per_frame"]
    other = model["compared_with"]
    print(f"{result['streams']} streams, {result['frames']} frames of {n} tokens; (chance)")
    columns: dict[str, list[str]] = {"layer": [], "kept": [], "CLS": [], "as the frame before": []}
    if boxed := "boxes" in next(iter(result["layers"].values())):
        columns |= {"objects hit": [], "cells on objects": []}
    columns |= {"gate": [], f"as in {other}": []}
    for layer, entry in result["layers"].items():
        chance = entry["chance"]
        cells = [
            str(layer),
            f"{entry['kept']} of {n}",
            beside(entry["keep_rate"][0], chance) if model["cls"] else "-",
            beside(entry["neighbour_overlap"], chance),
        ]
        if boxed:
            boxes = entry["boxes"]
            cells += [beside(boxes[name], boxes[f"{name}_chance"]) for name in ("hit_rate", "precision")]
        gate = entry["gate"]
        cells += [f"{gate['mean']:.2f} ± {gate['std']:.2f}", f"{entry['agreement']['same_tokens']:.3f}"]
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    for row in zip(*([name, *cells] for name, cells in columns.items()), strict=True):
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    if not boxed:
        print("no hit rates: these streams have no boxes.json")


def beside(value: float | None, chance: float) -> str:
    return "-" if value is None else f"{value:.2f} ({chance:.2f})"
