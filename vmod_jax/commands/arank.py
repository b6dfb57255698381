"""`vmod arank`: which layers to route, by the rank of their attention maps (gamma-MoD, arXiv 2410.13859)."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vmod_jax import workdir as folder
from vmod_jax.data.batch import collate, fit, make_row
from vmod_jax.data.conversation import num_frames
from vmod_jax.data.pipeline import make_buckets, open_streams
from vmod_jax.errors import ArgumentParser, UserError, user_path
from vmod_jax.lm import load
from vmod_jax.study.arank import attention_ranks, ranked_layers
from vmod_jax.training import config as configuration
from vmod_jax.training.flags import parse


def arank(
    workdir: str | Path,
    config: Any = None,
    split: str = "train",
    videos: int = 8,
    max_frames: int = 120,
    count: int | None = None,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Measures the ranks on the first `videos` streams of a split and writes WORKDIR/arank.json; -> what it holds.

    config: whose `data` section says on what (default: the workdir's own); max_frames: where streams are cut, at a
    whole message; count: layers to route (default: half); tolerance: as for `attention_ranks`.
    """
    workdir = user_path(workdir)
    layers = folder.read_model(workdir).llama.num_hidden_layers
    count = layers // 2 if count is None else count
    ranked_layers([0] * layers, count)  # a wrong count is found before the model is loaded
    if config is None:
        stored = folder.read_config(workdir)
        if stored is None:
            raise UserError(f"{workdir} has no config.json (it was imported): say what to measure on with --config")
        config = ConfigDict(stored)
    data = configuration.complete(config).data
    lm = load(workdir)
    streams = open_streams(data, split, lm.config.vision.image_size if lm.config.vision else 0)
    streams = streams._replace(samples=[streams.samples[i] for i in range(min(videos, len(streams.samples)))])
    buckets = make_buckets((), streams, lm.fmt, max_frames)
    rows = []
    for sample in streams.samples:
        encoded, _ = fit(sample.conversation, lm.fmt, buckets, max_frames=max_frames)
        stop = sample.start + num_frames(encoded.conversation)
        rows.append(make_row(encoded, streams.frames(sample._replace(stop=stop)), lm.fmt))
    batch = collate(rows, buckets, lm.config.tokens_per_frame)
    ranks = attention_ranks(lm, batch["input_ids"], batch["frames"], batch["length"], tolerance)
    result = {
        "ranks": ranks.tolist(),
        "routed_layers": ranked_layers(ranks, count),
        "tokens": float(batch["length"].mean()),
        "videos": len(rows),
        "split": split,
        "tolerance": tolerance,
    }
    (workdir / "arank.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("vmod arank", description=__doc__)
    parser.add_argument("--workdir", required=True, type=user_path, help="a trained or imported model")
    parser.add_argument("--config", help="a file of configs/ whose data to measure on (default: the workdir's own)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train")
    parser.add_argument("--videos", type=int, default=8, metavar="N", help="streams to measure on, at most (8)")
    parser.add_argument("--frames", type=int, default=120, metavar="F", help="streams are cut there (120)")
    parser.add_argument("--count", type=int, metavar="M", help="layers to route (default: half of them)")
    parser.add_argument("--tolerance", type=float, help="singular values count from this share of a map's largest")
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if rest and not args.config:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if min(args.videos, args.frames) < 1:
        parser.error("--videos and --frames must be at least 1")
    config = parse(["--config", args.config, *rest, "--workdir", str(args.workdir)])[0] if args.config else None
    result = arank(args.workdir, config, args.split, args.videos, args.frames, args.count, args.tolerance)
    print(f"{result['videos']} streams of {result['tokens']:.0f} tokens on average")
    for layer, rank in enumerate(result["ranks"]):
        print(f"layer {layer:>3}  rank {rank:8.1f}" + "  routed" * (layer in result["routed_layers"]))
    if len(set(result["ranks"])) == 1:
        print("all layers have the same rank: nothing to choose by; give a larger --tolerance, such as 0.001")
    print(f"--config.policy=explicit --config.model.routed_layers='{result['routed_layers']}'")
    print(f"wrote {args.workdir / 'arank.json'}")
    return 0
