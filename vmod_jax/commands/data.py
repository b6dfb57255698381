"""`vmod data`: make the generated streams, or decode and encode videos once, for every later run.

`vmod data features` takes every video below a folder, whatever data set it is of; a source of data/sources/table.py
then finds its frames there (data.features). Run again it goes on; on machines that share the folder, run it on each.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vmod_jax.data.streams import Videos
from vmod_jax.errors import ArgumentParser, UserError, user_path
from vmod_jax.weights.encoder import encoder

SPLITS = ("train", "val", "test")


def make_shapes(args: argparse.Namespace) -> None:
    """Generated videos with narrations, as .mp4 files."""
    from vmod_jax.data.sources import shapes

    made = shapes.generate(args.out, args.train, args.val, args.test, args.seed)
    print(f"wrote {args.out}: {', '.join(f'{value} {name}' for name, value in made.items())}")
    print(f"next: vmod data narration --root {args.out} --out PREPARED, or data.name=shapes data.root={args.out}")


def make_steps(args: argparse.Namespace) -> None:
    """Generated videos of steps, with annotation files in the schema of COIN, Ego4D or Ego-Exo4D."""
    from vmod_jax.data.sources import shape_steps

    made = shape_steps.generate(args.out, args.schema, args.train, args.test, args.seed)
    print(f"wrote {args.out}: {made} videos in the schema '{args.schema}'")
    print(f"next: vmod data features {args.out} --image-size 24 --out FEATURES; configs/steps.py says how it goes on")


def make_image_qa(args: argparse.Namespace) -> None:
    """Generated pictures and questions about them, in the files of LLaVA, POPE, GQA and MME."""
    from vmod_jax.data.sources import image_qa

    made = image_qa.generate(args.out, args.train, args.test, args.seed)
    print(f"wrote {args.out}: questions: {', '.join(f'{value} {name}' for name, value in made.items())}")
    print(f"next: vmod train --config configs/image_qa.py --config.data.root={args.out} --workdir runs/image_qa")


def prepare_narration(args: argparse.Namespace) -> None:
    """A folder of videos and narrations.json -> array_record: pixels, or the features of an encoder."""
    from vmod_jax.data import storage
    from vmod_jax.data.sources.ego4d import narration_samples
    from vmod_jax.data.video import check_sampling

    root = args.root
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
    storage.prepare(by_split, lambda name: encode(videos.frames(name)), args.fps, args.out, meta)
    counts = ", ".join(f"{len(samples)} {split}" for split, samples in by_split.items())
    print(f"wrote {args.out}: {counts} streams of {len(names)} videos")
    print(f"next: vmod train --config ... --config.data.name=prepared --config.data.path={args.out}")


def write_features(args: argparse.Namespace) -> None:
    """Every video below a folder -> frames at 2 a second, or an encoder's features of them, as array_record; .pt
    features of VideoLLM-online are taken over."""
    from vmod_jax.data import features
    from vmod_jax.data.sources.table import split_videos

    # --- what is to be written ----------------------------------------------------------------------------------------
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: give at least 1")
    about: dict[str, object] = {}
    make = functools.partial(_encoder, args.encoder, tuple(args.grid), not args.no_cls)
    size, encode, frame_bytes = args.image_size, None, 3 * args.image_size**2
    if args.encoder:
        encode, about = encoder(args.encoder, tuple(args.grid), not args.no_cls)
        about["grid"] = list(args.grid)
        size = int(str(about["image_size"]))
        frame_bytes = encode(np.zeros((1, size, size, 3), np.uint8)).nbytes
    only = split_videos(args.annotations or args.root, args.subset) if args.subset else None
    plan = features.make_plan(args.root, args.out, args.fps, size, about, frame_bytes, only)

    # --- how long it will take ----------------------------------------------------------------------------------------
    before = features.estimate(plan, args.out, encode, args.workers)
    print(
        f"{before.videos} videos, {before.hours:.2f} hours, {plan.frames} frames in {len(plan.shards)} shards: about "
        f"{before.bytes / 2**30:.2f} GiB ({before.free / 2**30:.0f} free) and {before.seconds / 3600:.2f} hours to go"
    )
    if before.bytes > before.free:
        raise UserError(f"{args.out}: about {before.bytes / 2**30:.1f} GiB are needed, the disk has less")

    # --- writing ------------------------------------------------------------------------------------------------------
    meta = features.write(plan, args.out, make, args.workers, args.beam or ())
    print(f"wrote {args.out}: {meta['frames']} frames of {meta['videos']} videos, {meta['kind']} {meta['frame']}")
    if meta["quarantined"]:
        print(f"{meta['quarantined']} videos could not be read: {args.out / 'quarantine.json'} says why")
    print(f"next: vmod train --config ... --config.data.features={args.out}")


def _encoder(folder: Path | None, grid: tuple[int, int], cls: bool) -> Callable[[np.ndarray], np.ndarray] | None:
    """In a worker: the encoder, or None for pixels."""
    return encoder(folder, grid, cls)[0] if folder else None


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Which frames are stored, and as what."""
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--image-size", type=int, default=384, help="of stored pixels")
    parser.add_argument(
        "--encoder", type=user_path, help="Hugging Face folder of a SigLIP or CLIP tower: store features, not pixels"
    )
    parser.add_argument("--grid", type=int, nargs=2, default=(3, 3), metavar=("H", "W"), help="pooled patches")
    parser.add_argument("--no-cls", action="store_true", help="leave out the CLS token")


