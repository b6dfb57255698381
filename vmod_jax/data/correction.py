"""Replies that went wrong, put into training conversations, against a model that copies what it said last."""

from typing import Any

import numpy as np

SORRY = "(Sorry, the last response is wrong) "


def corrected(conversation: list[dict], rng: np.random.Generator) -> list[dict]:
    """The conversation with one learned reply, not the last, gone wrong; without a second learned reply, as it is.

    The reply becomes another turn's text, an empty one, or is not there at all; what is said instead is not learned.
    Half of the time the reply after the next frame puts it right, otherwise the frames that follow are not learned.
    """
    learned = [i for i, m in enumerate(conversation) if m["role"] == "assistant" and m.get("learn")]
    if len(learned) < 2:
        return conversation
    at = int(rng.choice(learned[:-1]))
    true = conversation[at]["content"]
    others = sorted({m["content"] for m in conversation if m["role"] == "assistant"} - {true, ""})
    said = [*others, "", None][rng.integers(len(others) + 2)]
    mends = bool(rng.integers(2))
    before, after = conversation[:at], conversation[at + 1 :]
    if said is not None:
        before = [*before, {"role": "assistant", "content": said, "learn": False}]
    if not after or after[0]["role"] != "stream":
        return before + after
    stream, rest = after[0], after[1:]
    if not (mends and stream["num_frames"] > 1):
        return _joined(before, {**stream, "learn": False}) + rest
    mended = _joined(before, {**stream, "num_frames": 1, "learn": True})
    mended.append({"role": "assistant", "content": SORRY + true, "learn": True})
    return [*mended, {**stream, "num_frames": stream["num_frames"] - 1, "learn": _less(stream["learn"])}, *rest]


def _less(learn: Any) -> Any:
    """What is still learned of a stream after its first frame."""
    return learn if isinstance(learn, bool) else max(learn - 1, 0)


def _joined(before: list[dict], stream: dict) -> list[dict]:
    """`before` and the stream, as one where nothing was said between two: it would have spoken after the first's last
    frame, which is therefore not learned, nor is anything after it."""
    if not before or before[-1]["role"] != "stream":
        return [*before, stream]
    first = before[-1]
    learn = first["learn"]
    known = first["num_frames"] - 1 if learn is True else min(int(learn), first["num_frames"] - 1)
    return [*before[:-1], {"role": "stream", "num_frames": first["num_frames"] + stream["num_frames"], "learn": known}]
