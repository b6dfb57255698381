"""A live conversation over a stream of frames: when to speak, and what text goes in around it.

The tokens fed piece by piece are those of the whole conversation written as text (`data/conversation.py`): text is
held back until a frame or a reply follows, because tokens may merge across the pieces.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vmod_jax.data.conversation import DEFAULT_SYSTEM_PROMPT, StreamFormat
from vmod_jax.errors import UserError
from vmod_jax.streaming.engine import Engine, Programs, frames_chunk

SNAP = 1e-6  # a question so close to a frame's time (in frames) is asked at that frame: seconds are not exact


class Query(NamedTuple):
    place: float  # in frames: 2 is at the third frame, 2.5 half-way to the fourth
    time: float  # in seconds
    text: str


class Turn(NamedTuple):
    """Something said at `time` seconds of the stream, by "user" or "assistant"."""

    time: float
    role: str
    text: str


class Session:
    """One stream. Push frames, ask questions; replies come back and are kept in `turns`.

    threshold: the model speaks after a frame when P(interval) < threshold or the interval is not its first choice.
    max_reply: a reply is cut after so many tokens (the text stays well-formed).
    width: frames that `push_many` computes in one call.
    routing: whether `kept` is to say which tokens of each frame the routed layers computed.
    """

    def __init__(
        self,
        programs: Programs,
        params: Any,
        fmt: StreamFormat,
        threshold: float = 0.725,
        system: str = DEFAULT_SYSTEM_PROMPT,
        max_frames: int = 1200,
        max_reply: int = 64,
        width: int = 8,
        announce: Callable[[str], None] = lambda line: None,
        routing: bool = False,
    ):
        if min(width, max_reply) < 1:
            raise UserError(f"width {width} and max_reply {max_reply} must be at least 1")
        chunk = frames_chunk(programs.config.tokens_per_frame, width, len(fmt.interval_ids))
        self.engine = Engine(programs, params, max_frames, announce=announce, chunk=chunk)
        self.fmt, self.fps = fmt, programs.config.fps
        self.threshold, self.max_reply, self.width = threshold, max_reply, width
        self.turns: list[Turn] = []
        self.frames = 0
        self.silence: list[float] = []  # P(interval) after each frame
        self.routing = routing
        self.kept: list[dict[int, list[int]]] = []  # of each frame {layer: indices of its tokens}
        self._in_stream = False  # whether a "[" is open
        self._pending_ids: list[int] = []  # tokens that wait for the text behind them
        self._pending_text = fmt.opening(system)
        self._queries: list[Query] = []  # in order of time

    # --- what a user calls --------------------------------------------------------------------------------------------

    @property
    def threshold(self) -> float:
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise UserError(f"threshold {value} is outside [0, 1]: it is a probability, 0 asks for argmax alone")
        self._threshold = value

    @property
    def next_time(self) -> float:
        """Time of the next frame, in seconds."""
        return self.frames / self.fps

    @property
    def cache_bytes(self) -> int:
        return self.engine.cache_bytes

    def ask(self, text: str, time: float | None = None) -> str | None:
        """Asks at `time` seconds (default: the next frame's time).

        A question before the next frame's time is answered now (one before the last frame's, as if asked at it), and
        the reply returned; one at or after a frame's time is answered by the `push` of that frame.
        """
        time = self.next_time if time is None else max(float(time), (self.frames - 1) / self.fps)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError("a question holds half a character (a lone surrogate): write it again")
        if not np.isfinite(time):
            raise UserError(f"a question at {time} seconds: give the time of the stream at which it is asked")
        place = time * self.fps
        query = Query(round(place) if abs(place - round(place)) < SNAP else place, time, text)
        if query.place >= self.frames:
            self._queries = sorted([*self._queries, query], key=lambda query: query.place)
            return None
        self._answer_until(query.place)  # those that were to be asked earlier
        return self._answer(query)

    def push(self, frame: np.ndarray) -> str | None:
        """Shows one frame, u8[S, S, 3] pixels or f32[n, d_v] features; -> what the model says after it, or None."""
        replies = self.push_many([frame])
        return replies[-1].text if replies else None

    def push_many(self, frames: Sequence[np.ndarray]) -> list[Turn]:
        """Shows queued frames in calls of up to `width`, with the same replies as one `push` each.

        A call is sent off before the answer of the one before it is read, as if that were silence. Where the model
        speaks in the middle of a call, or one was sent after it, the stream is rolled back to that frame.
        """
        first_turn, queue = len(self.turns), [np.asarray(frame) for frame in frames]
        ahead: _Shown | None = None
        while queue:
            self._answer_until(self.frames - SNAP)
            shown = ahead or self._show(np.stack(queue[: self._frames_until_query()]))
            ahead = self._show_ahead(queue, shown.count)
            silent, speaks = shown.read(self.fmt.interval_id, self.threshold)
            count = shown.count if speaks is None else speaks + 1
            self.frames += count
            self.silence += silent[:count].tolist()
            if self.routing:
                layers = jax.device_get(shown.kept)
                self.kept += [{layer: kept[0, i].tolist() for layer, kept in layers.items()} for i in range(count)]
            if speaks is not None and (too_many := shown.count + (ahead.count if ahead else 0) - count):
                self.engine.forget_frames(too_many, self.fmt.interval_ids)
                ahead = None
            queue = queue[count:]
            last = self.frames - 1
            if self._queries and self._queries[0].place <= last:
                self._answer_until(last)
            elif speaks is not None:
                self._reply("", last / self.fps)
        return [turn for turn in self.turns[first_turn:] if turn.role == "assistant"]

    def finish(self) -> list[Turn]:
        """Answers the questions that still wait; call it when no further frame comes."""
        first_turn = len(self.turns)
        self._answer_until(float("inf"))
        return [turn for turn in self.turns[first_turn:] if turn.role == "assistant"]

    # --- the protocol -------------------------------------------------------------------------------------------------

    def _frames_until_query(self, ahead: int = 0) -> int:
        """Frames that may be shown before the next question must be answered: at most `width`, and no more than fit.

        ahead: frames that come before them; then there may be none (0 or less).
        """
        shown = self.frames + ahead
        count = min(self.width, self.engine.max_frames - shown)
        if self._queries:
            # The last frame that is not later than the question is the last one before its answer.
            count = min(count, int(self._queries[0].place) - shown + 1)
        return count if ahead else max(1, count)

    def _show_ahead(self, queue: list[np.ndarray], count: int) -> "_Shown | None":
        """Feeds what follows `count` frames whose answer is not read yet; None where that must be read first."""
        following = queue[count : count + max(0, self._frames_until_query(count))]
        waits = bool(self._queries) and self._queries[0].place < self.frames + count - SNAP
        if not following or waits or not self.engine.forgets_anything:
            return None
        try:
            return self._show(np.stack(following))
        except (UserError, ValueError):
            return None  # of a frame that is not like the others: said in its turn

    def _show(self, frames: np.ndarray) -> "_Shown":
        """Feeds frames."""
        text = self._pending_text + (self.fmt.interval if self._in_stream else self.fmt.open_stream)
        ids = self._pending_ids + self.fmt.tokenize(text)
        width = 1 if len(frames) == 1 else self.width
        logits = self.engine.send_frames(ids, frames, self.fmt.interval_ids, width)
        self._pending_ids, self._pending_text, self._in_stream = [], "", True
        silent, best = choices(logits, self.fmt.interval_id)
        return _Shown(len(frames), silent, best, self.engine.kept)

    def _answer_until(self, place: float) -> None:
        """Answers the questions of up to `place` frames."""
        while self._queries and self._queries[0].place <= place:
            self._answer(self._queries.pop(0))

    def _answer(self, query: Query) -> str:
        self.turns.append(Turn(query.time, "user", query.text))
        return self._reply(self.fmt.user_text(query.text), query.time)

    def _reply(self, user_text: str, time: float) -> str:
        """Lets the model speak, after a question or by itself."""
        close = self.fmt.close_stream if self._in_stream else ""
        text = self._pending_text + close + user_text + self.fmt.assistant_prefix
        ids = self._pending_ids + self.fmt.tokenize(text)
        reply, _ = self.engine.generate(ids, self.fmt.eos_id, self.max_reply)
        # eos has not been fed: it goes in with what comes next, also after a reply that was cut.
        self._pending_ids, self._pending_text, self._in_stream = [self.fmt.eos_id], self.fmt.after_reply, False
        said = self.fmt.tokenizer.decode(reply, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        self.turns.append(Turn(time, "assistant", said))
        return said


class _Shown(NamedTuple):
    """`count` frames that were fed.

    silent, best: what `choices` says of them and of padding; kept: {layer: i32[1, width, k]}. Perhaps not known yet.
    """

    count: int
    silent: jax.Array
    best: jax.Array
    kept: dict[int, jax.Array]

    def read(self, interval_id: int, threshold: float) -> tuple[np.ndarray, int | None]:
        """Waits for them: -> f32[m] P(interval), the index of the first after which the model wants to speak."""
        silent, best = (x[: self.count] for x in jax.device_get((self.silent, self.best)))
        speaks = np.flatnonzero(wants_to_speak(silent, best, interval_id, threshold))
        return silent, int(speaks[0]) if len(speaks) else None


@jax.jit
def choices(logits: Any, interval_id: int) -> tuple[jax.Array, jax.Array]:
    """P(interval), the probability of staying silent, and the first choice: f32[m, V] -> f32[m], i32[m].

    On the device: what comes back is two numbers a frame.
    """
    return jax.nn.softmax(logits)[:, interval_id], jnp.argmax(logits, -1)


def wants_to_speak(silent: np.ndarray, best: np.ndarray, interval_id: int, threshold: float) -> np.ndarray:
    """The rule after each frame: P(interval) < threshold, or the interval is not the first choice: -> bool[m]."""
    return (silent < threshold) | (best != interval_id)
