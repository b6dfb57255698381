"""Watches a video file as if it were live."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from vmod_jax.data import video
from vmod_jax.data.conversation import NARRATION_INSTRUCTION
from vmod_jax.errors import user_path
from vmod_jax.streaming.session import Turn

if TYPE_CHECKING:
    from vmod_jax.lm import LanguageModel


class Streamed(NamedTuple):
    """What came of a stream. frames: u8[F, S, S, 3], only where they were asked for."""

    turns: list[Turn]
    summary: dict[str, Any]
    frames: np.ndarray | None
    input_ids: list[int]


def stream_video(
    lm: "LanguageModel",
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
    path, fps, size = user_path(path), lm.config.fps, lm.image_size
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
    with tqdm(total=total, unit="frame", desc=path.name, disable=not progress, leave=False) as bar:
        for _, frame in video.decode(path, fps, size, allow_partial=allow_partial, note=note):
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
