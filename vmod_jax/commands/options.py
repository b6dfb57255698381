"""Options that several commands share: which model streams, and how."""

import argparse
from typing import Any

from vmod_jax.compression.forms import CACHES
from vmod_jax.data.conversation import NARRATION_INSTRUCTION
from vmod_jax.errors import ArgumentParser, UserError, user_path
from vmod_jax.lm import LanguageModel, load


def add_session_arguments(parser: ArgumentParser, width: int) -> None:
    """Which model streams, and the options of its sessions; width: the default of --prefill."""
    parser.add_argument("--workdir", required=True, type=user_path, help="a trained or imported model")
    parser.add_argument("--instruction", default=NARRATION_INSTRUCTION, help="said at the first frame ('' for none)")
    parser.add_argument("--threshold", type=float, default=0.725, help="speak where P(stay silent) is below (0.725)")
    parser.add_argument("--max-frames", type=int, default=1200)
    parser.add_argument("--max-reply", type=int, default=64, help="tokens")
    parser.add_argument(
        "--prefill", type=int, default=width, metavar="M", help="frames computed in one call (%(default)s)"
    )
    parser.add_argument("--cache", choices=CACHES, help="form of keys and values (default: as the model is recorded)")
    parser.add_argument("--int8", action="store_true", help="decoder weights of 8 bits: half the memory to read")


def session_options(args: argparse.Namespace) -> dict[str, Any]:
    """{threshold, max_frames, max_reply, width} of `add_session_arguments`. Raises UserError."""
    if args.max_frames < 1 or args.prefill < 1 or args.max_reply < 1:
        raise UserError("--max-frames, --prefill and --max-reply must be at least 1")
    names = ("threshold", "max_frames", "max_reply")
    return {name: getattr(args, name) for name in names} | {"width": args.prefill}


def load_for_streams(args: argparse.Namespace) -> LanguageModel:
    """The model of `add_session_arguments` as streams run on it; what it is made of does not stay."""
    lm = load(args.workdir, **({"cache": args.cache} if args.cache else {}))
    return lm.int8 if args.int8 else lm.merged
