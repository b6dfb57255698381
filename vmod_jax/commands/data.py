"""`vmod data`: make the generated streams, or prepare a folder of narrated videos once, for every later run."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vmod_jax.data.pipeline import Videos
from vmod_jax.errors import ArgumentParser, UserError
from vmod_jax.weights.encoder import encoder

SPLITS = ("train", "val", "test")


def make_shapes(args: argparse.Namespace) -> None:
    """Generated videos with narrations, as .mp4 files."""
    from vmod_jax.data.sources import shapes

    made = shapes.generate(args.out, args.train, args.val, args.test, args.seed)
    print(f"wrote {args.out}: {', '.join(f'{value} {name}' for name, value in made.items())}")
    print(f"next: vmod data narration --root {args.out} --out PREPARED, or data.name=shapes data.root={args.out}")


def prepare_narration(args: argparse.Namespace) -> None:
    """A folder of videos and narrations.json -> array_record: pixels, or the features of an encoder."""
    from vmod_jax.data import storage
    from vmod_jax.data.sources.ego4d import narration_samples
    from vmod_jax.data.video import check_sampling

    root = Path(args.root)
    check_sampling(args.fps, args.image_size)
    videos = Videos(root, args.fps, args.image_size)
    meta: dict[str, object] = {"source": "narration"}
    encode: Callable[[np.ndarray], np.ndarray] = lambda frames: frames  # noqa: E731
    if args.encoder:
        encode, described = encoder(args.encoder, tuple(args.grid), not args.no_cls)
        videos = Videos(root, args.fps, int(described["image_size"]))
        meta |= described
    by_split = {
        split: samples
        for split in SPLITS
        if (samples := narration_samples(root / "narrations.json", videos, args.fps, split, args.allow_outside))
    }
    if not by_split:
        raise UserError(f"{root}: no narrated stream was found; are the videos named like the keys of narrations.json?")
    names = {sample.video for samples in by_split.values() for sample in samples}
    storage.prepare(by_split, lambda name: encode(videos.frames(name)), args.fps, Path(args.out), meta)
    counts = ", ".join(f"{len(samples)} {split}" for split, samples in by_split.items())
    print(f"wrote {args.out}: {counts} streams of {len(names)} videos")
    print(f"next: vmod train --config ... --config.data.name=prepared --config.data.path={args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("vmod data", description=__doc__)
    kinds = parser.add_subparsers(dest="name", required=True)
    shapes = kinds.add_parser("shapes", help=make_shapes.__doc__)
    shapes.add_argument("--out", required=True, type=Path)
    for split, count in zip(SPLITS, (256, 32, 8), strict=True):
        shapes.add_argument(f"--{split}", type=int, default=count, help="videos")
    shapes.add_argument("--seed", type=int, default=0)
    narration = kinds.add_parser("narration", help=prepare_narration.__doc__)
    narration.add_argument("--root", required=True, help="folder of videos with narrations.json")
    narration.add_argument("--out", required=True)
    narration.add_argument("--fps", type=float, default=2.0)
    narration.add_argument("--image-size", type=int, default=384, help="of stored pixels")
    narration.add_argument(
        "--encoder", help="Hugging Face folder of a SigLIP or CLIP tower: store features, not pixels"
    )
    narration.add_argument("--grid", type=int, nargs=2, default=(3, 3), metavar=("H", "W"), help="pooled patches")
    narration.add_argument("--no-cls", action="store_true", help="leave out the CLS token")
    narration.add_argument(
        "--allow-outside", action="store_true", help="take narrations outside their video to its ends, however many"
    )
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    {"shapes": make_shapes, "narration": prepare_narration}[args.name](args)
    return 0
