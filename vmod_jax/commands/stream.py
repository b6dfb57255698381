"""`vmod stream VIDEO`: watch a video file as if it were live, and print what the model says when it says it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vmod_jax.commands.options import add_session_arguments, load_for_streams, session_options
from vmod_jax.data import video
from vmod_jax.errors import ArgumentParser, UserError, user_path
from vmod_jax.streaming.session import Turn
from vmod_jax.streaming.watch import stream_video


def question(text: str) -> tuple[float, str]:
    """ "TIME:TEXT" -> (seconds, text)."""
    at, colon, words = text.partition(":")
    try:
        seconds = float(at)
    except ValueError:
        seconds = -1.0
    if not colon or not words.strip() or not 0 <= seconds < float("inf"):
        raise UserError(f"--ask '{text}' is not TIME:TEXT: write for instance --ask '12.5:What is happening?'")
    return seconds, words.strip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("vmod stream", description=__doc__)
    parser.add_argument("video", type=user_path)
    add_session_arguments(parser, width=1)
    parser.add_argument("--ask", action="append", default=[], metavar="TIME:TEXT", help="ask at TIME seconds")
    parser.add_argument("--allow-partial", action="store_true", help="use what decodes of a damaged file")
    parser.add_argument(
        "--jsonl", type=user_path, metavar="F", help="write one JSON object a line: turns, then a summary"
    )
    args = parser.parse_args(argv)
    questions = [question(text) for text in args.ask]
    options = session_options(args)
    video.probe(args.video)  # a wrong file is found before the model is loaded
    if args.jsonl and not Path(args.jsonl).absolute().parent.is_dir():
        raise UserError(f"--jsonl {args.jsonl}: no folder {Path(args.jsonl).parent}; make it first")
    lm = load_for_streams(args)
    out = open(args.jsonl, "wb", buffering=0) if args.jsonl else None  # noqa: SIM115

    def write(value: dict[str, Any]) -> None:
        line = json.dumps(value).encode() + b"\n" if out else b""
        try:
            while out and line:  # at once; of a line that does not fit a part may be taken
                line = line[out.write(line) :]
        except OSError as error:
            raise UserError(
                f"--jsonl {args.jsonl}: cannot be written ({error.strerror}); name a file on a disk that has room"
            ) from None

    def say(turn: Turn) -> None:
        who = "you" if turn.role == "user" else "vmod"
        tqdm.write(f"{turn.time:8.1f} s  {who:>4}: {turn.text}")
        write(turn._asdict())

    try:
        streamed = stream_video(
            lm, args.video, instruction=args.instruction, questions=questions, **options,
            allow_partial=args.allow_partial, say=say,
            note=lambda line: tqdm.write(line, file=sys.stderr), progress=sys.stderr.isatty(),
        )  # fmt: skip
        write({"summary": streamed.summary, **streamed.summary})
    finally:
        if out:
            out.close()
    s = streamed.summary
    first = "no reply" if s["first_reply_seconds"] is None else f"first reply after {s['first_reply_seconds']:.2f} s"
    print(f"{s['frames']} frames, {s['fps']:.1f} a second; {first}; cache {s['cache_bytes'] / 2**20:.2f} MiB")
    if args.jsonl:
        print(f"wrote {args.jsonl}")
    return 0
