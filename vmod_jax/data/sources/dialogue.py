"""Conversations with times: any videos with dialogues of one's own, and GoalStep's live chats.

    dialogues.json (a list) or .jsonl   {"video": name, "start": 0, "end": s, "conversation": [
                                            {"role": "system" | "user" | "assistant", "content", "time", "learn":
                                            true}]}
    goalstep_livechat_*.json            [{"video_uid", "duration", "conversation": [{"role", "content", "time"}]}]

Times are seconds of the video, in ascending order; "start" (0), "end" (the video's) and "learn" (true) may be left out,
and a system message, which comes first, has no time. A user is heard at the frame before his time, a reply comes at the
frame after its own. Of turns at the same time, a reply answers a question at once and replaces a reply; a question
after a reply ends the conversation there, as does a time that lies before the last one's or beyond the end.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmod_jax.data.conversation import Sample
from vmod_jax.data.sources.annotations import NUMBER, get, records
from vmod_jax.errors import UserError, short

WAIT = 20  # frames, at most, that a live chat shows before its first question


class Turn(NamedTuple):
    role: str  # "user" or "assistant"
    content: str
    time: float  # seconds
    learn: bool = True


def dialogue_samples(
    file: str | Path, durations: Mapping[str, float], fps: float, split: str = "train"
) -> Iterator[Sample]:
    """One sample a record of a file of one's own, of the videos that `durations` (seconds) knows.

    The stream begins at the record's "start". A record may say its "split" (train, val, test; default: train).
    Raises UserError naming record or line, video and key for what is missing or of the wrong kind.
    """
    for where, record in records(Path(file)):
        video = get(
            record, "video" if "video" in (record if isinstance(record, dict) else ()) else "video_uid", str, where
        )
        where = f"{where}, video {video}"
        if record.get("split", "train") != split or video not in durations:
            continue
        start = get(record, "start", NUMBER, where) if "start" in record else 0.0
        end = get(record, "end", NUMBER, where) if "end" in record else math.inf
        given = get(record, "conversation", list, where)
        system = given[:1] if given and isinstance(given[0], dict) and given[0].get("role") == "system" else []
        turns = _turns(given[len(system) :], where)
        for turn in turns[:1]:
            if turn.time < start:
                raise UserError(f"{where}: its first turn is at {turn.time:g} s, before its 'start' at {start:g}")
        first = math.ceil(start * fps - 1e-9)
        messages, last = timed(turns, first - 1, min(end, durations[video]), fps)
        if messages:
            before = [{"role": "system", "content": get(message, "content", str, where)} for message in system]
            yield Sample(before + messages, video, first, last + 1)


def live_chat_samples(
    file: str | Path, durations: Mapping[str, float], fps: float, split: str = "train", seed: int = 0
) -> Iterator[Sample]:
    """GoalStep's live chats; they come without a held-out split, so that all of them are "train".

    Before the first question stand up to 20 frames, how many is drawn by (seed, video). A chat that does not begin with
    a question inside its video is left out.
    """
    for where, record in records(Path(file)) if split == "train" else ():
        video = get(record, "video_uid", str, where)
        where = f"{where}, video {video}"
        if video not in durations:
            continue
        duration = min(get(record, "duration", NUMBER, where), durations[video])
        turns = _turns(get(record, "conversation", list, where), where)
        if not turns or turns[0].role != "user" or not turns[0].content or not 0 < turns[0].time <= duration:
            continue
        asked = math.floor(turns[0].time * fps + 1e-9)
        rng = np.random.default_rng([seed, zlib.crc32(f"{where} {turns[0].time}".encode())])
        wait = int(rng.integers(0, min(WAIT, asked) + 1))
        messages, last = timed(turns, asked - wait, duration, fps)
        yield Sample(messages, video, asked - wait + 1, last + 1)


def timed(turns: Sequence[Turn], last: int, end: float, fps: float) -> tuple[list[dict[str, Any]], int]:
    """The turns with the frames that pass between them: (messages, the last frame shown).

    last: the frame before the first that is shown; end: seconds, up to which turns count. Frames are learned up to the
    one after which the assistant speaks; that at which a user does is not.
    """
    messages: list[dict[str, Any]] = []
    final, before = math.floor(end * fps + 1e-9), None
    for turn in turns:
        speaks = turn.role == "assistant"
        place = math.ceil(turn.time * fps - 1e-9) if speaks else math.floor(turn.time * fps + 1e-9)
        frame = min(max(place, last), final)
        if turn.time > end or (before and (turn.time < before.time or (turn.time == before.time and not speaks))):
            break
        if before and before.role == "assistant" and speaks and frame == last:
            messages[-1] |= {"content": turn.content, "learn": turn.learn}
        else:
            if (shown := frame - last) > 0:
                learn = True if speaks and turn.learn else shown - 1
                messages.append({"role": "stream", "num_frames": shown, "learn": learn})
            learn_it = {"learn": turn.learn} if speaks else {}
            messages.append({"role": turn.role, "content": turn.content} | learn_it)
        last, before = max(frame, last), turn
    return messages, last


def _turns(given: list, where: str) -> list[Turn]:
    turns = []
    for number, turn in enumerate(given):
        here = f"{where}: turn {number}"
        role = get(turn, "role", str, here)
        if role not in ("user", "assistant"):
            raise UserError(f"{here}: 'role' is {short(role)}, not user or assistant")
        learn = get(turn, "learn", bool, here) if "learn" in turn else True
        content = " ".join(get(turn, "content", str, here).split())
        turns.append(Turn(role, content, float(get(turn, "time", NUMBER, here)), learn))
    return turns