COMMANDS = {
    "shapes": make_shapes,
    "image-qa": make_image_qa,
    "steps": make_steps,
    "narration": prepare_narration,
    "features": write_features,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("vmod data", description=__doc__)
    kinds = parser.add_subparsers(dest="name", required=True)
    shapes = kinds.add_parser("shapes", help=make_shapes.__doc__)
    shapes.add_argument("--out", required=True, type=user_path)
    for split, count in zip(SPLITS, (256, 32, 8), strict=True):
        shapes.add_argument(f"--{split}", type=int, default=count, help="videos")
    shapes.add_argument("--seed", type=int, default=0)
    steps = kinds.add_parser("steps", help=make_steps.__doc__)
    steps.add_argument("--schema", required=True, help="coin, lta, egoexo4d, narration or dialogue")
    steps.add_argument("--out", required=True, type=user_path)
    steps.add_argument("--train", type=int, default=256, help="videos")
    steps.add_argument("--test", type=int, default=32, help="videos")
    steps.add_argument("--seed", type=int, default=0)
    image_qa = kinds.add_parser("image-qa", help=make_image_qa.__doc__)
    image_qa.add_argument("--out", required=True, type=user_path)
    image_qa.add_argument("--train", type=int, default=4000, help="images")
    image_qa.add_argument("--test", type=int, default=100, help="images")
    image_qa.add_argument("--seed", type=int, default=0)
    narration = kinds.add_parser("narration", help=prepare_narration.__doc__)
    narration.add_argument("--root", required=True, type=user_path, help="folder of videos with narrations.json")
    narration.add_argument("--out", required=True, type=user_path)
    add_encoder_arguments(narration)
    narration.add_argument(
        "--allow-outside", action="store_true", help="take narrations outside their video to its ends, however many"
    )
    features = kinds.add_parser("features", help=write_features.__doc__)
    features.add_argument("root", type=user_path, help="folder of videos, or of .pt features, in it or below it")
    features.add_argument("--out", required=True, type=user_path)
    features.add_argument("--workers", type=int, default=1, help="processes of this machine")
    features.add_argument("--subset", type=int, metavar="N", help="of each split N videos only")
    features.add_argument("--annotations", type=user_path, help="for --subset: the data set's folder (default: ROOT)")
    features.add_argument(
        "--beam", nargs=argparse.REMAINDER, help="last: options of an Apache Beam pipeline, which writes"
    )
    add_encoder_arguments(features)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    COMMANDS[args.name](args)
    return 0
