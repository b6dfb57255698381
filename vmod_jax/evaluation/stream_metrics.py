"""How well a model speaks at the right time, one sample at a time: LM-PPL, TimeDiff, Fluency, LM-Correctness.

VideoLLM-online (CVPR 2024), section 4. A turn ends after each reply's eos. In a turn the learned frames say when to
speak and the learned text what to say; S = its learned frames, T = S + its learned text tokens.

Scoring needs two runs of the model. The first is over the sample as it is. Where the model stayed silent through all
of a turn's learned frames, `continuations` writes the stream that it would have seen next, without the reply; their
statistics tell `score` how many frames too late it speaks. A threshold theta > 0 can only add speaking frames, so the
continuations of threshold 0 serve every threshold.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vmod_jax.data.conversation import IGNORE, Encoded, StreamFormat, reply_ends
from vmod_jax.errors import UserError


class TokenStats(NamedTuple):
    """What scoring needs of the logits, position by position."""

    argmax: np.ndarray  # i32[T]
    interval_prob: np.ndarray  # f32[T], probability of "stay silent"
    nll: np.ndarray  # f32[T], -log p(label) in nats where there is a label, else 0


class Continuation(NamedTuple):
    """A turn without its reply: up to the last learned frame, then frames of the next turn."""

    turn: int  # which eos would have ended it, from 0
    input_ids: np.ndarray  # i32[T']
    frames: np.ndarray  # i32[F'], the sample's frames that it shows, in order

    @property
    def encoded(self) -> Encoded:
        """The sequence as a sample without labels."""
        return Encoded(self.input_ids, np.full(len(self.input_ids), IGNORE, np.int32), [])


class SampleMetrics(NamedTuple):
    lm_ppl: float  # exp of the mean nll of the text, mean over turns; 1 where there is no text
    time_diff_frames: float  # |frames too early or late|, mean over turns; 0 where there are no learned frames
    fluency: float  # learned tokens got right before the first mistake / T, mean over turns with both; 1 if none
    lm_correctness: float  # leading run of right text tokens / text tokens, mean over turns; 1 where there is no text
    # A last turn in which the model stays silent cannot be continued, and counts as exact above. Here it is late by
    # S - 1 frames.
    time_diff_strict_frames: float
    fluency_strict: float


class _Turn(NamedTuple):
    index: int
    last: bool  # whether no other turn follows
    stream: np.ndarray  # i64[S], positions of the learned frame tokens
    text: np.ndarray  # i64[L], positions that predict a learned text token
    past_frames: int  # frames of the sample before this turn
    num_frames: int  # frames of this turn, learned or not
    next_frames: int  # frames of the next turn

    @property
    def continued_frames(self) -> int:
        """Frames after the right moment that are watched for a late reply: no more than there were before it."""
        return 0 if self.last else max(0, min(self.next_frames, self.num_frames - 1))


def continuations(encoded: Encoded, stats: TokenStats, fmt: StreamFormat, threshold: float = 0.0) -> list[Continuation]:
    """The sequences that `score` needs besides the sample itself: one for each silent turn that can go on."""
    found = []
    for turn in _turns(encoded, fmt):
        if not len(turn.stream) or not turn.continued_frames or _speaks(stats, turn.stream, fmt, threshold).any():
            continue
        seen = encoded.input_ids[: turn.stream[-1] + 1]
        more = [*fmt.interval_ids, *[fmt.frame_token_id] * fmt.tokens_per_frame] * turn.continued_frames
        shown = np.arange(_count_frames(seen, fmt))
        following = turn.past_frames + turn.num_frames + np.arange(turn.continued_frames)
        input_ids = np.concatenate([seen, more]).astype(np.int32)
        found.append(Continuation(turn.index, input_ids, np.concatenate([shown, following]).astype(np.int32)))
    return found


def score(
    encoded: Encoded,
    stats: TokenStats,
    fmt: StreamFormat,
    threshold: float = 0.0,
    continued: Mapping[int, TokenStats] | None = None,
) -> SampleMetrics:
    """The metrics of one sample.

    Args:
        encoded: the sample, T tokens.
        stats: the model's statistics on it, [T].
        threshold: theta; a frame speaks when its argmax is not the interval or P(interval) < theta. 0: argmax alone.
        continued: turn -> statistics on that turn's `Continuation`, [T']; more turns than needed do no harm.
    """
    ppl, correctness, diffs, strict_diffs, fluency, strict_fluency = [], [], [], [], [], []
    for turn in _turns(encoded, fmt):
        right = 0
        if len(turn.text):
            wrong = np.flatnonzero(stats.argmax[turn.text] != encoded.labels[turn.text])
            right = int(wrong[0]) if len(wrong) else len(turn.text)
            correctness.append(right / len(turn.text))
            ppl.append(np.exp(np.mean(stats.nll[turn.text], dtype=np.float64)))
        if len(turn.stream):
            diff = _frame_diff(turn, stats, fmt, threshold, continued or {})
            silent_end = turn.last and not _speaks(stats, turn.stream, fmt, threshold).any()
            diffs.append(abs(diff))
            strict_diffs.append(len(turn.stream) - 1 if silent_end else abs(diff))
            if len(turn.text):
                fluency.append(_fluency(turn, diff, right, late=diff < 0))
                strict_fluency.append(_fluency(turn, diff, right, late=diff < 0 or silent_end))
    return SampleMetrics(
        lm_ppl=_mean(ppl, 1.0),
        time_diff_frames=_mean(diffs, 0.0),
        fluency=_mean(fluency, 1.0),
        lm_correctness=_mean(correctness, 1.0),
        time_diff_strict_frames=_mean(strict_diffs, 0.0),
        fluency_strict=_mean(strict_fluency, 1.0),
    )


def aggregate(samples: Sequence[SampleMetrics], fps: float) -> dict[str, float]:
    """Means over samples; time differences in seconds at `fps` frames a second. UserError where there is no sample."""
    if not samples:
        raise UserError("no samples to score: the split is empty, or none of its videos was found")
    mean = SampleMetrics(*np.mean(np.array(samples, np.float64), axis=0).tolist())
    return {
        "lm_ppl": mean.lm_ppl,
        "time_diff": mean.time_diff_frames / fps,
        "fluency": mean.fluency,
        "lm_correctness": mean.lm_correctness,
        "time_diff_strict": mean.time_diff_strict_frames / fps,
        "fluency_strict": mean.fluency_strict,
    }


def _turns(encoded: Encoded, fmt: StreamFormat) -> list[_Turn]:
    """The turns that have a label. Those without are left out, but their frames are counted."""
    if (encoded.labels == IGNORE).all():  # a continuation, whose conversation is not written down
        return []
    stops = reply_ends(encoded, fmt) + 1
    starts = np.concatenate([[0], stops[:-1]]) if len(stops) else stops
    frames = [_count_frames(encoded.input_ids[a:b], fmt) for a, b in zip(starts, stops, strict=True)]
    turns = []
    for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        learned = start + np.flatnonzero(encoded.labels[start:stop] != IGNORE)
        if not len(learned):
            continue
        is_frame = encoded.input_ids[learned] == fmt.frame_token_id
        last = index == len(stops) - 1
        turns.append(
            _Turn(
                index=index,
                last=last,
                stream=learned[is_frame],
                text=learned[~is_frame],
                past_frames=sum(frames[:index]),
                num_frames=frames[index],
                next_frames=0 if last else frames[index + 1],
            )
        )
    return turns


def _count_frames(input_ids: np.ndarray, fmt: StreamFormat) -> int:
    return int((input_ids == fmt.frame_token_id).sum()) // fmt.tokens_per_frame


def _speaks(stats: TokenStats, at: np.ndarray, fmt: StreamFormat, threshold: float) -> np.ndarray:
    """bool[S]: whether the model speaks after the frame that ends at each position."""
    return (stats.argmax[at] != fmt.interval_id) | (stats.interval_prob[at] < threshold)


def _frame_diff(
    turn: _Turn, stats: TokenStats, fmt: StreamFormat, threshold: float, continued: Mapping[int, TokenStats]
) -> int:
    """How many frames too early (> 0) or too late (< 0) the model speaks."""
    spoken = np.flatnonzero(_speaks(stats, turn.stream, fmt, threshold))
    if len(spoken):
        return len(turn.stream) - 1 - int(spoken[0])
    if not turn.continued_frames:
        return 0
    if turn.index not in continued:
        raise ValueError(f"turn {turn.index} stayed silent: its continuation's statistics are missing")
    step = len(fmt.interval_ids) + fmt.tokens_per_frame
    at = turn.stream[-1] + step * np.arange(1, turn.continued_frames + 1)
    spoken = np.flatnonzero(_speaks(continued[turn.index], at, fmt, threshold))
    return -(int(spoken[0]) + 1) if len(spoken) else -turn.continued_frames


def _fluency(turn: _Turn, diff: int, right: int, late: bool) -> float:
    frames, total = len(turn.stream), len(turn.stream) + len(turn.text)
    if late:
        return (frames - 1) / total
    return (frames - diff) / total if diff > 0 else (frames + right) / total


def _mean(values: Sequence[float], empty: float) -> float:
    return float(np.mean(values)) if values else empty


# --- Baselines that see no video, scored as a model is ---------------------------------------------------------------


class TextPrior(NamedTuple):
    """One reply for every turn: each of its tokens has probability `hit`, the rest is spread over the vocabulary."""

    reply: tuple[int, ...]  # from `Assistant` to eos
    hit: float
    vocabulary: int


def text_prior(samples: Iterable[Encoded], fmt: StreamFormat) -> TextPrior:
    """The most frequent learned reply (ties: the one met first), and how often its tokens are right in `samples`.

    UserError where no reply is learned.
    """
    replies: Counter[tuple[int, ...]] = Counter()
    for encoded in samples:
        for turn in _turns(encoded, fmt):
            if len(turn.text):
                replies[tuple(encoded.labels[turn.text].tolist())] += 1
    if not replies:
        raise UserError("the training samples have no learned reply: a text baseline needs at least one")
    reply = replies.most_common(1)[0][0]
    right = sum(n * (_say(reply, len(other)) == np.array(other)).sum() for other, n in replies.items())
    total = sum(n * len(other) for other, n in replies.items())
    return TextPrior(reply, float((right + 1) / (total + 2)), len(fmt.tokenizer))  # Laplace: never 0, never 1


def always_silent(encoded: Encoded, fmt: StreamFormat, prior: TextPrior) -> TokenStats:
    """A model that never speaks by itself, and says the prior's reply when it has to."""
    return _blind(encoded, fmt, prior, frame_argmax=fmt.interval_id, frame_interval_prob=1.0)


