"""The paper's streaming evaluation (section 4.1): does the model speak at the right frame, and say the right thing?"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vmod_jax.data.conversation import IGNORE, Encoded, encode
from vmod_jax.data.pipeline import Streams, open_streams
from vmod_jax.errors import UserError
from vmod_jax.evaluation import stream_metrics
from vmod_jax.evaluation.scorer import Scored, Scorer
from vmod_jax.evaluation.stream_metrics import SampleMetrics, TokenStats
from vmod_jax.lm import LanguageModel


def narration(lm: LanguageModel, config: Any, split: str, threshold: float) -> Scored:
    """The four streaming metrics and their strict variants (see evaluation/stream_metrics.py)."""
    fmt, size = lm.fmt, lm.config.vision.image_size if lm.config.vision else 0
    streams = open_streams(config.data, split, size)
    rows = [(encode(sample.conversation, fmt), sample) for sample in streams.samples]
    _check_frames(lm, streams)
    scorer = Scorer(lm)
    with_frames = [(row, streams.frames(sample)) for row, sample in rows]
    stats = scorer(with_frames, f"scoring {split}")

    # Where the model stayed silent, what would it have done without the reply? One continuation a silent turn.
    more = [
        (i, c)
        for i, ((row, _), s) in enumerate(zip(rows, stats, strict=True))
        for c in stream_metrics.continuations(row, s, fmt, threshold)
    ]
    late = scorer([(c.encoded, with_frames[i][1][c.frames]) for i, c in more], "late replies" if more else "")
    continued: dict[int, dict[int, TokenStats]] = {i: {} for i in range(len(rows))}
    for (i, c), s in zip(more, late, strict=True):
        continued[i][c.turn] = s
    samples = [stream_metrics.score(row, stats[i], fmt, threshold, continued[i]) for i, (row, _) in enumerate(rows)]

    prior = stream_metrics.text_prior(
        (encode(sample.conversation, fmt) for sample in open_streams(config.data, "train", size).samples), fmt
    )
    blind = {
        name: _blind(baseline, [row for row, _ in rows], fmt, prior, lm.config.fps) for name, baseline in BLIND.items()
    }
    predictions = [
        {"video": s.video, "start": s.start, "stop": s.stop, **m._asdict(), "replies": _replies(row, st, fmt)}
        for (row, s), m, st in zip(rows, samples, stats, strict=True)
    ]
    return Scored(stream_metrics.aggregate(samples, lm.config.fps), blind, len(rows), predictions)


BLIND = {"always_silent": stream_metrics.always_silent, "always_speak": stream_metrics.always_speak}


def _blind(baseline, rows: Sequence[Encoded], fmt, prior, fps: float) -> dict[str, float]:
    scores: list[SampleMetrics] = []
    for row in rows:
        stats = baseline(row, fmt, prior)
        continued = {c.turn: baseline(c.encoded, fmt, prior) for c in stream_metrics.continuations(row, stats, fmt)}
        scores.append(stream_metrics.score(row, stats, fmt, continued=continued))
    return stream_metrics.aggregate(scores, fps)


def _replies(row: Encoded, stats: TokenStats, fmt) -> list[dict[str, str]]:
    """What was to be said, and the model's first choice at each of its tokens given those before."""
    learned = (row.labels != IGNORE) & (row.input_ids != fmt.frame_token_id)
    ends = np.flatnonzero(learned & (row.labels == fmt.eos_id))
    replies, start = [], 0
    for end in ends:
        at = np.arange(start, end + 1)[learned[start : end + 1]]
        decode = lambda ids: fmt.tokenizer.decode(ids, skip_special_tokens=True).strip()  # noqa: E731
        replies.append({"truth": decode(row.labels[at]), "first_choices": decode(stats.argmax[at])})
        start = end + 1
    return replies


def _check_frames(lm: LanguageModel, streams: Streams) -> None:
    sample = streams.samples[0]
    shape = streams.frames(sample._replace(stop=sample.start + 1)).shape[1:]
    n, width = lm.config.tokens_per_frame, lm.config.vision_hidden_size
    if len(shape) == 2 and shape != (n, width):
        raise UserError(f"the data's features are {list(shape)}, the model takes {[n, width]}: prepare them again")
    if len(shape) == 3 and lm.config.vision is None:
        raise UserError("the data has pixels, and the model has no vision tower: prepare features with vmod data")


# name -> (lm, config, split, threshold) -> Scored
