"""`vmod evaluate`: score a workdir's checkpoint on a benchmark, beside answers that see no video.

The default benchmark, `narration`, is the paper's streaming evaluation (section 4.1): on each stream of a held-out
split, does the model speak at the right frame, and does it say the right thing? A run that was killed goes on with what
it has predicted.
"""

import sys
from collections.abc import Sequence

from vmod_jax.errors import ArgumentParser, UserError, user_path
from vmod_jax.evaluation.benchmarks import BENCHMARKS, evaluate, print_scores
from vmod_jax.training.flags import parse


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("vmod evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, type=user_path, help="a trained or imported model")
    parser.add_argument("--config", help="a file of configs/ whose data to score on (default: the workdir's own)")
    parser.add_argument("--benchmark", default="narration", help=f"one of {', '.join(BENCHMARKS)}")
    parser.add_argument("--root", type=user_path, help="the data set's folder (default: data.root)")
    parser.add_argument(
        "--split", choices=("train", "val", "test"), help="default: the benchmark's, or data.eval_split"
    )
    parser.add_argument("--threshold", type=float, default=0.0, help="speak where P(silent) is below; 0: argmax alone")
    parser.add_argument("--limit", type=int, help="score on the first so many videos only")
    parser.add_argument("--step", type=int, help="checkpoint (default: the last)")
    shown = parser.add_argument_group("of benchmarks that ask questions")
    shown.add_argument("--frames", type=int, help="of a video, at most (default: 64)")
    shown.add_argument("--context", type=float, help="seconds of a stream before its question (default: all)")
    shown.add_argument("--grid", help="of a frame, such as 24x24 (default: the model's)")
    shown.add_argument("--by", choices=("text", "likelihood"), help="how options are chosen (default: text)")
    shown.add_argument("--missing", choices=("refuse", "skip"), help="images and videos; skipped ones are scored wrong")
    shown.add_argument("--judge", metavar="URL", help="of open answers: an endpoint of OpenAI's chat completions")
    shown.add_argument("--judge-model", help="the model behind it")
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if rest and not args.config:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    config = parse(["--config", args.config, *rest, "--workdir", str(args.workdir)])[0] if args.config else None
    names = ("frames", "context", "by", "missing", "judge", "judge_model")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.grid:
        options["grid"] = parse_grid(args.grid)
    result = evaluate(
        args.workdir, config, args.benchmark, args.split, args.threshold, args.step, args.root, args.limit, **options
    )
    print_scores(result)
    print(f"wrote {args.workdir / 'eval' / args.benchmark}.json")
    return 0


def parse_grid(text: str) -> tuple[int, int]:
    """ "24x24" -> (24, 24)."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise UserError(f"--grid {text}: give patches down and across, such as 24x24")
    return int(height), int(width)