def always_speak(encoded: Encoded, fmt: StreamFormat, prior: TextPrior) -> TokenStats:
    """A model that speaks after every frame, and says the prior's reply."""
    return _blind(encoded, fmt, prior, frame_argmax=prior.reply[0], frame_interval_prob=0.0)


def copy_last(encoded: Encoded, fmt: StreamFormat, prior: TextPrior) -> TokenStats:
    """A model that never speaks by itself, and says its last reply again when it has to; at first the prior's."""
    return _blind(encoded, fmt, prior, frame_argmax=fmt.interval_id, frame_interval_prob=1.0, copies=True)


def _blind(
    encoded: Encoded,
    fmt: StreamFormat,
    prior: TextPrior,
    frame_argmax: int,
    frame_interval_prob: float,
    copies: bool = False,
) -> TokenStats:
    """Statistics of constants. A frame's nll is left 0: no metric reads it, and a certain mistake would be infinite."""
    is_frame = encoded.input_ids == fmt.frame_token_id
    argmax = np.where(is_frame, frame_argmax, fmt.eos_id).astype(np.int32)
    interval_prob = np.where(is_frame, frame_interval_prob, 0.0).astype(np.float32)
    nll = np.zeros(len(argmax), np.float32)
    reply: Sequence[int] = prior.reply
    for turn in _turns(encoded, fmt):
        if not len(turn.text):
            continue
        argmax[turn.text] = _say(reply, len(turn.text))
        reply = encoded.labels[turn.text].tolist() if copies else reply
        right = argmax[turn.text] == encoded.labels[turn.text]
        nll[turn.text] = -np.log(np.where(right, prior.hit, (1 - prior.hit) / (prior.vocabulary - 1)))
    return TokenStats(argmax, interval_prob, nll)


def _say(reply: Sequence[int], length: int) -> np.ndarray:
    """i32[length]: the reply, cut or continued with its eos."""
    return np.array([reply[min(i, len(reply) - 1)] for i in range(length)], np.int32)
