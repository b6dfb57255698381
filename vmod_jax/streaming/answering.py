"""Questions about what has been shown, answered many at a time.

The frames of a group (an image, a video) are encoded and read once, into one row of a cache; its questions are rows on
copies of that row, read and answered together. Every array has a static shape: frames, text and rows are padded to a
few sizes, so that a handful of compiles serve a whole benchmark.

    group     opening "\\n[" frame , frame ...            once, a piece of at most PIECE frames at a time
    question  "]" "\\nUser: ..." "\\nAssistant:"          a row on its group's
    reply     token by token, or the options, each a row on its question's
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vmod_jax.data.conversation import DEFAULT_SYSTEM_PROMPT, StreamFormat
from vmod_jax.errors import UserError
from vmod_jax.models.kv_cache import Cache
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, check_frames, make_cache

PIECE = 32  # frames that are read at a time
TEXT = 32  # text is padded to a multiple, or to a power of two above it


class Question(NamedTuple):
    """text: the user's whole message; frames: u8[F, S, S, 3] pixels or f32[F, n, d_v] features, or a function that
    reads them when their turn comes, or None; group: questions of equal groups show the same frames, None: its own;
    options: whole replies, of which `by_likelihood` takes one; begin: what the reply begins with, not said again.
    """

    text: str
    frames: np.ndarray | Callable[[], np.ndarray] | None = None
    group: Hashable = None
    options: tuple[str, ...] = ()
    begin: str = ""


class Answer(NamedTuple):
    """text: what is said, or the likeliest option; scores: log P of each option, none where not asked for."""

    text: str
    scores: tuple[float, ...] = ()


class Answerer:
    """Answers batches of questions with one model. `compiles` counts traces, `encoded` the frames read so far.

    rows: questions that are answered together; limit: new tokens of a reply.
    """

    def __init__(
        self,
        config: VideoLMConfig,
        params: Any,
        fmt: StreamFormat,
        rows: int = 8,
        limit: int = 64,
        system: str = DEFAULT_SYSTEM_PROMPT,
    ):
        if min(rows, limit) < 1:
            raise UserError(f"rows {rows} and limit {limit} must be at least 1")
        self.config, self.params, self.fmt = config, params, fmt
        self.rows, self.limit, self.system = rows, limit, system
        self.model = VideoLM(config)
        self.compiles: dict[str, int] = {}
        self.encoded = self._size = 0
        self._read = jax.jit(self._trace_read, donate_argnames="cache")
        self._reply = jax.jit(self._trace_reply, static_argnames="limit")
        self._score = jax.jit(self._trace_score)

    def by_text(self, questions: Sequence[Question]) -> list[Answer]:
        """Greedy replies, cut at eos or after `limit` tokens, without blanks around them."""
        return self._answer(questions, self._texts)

    def by_likelihood(self, questions: Sequence[Question]) -> list[Answer]:
        """The option whose tokens and eos are likeliest as the reply; of equally likely ones the first."""
        if not all(question.options for question in questions):
            raise UserError("a question without options: by likelihood one of them is taken, name some")
        return self._answer(questions, self._options)

    # --- groups -------------------------------------------------------------------------------------------------------

    def _answer(self, questions: Sequence[Question], answer: Callable) -> list[Answer]:
        groups: dict[Hashable, list[int]] = {}
        for i, question in enumerate(questions):
            groups.setdefault(("alone", i) if question.group is None else ("group", question.group), []).append(i)
        found: dict[int, Answer] = {}
        together: list[list[int]] = []
        for members in groups.values():
            together.append(members)
            if len(together) == self.rows or sum(map(len, together)) >= self.rows:
                found |= self._answer_groups(questions, together, answer)
                together = []
        if together:
            found |= self._answer_groups(questions, together, answer)
        return [found[i] for i in range(len(questions))]

    def _answer_groups(self, questions: Sequence[Question], groups: list[list[int]], answer: Callable) -> dict:
        """Reads each group's frames, then answers its questions `rows` at a time."""
        shown = [self._frames(questions[members[0]]) for members in groups]
        order = [(row, i) for row, members in enumerate(groups) for i in members]
        suffixes = {i: self._suffix(questions[i], len(shown[row])) for row, i in order}
        longest = max(len(self.fmt.tokenize(text)) for text in suffixes.values())
        size = self._size = max(self._size, padded(longest))  # it only grows: few compiles serve a whole benchmark
        told = [len(self.fmt.tokenize(option)) for i in suffixes for option in questions[i].options]
        cache = self._read_all(shown, size + padded(max([self.limit, *told])))
        found = {}
        for start in range(0, len(order), self.rows):
            part = order[start : start + self.rows]
            rows = np.array([row for row, _ in part] + [0] * (self.rows - len(part)), np.int32)
            answers = answer(cache, rows, [suffixes[i] for _, i in part], [questions[i] for _, i in part], size)
            found |= dict(zip((i for _, i in part), answers, strict=True))
        return found

    def _frames(self, question: Question) -> np.ndarray:
        frames = question.frames() if callable(question.frames) else question.frames
        if frames is None:
            return np.zeros((0, self.config.tokens_per_frame, self.config.vision_hidden_size), np.float32)
        return np.asarray(check_frames(self.config, np.asarray(frames), lead=1))

    def _prefix(self, frames: int) -> list[int]:
        """Tokens up to the last frame; none without frames, where text may merge with the question's."""
        fmt = self.fmt
        return fmt.tokenize(fmt.opening(self.system) + fmt.open_stream + fmt.frames(frames)) if frames else []

    def _suffix(self, question: Question, frames: int) -> str:
        fmt = self.fmt
        start = fmt.close_stream if frames else fmt.opening(self.system)
        begin = f" {fmt.plain(question.begin)}" if question.begin else ""
        return start + fmt.user_text(question.text) + fmt.assistant_prefix + begin

    def _read_all(self, shown: list[np.ndarray], room: int) -> Cache:
        """A cache with a row a group, its frames read, and room for so many text tokens behind them.

        Raises UserError for more tokens than the model knows positions.
        """
        n, frame_token, most = self.config.tokens_per_frame, self.config.frame_token_id, max(map(len, shown))
        prefixes = [self._prefix(len(frames)) for frames in shown]
        if (size := max(map(len, prefixes)) + room) > (known := self.config.llama.max_position_embeddings):
            raise UserError(
                f"{most} frames of {n} tokens, a question and its reply take up to {size} positions of the model's "
                f"{known}: show fewer frames, or give them a smaller grid"
            )
        text = padded(max(len(ids) - ids.count(frame_token) for ids in prefixes)) if most else 0
        cache = make_cache(self.config, power(most), text + room, power(len(shown)))
        if not most:
            return cache
        width = min(PIECE, power(most))
        pieces = [_pieces(ids, frame_token, width * n) for ids in prefixes]
        between = padded(max(len(piece) - piece.count(frame_token) for own in pieces for piece in own))
        like = next(frames for frames in shown if len(frames))
        for p in range(max(map(len, pieces))):
            ids = np.zeros((power(len(shown)), between + width * n), np.int32)
            frames, length = np.zeros((len(ids), width, *like.shape[1:]), like.dtype), np.zeros(len(ids), np.int32)
            for row, (own, every) in enumerate(zip(pieces, shown, strict=True)):
                if p < len(own):
                    ids[row, : len(own[p])], length[row] = own[p], len(own[p])
                    part = every[p * width : (p + 1) * width]
                    frames[row, : len(part)] = part
                    self.encoded += len(part)
            cache = self._read(self.params, cache, ids, frames, length)
        return cache

    # --- answers ------------------------------------------------------------------------------------------------------

    def _texts(self, cache: Cache, rows: np.ndarray, suffixes: list[str], questions: Any, size: int) -> list[Answer]:
        ids, length = self._batch([self.fmt.tokenize(text) for text in suffixes], size)
        out, count = self._reply(self.params, cache, rows, ids, length, np.int32(self.fmt.eos_id), limit=self.limit)
        replies = [ids[:n] for ids, n in zip(np.asarray(out), np.asarray(count), strict=True)]
        decode = functools.partial(
            self.fmt.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [Answer(decode(reply).strip()) for reply in replies[: len(suffixes)]]

    def _options(
        self, cache: Cache, rows: np.ndarray, suffixes: list[str], questions: list[Question], size: int
    ) -> list[Answer]:
        end, plain = self.fmt.tokenizer.eos_token, self.fmt.plain
        told = [
            [self.fmt.tokenize(f"{text} {plain(option)}{end}") for option in question.options]
            for text, question in zip(suffixes, questions, strict=True)
        ]
        # Where an option merges with what is before it, the prompt ends earlier: options begin where they first differ.
        prompts = [_shared([self.fmt.tokenize(text), *own]) for text, own in zip(suffixes, told, strict=True)]
        tails = [[ids[len(prompt) :] for ids in own] for prompt, own in zip(prompts, told, strict=True)]
        ids, length = self._batch(prompts, size)
        options, longest = power(max(map(len, tails))), max(len(tail) for own in tails for tail in own)
        tail = np.zeros((self.rows, options, longest), np.int32)
        there = np.zeros((self.rows, options), np.int32)
        for row, own in enumerate(tails):
            for option, tokens in enumerate(own):
                tail[row, option, : len(tokens)], there[row, option] = tokens, len(tokens)
        scores = np.asarray(self._score(self.params, cache, rows, ids, length, tail, there))
        own = [tuple(map(float, scores[row, : len(t)])) for row, t in enumerate(tails)]
        best = [question.options[int(np.argmax(values))] for question, values in zip(questions, own, strict=True)]
        return [Answer(text, values) for text, values in zip(best, own, strict=True)]

    def _batch(self, texts: list[list[int]], size: int) -> tuple[np.ndarray, np.ndarray]:
        """(i32[rows, size], i32[rows]); rows without a question hold one token."""
        ids, length = np.zeros((self.rows, size), np.int32), np.ones(self.rows, np.int32)
        for row, own in enumerate(texts):
            ids[row, : len(own)], length[row] = own, len(own)
        return ids, length

    # --- what is compiled ---------------------------------------------------------------------------------------------

    def _count(self, name: str) -> None:
        self.compiles[name] = self.compiles.get(name, 0) + 1

    def _extend(self, params, cache: Cache, ids: Array, length: Array) -> tuple[Array, Cache]:
        """Appends text i32[B, S] of which a row uses `length`; -> (f32[B, S, d] hidden states, cache)."""
        apply: Any = functools.partial(self.model.apply, {"params": params})
        hidden, _, cache = apply(ids, None, length, cache, method="hidden")
        return hidden, cache

    def _logits(self, params, hidden: Array) -> Array:
        """[..., d] -> f32[..., V]; a reply cannot show a frame, for which a padded vocabulary may have a row."""
        apply: Any = functools.partial(self.model.apply, {"params": params})
        logits = apply(hidden, method="logits")
        return jnp.where(jnp.arange(logits.shape[-1]) == self.config.frame_token_id, -jnp.inf, logits)

    def _trace_read(self, params, cache: Cache, ids: Array, frames: Array, length: Array) -> Cache:
        self._count("read")
        apply: Any = functools.partial(self.model.apply, {"params": params})
        return apply(ids, frames, length, cache, method="hidden")[2]

    def _trace_reply(self, params, cache: Cache, rows: Array, ids: Array, length: Array, eos: Array, limit: int):
        """-> (i32[B, limit] tokens, i32[B] how many of them); a row that has ended is fed nothing."""
        self._count("reply")

        def say(cache: Cache, ids: Array, length: Array):
            hidden, cache = self._extend(params, cache, ids, length)
            logits = self._logits(params, _last(hidden, length))
            return jnp.argmax(logits, -1).astype(jnp.int32), cache

        def step(state):
            cache, token, out, count, done = state
            out = out.at[:, jnp.max(count)].set(jnp.where(done, 0, token))
            token, cache = say(cache, token[:, None], jnp.where(done, 0, 1))
            count = count + ~done
            return cache, token, out, count, done | (token == eos)

        token, cache = say(jax.tree.map(lambda x: x[rows], cache), ids, length)
        state = (cache, token, jnp.zeros((rows.size, limit), jnp.int32), jnp.zeros(rows.size, jnp.int32), token == eos)
        *_, out, count, _ = jax.lax.while_loop(lambda s: ~s[4].all() & (s[3].max() < limit), step, state)
        return out, count

    def _trace_score(self, params, cache: Cache, rows: Array, ids: Array, length: Array, tail: Array, there: Array):
        """tail: i32[B, O, R] tokens of each option, of which `there: i32[B, O]` -> f32[B, O] their log P."""
        self._count("score")
        hidden, cache = self._extend(params, jax.tree.map(lambda x: x[rows], cache), ids, length)
        batch, options, size = tail.shape
        first = jax.nn.log_softmax(self._logits(params, _last(hidden, length)))
        total = jnp.take_along_axis(first, tail[:, :, 0], axis=-1)
        if size > 1:
            flat = tail.reshape(-1, size)
            cache = jax.tree.map(lambda x: jnp.repeat(x, options, axis=0), cache)
            fed = jnp.maximum(there.reshape(-1) - 1, 0)
            hidden, _ = self._extend(params, cache, flat[:, :-1], fed)
            log_p = jax.nn.log_softmax(self._logits(params, hidden))
            each = jnp.take_along_axis(log_p, flat[:, 1:, None], axis=-1)[..., 0]
            each = jnp.where(jnp.arange(size - 1) < fed[:, None], each, 0)
            total += each.sum(-1).reshape(batch, options)
        return jnp.where(there > 0, total, -jnp.inf)


def _last(hidden: Array, length: Array) -> Array:
    """The hidden state of each row's last token: [B, S, d], i32[B] -> [B, d]."""
    return jnp.take_along_axis(hidden, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]


def _pieces(ids: list[int], frame_token_id: int, tokens: int) -> list[list[int]]:
    """The tokens, cut behind every `tokens`-th frame token."""
    ends = np.flatnonzero(np.array(ids) == frame_token_id)[tokens - 1 :: tokens] + 1 if ids else []
    cuts = [0, *ends, len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(cuts) if b > a]


def _shared(lists: Sequence[list[int]]) -> list[int]:
    """What all of them begin with."""
    same = [len(set(tokens)) == 1 for tokens in zip(*lists, strict=False)]
    return lists[0][: [*same, False].index(False)]


def power(value: int) -> int:
    """The next power of two; 0 for 0."""
    return 1 << (value - 1).bit_length() if value else 0


def padded(tokens: int) -> int:
    """A size for so many text tokens: a multiple of TEXT up to 4 of them, then powers of two."""
    return max(TEXT, -(-tokens // TEXT) * TEXT) if tokens <= 4 * TEXT else power(tokens)
