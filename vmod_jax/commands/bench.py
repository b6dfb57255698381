"""`vmod bench NAME`: how fast and in how much memory, each printed as a table and written as one JSON object."""

import importlib
from collections.abc import Sequence
from typing import NamedTuple

from vmod_jax.errors import ArgumentParser, user_path
from vmod_jax.performance.harness import Rows


class Measurement(NamedTuple):
    """A module of `vmod_jax`, imported only when it is called: `add_arguments(parser)` and `run(args, rows)`.

    `run` adds each row as soon as it is measured, prints its table and returns what else belongs in the object.
    """

    module: str
    about: str


MEASUREMENTS = {
    "train-step": Measurement("train_step", "a training step: MoD, full and PyTorch in turn"),
    "attention": Measurement("attention", "attention by back end, beside the reference and PyTorch"),
    "routing": Measurement("routing", "routing alone as a share of a routed layer's time"),
    "stream": Measurement("stream", "seconds a frame of a stream: MoD, full, int8 and PyTorch in turn"),
    "decode-video": Measurement("decode_video", "the video reader beside plain decoding"),
    "aot": Measurement("aot", "full-size steps compiled for TPUs and GPUs that are not here: memory, collectives"),
    "device": Measurement("device", "all of these on a borrowed device, in order of worth, within some minutes"),
    "flops": Measurement("flops", "the paper's FLOPs column for any model and policy"),
    "summary": Measurement("summary", "a markdown table of results that --json has written"),
}


def main(argv: Sequence[str]) -> None:
    """`vmod bench NAME [--json F] [--quick]` and its own options. Raises UserError."""
    parser = ArgumentParser("vmod bench", description="Measures and prints its table.")
    measurements = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, measurement in MEASUREMENTS.items():
        options = measurements.add_parser(name, help=measurement.about, description=measurement.about)
        options.add_argument("--json", type=user_path, metavar="F", help="write the results to this file")
        options.add_argument("--quick", action="store_true", help="end within ten minutes on two cores")
        if name in argv[:1]:
            importlib.import_module(f"vmod_jax.performance.{measurement.module}").add_arguments(options)
    args = parser.parse_args(argv)
    rows = Rows(args.json)
    more = importlib.import_module(f"vmod_jax.performance.{MEASUREMENTS[args.name].module}").run(args, rows)
    if args.json is not None:
        rows.write(more)
        print(f"wrote {args.json}")
