"""`vmod stream VIDEO`: watch a video file as if it were live, and print what the model says when it says it."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from vmod_jax.data import video
from vmod_jax.data.conversation import NARRATION_INSTRUCTION
from vmod_jax.errors import ArgumentParser, UserError
from vmod_jax.lm import LanguageModel, load
from vmod_jax.streaming.session import Turn


class Streamed(NamedTuple):
    """What came of a stream. frames: u8[F, S, S, 3], only where they were asked for."""

    turns: list[Turn]
    summary: dict[str, Any]
    frames: np.ndarray | None
    input_ids: list[int]


def stream_video(
    lm: LanguageModel,
    path: str | Path,
    *,
    instruction: str = NARRATION_INSTRUCTION,
    questions: Sequence[tuple[float, str]] = (),
    threshold: float = 0.725,
    max_frames: int = 1200,
    max_reply: int = 64,
    width: int = 1,
    allow_partial: bool = False,
    say: Callable[[Turn], None] = lambda turn: None,
    note: Callable[[str], None] = lambda line: None,
    keep_frames: bool = False,
    progress: bool = False,
) -> Streamed:
    """Streams a video file through the model.

    instruction: what the model is told at the first frame ("": nothing); questions: (seconds, text); width: frames
    computed in one call; say: called with every turn as it happens; note: called with announcements.
    -> the turns, and {frames, fps, first_reply_seconds, cache_bytes}. A stream that reaches max_frames ends there, with
    a note. Raises UserError for a file that cannot be decoded, and for a model without a vision tower.
    """
    fps, size = lm.config.fps, lm.image_size
    probed = video.probe(path)
    session = lm.stream(threshold, max_frames=max_frames, max_reply=max_reply, width=width, announce=note)
    if instruction:
        session.ask(instruction, 0.0)
    for at, text in sorted(questions):
        session.ask(text, max(0.0, at))
    total = int(probed.duration * fps) + 1 if probed.duration else None
    kept: list[np.ndarray] = []
    said, first_reply, began = 0, None, time.perf_counter()

    def show(frames: list[np.ndarray]) -> None:
        session.push_many(frames)
        report()

    def report() -> None:
        nonlocal said, first_reply
        for turn in session.turns[said:]:
            if first_reply is None and turn.role == "assistant":
                first_reply = time.perf_counter() - began
            say(turn)
        said = len(session.turns)

    queue: list[np.ndarray] = []
    with tqdm(total=total, unit="frame", desc=Path(path).name, disable=not progress, leave=False) as bar:
        for _, frame in video.decode(path, fps, size, allow_partial=allow_partial):
            if session.frames + len(queue) == max_frames:
                note(
                    f"the stream ends at max_frames = {max_frames} frames ({max_frames / fps:.0f} s): "
                    "give a larger --max-frames to see more"
                )
                break
            queue.append(frame)
            if keep_frames:
                kept.append(frame)
            if len(queue) == width:
                show(queue)
                queue = []
            bar.update()
        if queue:
            show(queue)
    session.finish()
    report()
    seconds = time.perf_counter() - began
    summary = {
        "frames": session.frames,
        "fps": session.frames / seconds,
        "first_reply_seconds": first_reply,
        "cache_bytes": session.cache_bytes,
    }
    return Streamed(session.turns, summary, np.stack(kept) if kept else None, session.engine.input_ids)


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


def add_session_arguments(parser: ArgumentParser, width: int) -> None:
    """Which model streams, and the options of its sessions; width: the default of --prefill."""
    parser.add_argument("--workdir", required=True, help="a trained or imported model")
    parser.add_argument("--instruction", default=NARRATION_INSTRUCTION, help="said at the first frame ('' for none)")
    parser.add_argument("--threshold", type=float, default=0.725, help="speak where P(stay silent) is below (0.725)")
    parser.add_argument("--max-frames", type=int, default=1200)
    parser.add_argument("--max-reply", type=int, default=64, help="tokens")
    parser.add_argument(
        "--prefill", type=int, default=width, metavar="M", help="frames computed in one call (%(default)s)"
    )
    parser.add_argument("--int8", action="store_true", help="decoder weights of 8 bits: half the memory to read")


def session_options(args: argparse.Namespace) -> dict[str, Any]:
    """{threshold, max_frames, max_reply, width} of `add_session_arguments`. Raises UserError."""
    if args.max_frames < 1 or args.prefill < 1 or args.max_reply < 1:
        raise UserError("--max-frames, --prefill and --max-reply must be at least 1")
    names = ("threshold", "max_frames", "max_reply")
    return {name: getattr(args, name) for name in names} | {"width": args.prefill}


def load_for_streams(args: argparse.Namespace) -> LanguageModel:
    """The model of `add_session_arguments` as streams run on it; what it is made of does not stay."""
    lm = load(args.workdir)
    return lm.int8 if args.int8 else lm.merged


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("vmod stream", description=__doc__)
    parser.add_argument("video")
    add_session_arguments(parser, width=1)
    parser.add_argument("--ask", action="append", default=[], metavar="TIME:TEXT", help="ask at TIME seconds")
    parser.add_argument("--allow-partial", action="store_true", help="use what decodes of a damaged file")
    parser.add_argument("--jsonl", metavar="F", help="write one JSON object a line: turns, then a summary")
    args = parser.parse_args(argv)
    questions = [question(text) for text in args.ask]
    options = session_options(args)
    video.probe(args.video)  # a wrong file is found before the model is loaded
    if args.jsonl and not Path(args.jsonl).absolute().parent.is_dir():
        raise UserError(f"--jsonl {args.jsonl}: no folder {Path(args.jsonl).parent}; make it first")
    lm = load_for_streams(args)
    out = open(args.jsonl, "w") if args.jsonl else None  # noqa: SIM115

    def say(turn: Turn) -> None:
        who = "you" if turn.role == "user" else "vmod"
        tqdm.write(f"{turn.time:8.1f} s  {who:>4}: {turn.text}")
        if out:
            out.write(json.dumps(turn._asdict()) + "\n")
            out.flush()

    try:
        streamed = stream_video(
            lm, args.video, instruction=args.instruction, questions=questions, **options,
            allow_partial=args.allow_partial, say=say,
            note=lambda line: tqdm.write(line, file=sys.stderr), progress=sys.stderr.isatty(),
        )  # fmt: skip
        if out:
            out.write(json.dumps({"summary": streamed.summary, **streamed.summary}) + "\n")
    finally:
        if out:
            out.close()
    s = streamed.summary
    first = "no reply" if s["first_reply_seconds"] is None else f"first reply after {s['first_reply_seconds']:.2f} s"
    print(f"{s['frames']} frames, {s['fps']:.1f} a second; {first}; cache {s['cache_bytes'] / 2**20:.2f} MiB")
    if args.jsonl:
        print(f"wrote {args.jsonl}")
    return 0
