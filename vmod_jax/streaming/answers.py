"""Many prompts answered at once: frames and text go through the model in batches of static shapes, over static caches.

A prompt is everything up to a reply: text, whole frames, text. What prompts share up to their last frame is computed
once and the cache copied, so that ten questions about a video cost its frames once.

    prefix    t t F F F F t F F F F      read in pieces of at most `PIECE` frames, a row a prefix, all rows at a time
    suffix                          t t t    ->  reply, decoded until every row has reached eos or the limit,
                                             or     the log P of given continuations

Shapes depend on the prompts of the call alone: the same call gives the same bits, whatever was answered before.
"""

import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vmod_jax.models.kv_cache import Cache
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, check_frames, make_cache

PIECE = 32  # frames of a row in one call
PIECE_TEXT = 64  # text tokens of a row in one call


class Prompt(NamedTuple):
    """ids: all tokens up to the reply; frames: u8[F, S, S, 3] pixels or f32[F, n, d_v] features, F as in `ids`.

    key: prompts of one key show the same frames. seed: None decodes greedily, a number draws (at `temperature`).
    """

    ids: Sequence[int]
    frames: np.ndarray
    key: Hashable
    seed: int | None = None


def rung(value: int, least: int = 16) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few shapes, none with more than half of it padding."""
    step = least
    while step < value:
        step = step * 3 // 2 if step & (step - 1) == 0 else step * 4 // 3
    return step


def power(value: int) -> int:
    """The next power of two; 0 for 0."""
    return 1 << (value - 1).bit_length() if value else 0


class Part(NamedTuple):
    """At most `rows` prompts. numbers: which; cache: row i holds the prefix of numbers[i]; tails: what comes behind."""

    numbers: list[int]
    cache: Cache
    tails: list[list[int]]
    width: int


class Answers:
    """Answers prompts, `rows` at a time. `compiles` counts traces by name, `encoded` the frames read so far.

    params: as streams take them (`LanguageModel.merged`).
    """

    def __init__(self, config: VideoLMConfig, params: Any, eos: int, rows: int = 8, temperature: float = 0.7):
        self.config, self.params, self.eos, self.rows, self.temperature = config, params, eos, rows, temperature
        self.model = VideoLM(config)
        self.encoded = 0
        self.compiles: dict[str, int] = {}
        self._read = jax.jit(self._read_piece, donate_argnames="cache")
        self._take = jax.jit(lambda cache, index: jax.tree.map(lambda x: x[index], cache))
        self._decode = jax.jit(self._generate, static_argnames="limit", donate_argnames="cache")
        self._score = jax.jit(self._likelihood)

    def __call__(self, prompts: Sequence[Prompt], limit: int = 64) -> list[list[int]]:
        """The tokens of each reply, without eos, at most `limit`."""
        replies: dict[int, list[int]] = {}
        for part in self._parts(prompts, limit):
            said = self._reply(part, [prompts[number].seed for number in part.numbers], limit)
            replies |= dict(zip(part.numbers, said, strict=True))
        return [replies[number] for number in range(len(prompts))]

    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """log P of each of a prompt's options, token lists of at least one that would follow the prompt's tokens."""
        most, longest = max(map(len, options)), max(len(ids) for own in options for ids in own)
        most, longest = power(most), rung(longest, 4)
        scores: dict[int, list[float]] = {}
        for part in self._parts(prompts, longest):
            tail, there = np.zeros((self.rows, most, longest), np.int32), np.zeros((self.rows, most), np.int32)
            for row, number in enumerate(part.numbers):
                for option, ids in enumerate(options[number]):
                    tail[row, option, : len(ids)], there[row, option] = ids, len(ids)
            found = np.asarray(self._score(self.params, part.cache, *self._suffixes(part), tail, there))
            scores |= {number: found[row, : len(options[number])].tolist() for row, number in enumerate(part.numbers)}
        return [scores[number] for number in range(len(prompts))]

    def _parts(self, prompts: Sequence[Prompt], room: int) -> Iterator[Part]:
        """The prompts, `rows` together; their caches have room for so many tokens behind them."""
        split = [_split(prompt, self.config.frame_token_id) for prompt in prompts]
        of: dict[Hashable, list[int]] = {}  # prefix -> its prompts
        for number, (prefix, _) in enumerate(split):
            of.setdefault((prompts[number].key, tuple(prefix)), []).append(number)
        groups = list(of.values())
        for start in range(0, len(groups), self.rows):
            some = groups[start : start + self.rows]
            asked = [(row, number) for row, numbers in enumerate(some) for number in numbers]
            width = rung(max(len(split[number][1]) for _, number in asked), 8)
            cache = self._prefill([(split[n[0]][0], prompts[n[0]].frames) for n in some], width + room)
            for first in range(0, len(asked), self.rows):
                rows, numbers = (list(x) for x in zip(*asked[first : first + self.rows], strict=True))
                index = np.array(rows + [0] * (self.rows - len(rows)))
                yield Part(numbers, self._take(cache, index), [split[number][1] for number in numbers], width)

    # --- the device side ----------------------------------------------------------------------------------------------

    def _prefill(self, rows: Sequence[tuple[Sequence[int], np.ndarray]], more: int) -> Cache:
        """A cache that holds a prefix a row, and perhaps empty rows, with room for `more` text tokens."""
        n, c = self.config.tokens_per_frame, self.config
        pieces = [list(_pieces(ids, frames, c.frame_token_id, n)) for ids, frames in rows]
        frames = max(len(frames) for _, frames in rows)
        text = max(len(ids) - n * len(frames) for ids, frames in rows)
        batch, piece = power(len(rows)), min(PIECE, power(frames))
        # A piece is written with its padding behind it, which must fit for the last one too.
        chunk = max(PIECE_TEXT + piece * n, more)
        cache = make_cache(c, rung(frames + piece), rung(text + more + PIECE_TEXT), batch, chunk)
        for number in range(max(map(len, pieces))):
            ids = np.zeros((batch, PIECE_TEXT + piece * n), np.int32)
            length = np.zeros(batch, np.int32)
            shown: np.ndarray | None = None
            for row, own in enumerate(pieces):
                if number >= len(own):
                    continue
                tokens, part = own[number]
                ids[row, : len(tokens)], length[row] = tokens, len(tokens)
                if len(part):
                    part = np.asarray(check_frames(c, part, lead=1))
                    if shown is None:
                        shown = np.zeros((batch, piece, *part.shape[1:]), part.dtype)
                    shown[row, : len(part)] = part
                    self.encoded += len(part)
            cache = self._read(self.params, cache, ids, shown, length)
        return cache

    def _read_piece(self, params, cache: Cache, ids: Array, frames: Array | None, length: Array) -> Cache:
        """Appends a piece to each row. ids: i32[B, C]; frames: [B, P, ...] or None; length: i32[B], 0 for none."""
        self.compiles["read"] = self.compiles.get("read", 0) + 1
        *_, cache = self._apply(params)(ids, frames, length, cache, method="hidden")
        return cache

    def _suffixes(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """(i32[rows, width], i32[rows]): the tails, padded; rows without a prompt hold one token."""
        ids, length = np.zeros((self.rows, part.width), np.int32), np.ones(self.rows, np.int32)
        for row, tail in enumerate(part.tails):
            ids[row, : len(tail)], length[row] = tail, len(tail)
        return ids, length

    def _reply(self, part: Part, seeds: Sequence[int | None], limit: int) -> list[list[int]]:
        ids, length = self._suffixes(part)
        heat, keys = np.zeros(self.rows, np.float32), np.zeros(self.rows, np.uint32)
        for row, seed in enumerate(seeds):
            heat[row], keys[row] = (0, 0) if seed is None else (self.temperature, seed % 2**32)
        live = np.arange(self.rows) < len(part.numbers)
        eos = np.int32(self.eos)
        out, count, _ = self._decode(self.params, part.cache, ids, length, live, heat, keys, eos, limit=limit)
        out, count = jax.device_get((out, count))
        return [out[row, : count[row]].tolist() for row in range(len(part.numbers))]

    def _generate(self, params, cache: Cache, ids, length, live, heat, keys, eos, limit: int):
        """Appends the suffixes, then decodes row by row: -> (i32[B, limit] tokens, i32[B] how many before eos,
        the cache, which is updated in place)."""
        self.compiles["generate"] = self.compiles.get("generate", 0) + 1
        keys = jax.vmap(jax.random.key)(keys)

        def extend(cache, ids, length, step):
            hidden, _, cache = self._apply(params)(ids, None, length, cache, method="hidden")
            logits = self._logits(params, _last(hidden, length))
            noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[1:]))(keys)
            return jnp.argmax(logits + heat[:, None] * noise, axis=-1).astype(jnp.int32), cache

        def step(state):
            cache, token, out, count, going, done = state
            out = out.at[:, done].set(token)
            count = count + going
            token, cache = extend(cache, token[:, None], jnp.ones_like(length), done + 1)
            return cache, token, out, count, going & (token != eos), done + 1

        token, cache = extend(cache, ids, length, 0)
        rows = length.shape[0]
        state = (
            cache,
            token,
            jnp.zeros((rows, limit), jnp.int32),
            jnp.zeros(rows, jnp.int32),
            live & (token != eos),
            0,
        )
        state = jax.lax.while_loop(lambda s: s[4].any() & (s[5] < limit), step, state)
        return state[2], state[3], state[0]

    def _likelihood(self, params, cache: Cache, ids: Array, length: Array, tail: Array, there: Array) -> Array:
        """tail: i32[B, O, R] tokens of each option behind a suffix, of which `there: i32[B, O]` -> f32[B, O] log P."""
        self.compiles["score"] = self.compiles.get("score", 0) + 1
        hidden, _, cache = self._apply(params)(ids, None, length, cache, method="hidden")
        batch, options, size = tail.shape
        first = jax.nn.log_softmax(self._logits(params, _last(hidden, length)))
        total = jnp.take_along_axis(first, tail[:, :, 0], axis=-1)
        # An option is a row on a copy of its prompt's; all but its last token are fed.
        flat, fed = tail.reshape(-1, size), jnp.maximum(there.reshape(-1) - 1, 0)
        cache = jax.tree.map(lambda x: jnp.repeat(x, options, axis=0), cache)
        hidden, *_ = self._apply(params)(flat[:, :-1], None, fed, cache, method="hidden")
        log_p = jax.nn.log_softmax(self._logits(params, hidden))
        each = jnp.take_along_axis(log_p, flat[:, 1:, None], axis=-1)[..., 0]
        each = jnp.where(jnp.arange(size - 1) < fed[:, None], each, 0)
        return jnp.where(there > 0, total + each.sum(-1).reshape(batch, options), -jnp.inf)

    def _logits(self, params, hidden: Array) -> Array:
        """[..., d] -> f32[..., V]; a reply cannot show a frame, for which a padded vocabulary may have a row."""
        logits = self._apply(params)(hidden, method="logits")
        return jnp.where(jnp.arange(logits.shape[-1]) == self.config.frame_token_id, -jnp.inf, logits)

    def _apply(self, params) -> Any:
        return functools.partial(self.model.apply, {"params": params})


def _last(hidden: Array, length: Array) -> Array:
    """The hidden state of each row's last token: [B, S, d], i32[B] -> [B, d]."""
    return jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]


def _split(prompt: Prompt, frame_token: int) -> tuple[list[int], list[int]]:
    """(ids up to the last frame's end, or all but the last without frames; the rest). The rest is never empty."""
    ids = list(prompt.ids)
    shown = np.flatnonzero(np.asarray(ids) == frame_token)
    stop = int(shown[-1]) + 1 if len(shown) else 0
    return ids[:stop], ids[stop:]


def _pieces(ids: Sequence[int], frames: np.ndarray, frame_token: int, n: int):
    """Cuts a prefix into (tokens, frames [m, ...]) of at most PIECE frames and PIECE_TEXT text tokens, none in a
    frame."""
    start = at = text = count = first = 0
    while at < len(ids):
        whole = ids[at] == frame_token
        if (count == PIECE) if whole else (text == PIECE_TEXT):
            yield ids[start:at], frames[first : first + count]
            start, first, text, count = at, first + count, 0, 0
        at, text, count = (at + n, text, count + 1) if whole else (at + 1, text + 1, count)
    if at > start:
        yield ids[start:at], frames[first : first + count]
