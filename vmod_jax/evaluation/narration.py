"""The paper's streaming evaluation (section 4.1): does the model speak at the right frame, and say the right thing?

A response is what one stream's metrics are, worked out while its frames are there; scores are means over streams.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vmod_jax.data.conversation import IGNORE, Encoded, encode
from vmod_jax.data.pipeline import Streams
from vmod_jax.errors import UserError
from vmod_jax.evaluation import stream_metrics
from vmod_jax.evaluation.documents import Document, Responses
from vmod_jax.evaluation.scorer import Scorer
from vmod_jax.evaluation.stream_metrics import SampleMetrics, TokenStats
from vmod_jax.evaluation.table import Benchmark, Respond, Task
from vmod_jax.lm import LanguageModel


def documents(task: Task) -> list[Document]:
    """A stream each."""
    streams = task.streams()
    check_frames(task.lm, streams)
    known = {"frames": streams.frames, "fps": task.lm.config.fps}
    return [
        Document(f"{number} {s.video} {s.start}", s.video, "", None, extra={"sample": s, **known})
        for number, s in enumerate(streams.samples)
    ]


def respond(task: Task) -> Respond:
    """{metric: value of this stream, replies: [{truth, first_choices}]} of each."""
    fmt, scorer = task.lm.fmt, Scorer(task.lm)

    def batch(some: Sequence[Document]) -> list[dict[str, Any]]:
        rows = [encode(document.extra["sample"].conversation, fmt) for document in some]
        frames = [document.extra["frames"](document.extra["sample"]) for document in some]
        stats = scorer(list(zip(rows, frames, strict=True)))
        # Where the model stayed silent, what would it have done without the reply? One continuation a silent turn.
        more = [
            (i, c)
            for i, (row, s) in enumerate(zip(rows, stats, strict=True))
            for c in stream_metrics.continuations(row, s, fmt, task.threshold)
        ]
        late = scorer([(c.encoded, frames[i][c.frames]) for i, c in more])
        continued: list[dict[int, TokenStats]] = [{} for _ in rows]
        for (i, c), s in zip(more, late, strict=True):
            continued[i][c.turn] = s
        return [
            stream_metrics.score(row, s, fmt, task.threshold, own)._asdict() | {"replies": _replies(row, s, fmt)}
            for row, s, own in zip(rows, stats, continued, strict=True)
        ]

    return batch


def score(some: Sequence[Document], responses: Responses) -> Mapping[str, float]:
    """Means over streams (see evaluation/stream_metrics.py)."""
    frames = [SampleMetrics(*(responses[one.id][name] for name in SampleMetrics._fields)) for one in some]
    return stream_metrics.aggregate(frames, some[0].extra["fps"])


BLIND = {
    "always_silent": stream_metrics.always_silent,
    "always_speak": stream_metrics.always_speak,
    "copy_last": stream_metrics.copy_last,
}


def constants(task: Task, some: Sequence[Document]) -> dict[str, Responses]:
    """Never speaking, always speaking, and saying again what was said last; texts are the training split's
    commonest."""
    fmt = task.lm.fmt
    prior = stream_metrics.text_prior(
        (encode(sample.conversation, fmt) for sample in task.streams(split="train").samples), fmt
    )

    def blind(baseline, document: Document) -> dict[str, float]:
        row = encode(document.extra["sample"].conversation, fmt)
        stats = baseline(row, fmt, prior)
        continued = {c.turn: baseline(c.encoded, fmt, prior) for c in stream_metrics.continuations(row, stats, fmt)}
        return stream_metrics.score(row, stats, fmt, continued=continued)._asdict()

    return {name: {one.id: blind(baseline, one) for one in some} for name, baseline in BLIND.items()}


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


def check_frames(lm: LanguageModel, streams: Streams) -> None:
    """Raises UserError where the model does not take frames such as these."""
    sample = streams.samples[0]
    shape = streams.frames(sample._replace(stop=sample.start + 1)).shape[1:]
    n, width = lm.config.features_per_frame, lm.config.vision_hidden_size
    if len(shape) == 2 and shape != (n, width):
        raise UserError(f"the data's features are {list(shape)}, the model takes {[n, width]}: prepare them again")
    if len(shape) == 3 and lm.config.vision is None:
        raise UserError("the data has pixels, and the model has no vision tower: prepare features with vmod data")


NARRATION = Benchmark(documents, respond, {"": score}, constants)
