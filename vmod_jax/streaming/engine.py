"""One stream on the device: two compiled functions over a cache whose capacity grows by buckets.

Every array has a static shape: a chunk of text is padded to one of `TEXT_CHUNKS`, frames come `m` at a time behind a
little text, and the cache has a capacity, so many frames and so many text tokens, which doubles as a whole when a
stream outgrows either (`larger`). One stream passes through the same few capacities as another, whatever comes in it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vmod_jax.compression.forms import CACHES
from vmod_jax.errors import UserError
from vmod_jax.models import kv_cache
from vmod_jax.models.kv_cache import Cache
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, cache_slots, check_frames, make_cache

TEXT_CHUNKS = (8, 32, 128, 512)
FRAME_TEXT = 4  # text tokens in a chunk beside its frames and the intervals between them

# XLA for CPUs would otherwise begin with what depends on parameters alone: all layers' 8-bit weights made into floats.
_OPTIONS = {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}


def frames_chunk(n: int, width: int, interval: int) -> int:
    """Tokens of the chunk that `width` frames of n tokens come in, with `interval` tokens between them."""
    return FRAME_TEXT + width * n + (width - 1) * interval


class Mark(NamedTuple):
    """A place in a stream to which it can be rolled back: text tokens and frames before it."""

    text: int
    frames: int


def larger(capacity: Mark, max_frames: int) -> Mark:
    """The next capacity of a stream: twice the text, and twice the frames up to `max_frames`."""
    return Mark(text=2 * capacity.text, frames=min(2 * capacity.frames, max_frames))


class Programs:
    """The compiled functions of one model, shared by all its streams. `compiles` counts traces by name."""

    def __init__(self, config: VideoLMConfig):
        self.config, self.model = config, VideoLM(config)
        self.compiles: dict[str, int] = {}
        # The cache is donated: it is updated in place.
        compiled = functools.partial(
            jax.jit, donate_argnames="cache", compiler_options=_OPTIONS.get(jax.default_backend())
        )
        self.extend = compiled(self._extend)
        self.decode = compiled(self._decode, static_argnames="limit")
        self.grow = jax.jit(kv_cache.grow, static_argnames="slots")
        self.roll_back = jax.jit(kv_cache.roll_back, donate_argnames="cache")

    def _extend(self, params, cache: Cache, input_ids: Array, frames: Array | None, length: Array, read: Array):
        """Appends a chunk. input_ids: i32[1, C]; length: i32[1]; read: i32[R].

        -> (f32[R, V] logits there, {layer: i32[1, F, k] kept tokens} of the routed layers, cache)
        """
        self.compiles["extend"] = self.compiles.get("extend", 0) + 1
        apply: Any = functools.partial(self.model.apply, {"params": params})
        hidden, routed, cache = apply(input_ids, frames, length, cache, method="hidden")
        kept = {layer: decision.kept for layer, decision in routed.items()}
        return apply(hidden[0, read], method="logits"), kept, cache

    def _decode(self, params, cache: Cache, logits: Array, eos: Array, limit: int):
        """Decodes greedily from f32[1, V], the logits behind what the cache holds, to eos or `limit` tokens.

        -> (i32[limit] tokens, their count, whether eos came, cache). The cache then holds the tokens, eos not.
        """
        self.compiles["decode"] = self.compiles.get("decode", 0) + 1
        apply: Any = functools.partial(self.model.apply, {"params": params})

        def first_choice(logits):
            # A padded vocabulary may have a row for the frame token; a reply cannot show a frame.
            logits = jnp.where(jnp.arange(logits.size) == self.config.frame_token_id, -jnp.inf, logits)
            return jnp.argmax(logits).astype(jnp.int32)

        def step(state):
            cache, token, out, count = state
            out = out.at[count].set(token)
            hidden, _, cache = apply(token[None, None], None, jnp.ones(1, jnp.int32), cache, method="hidden")
            return cache, first_choice(apply(hidden[0, 0], method="logits")), out, count + 1

        state = (cache, first_choice(logits[0]), jnp.zeros(limit, jnp.int32), jnp.int32(0))
        cache, token, out, count = jax.lax.while_loop(lambda s: (s[1] != eos) & (s[3] < limit), step, state)
        return out, count, token == eos, cache


class Engine:
    """The device side of one stream: text and frames go in, logits and replies come out.

    announce: called with one line whenever the cache grows; chunk: tokens of the longest call of `feed_frames`, for
    caches that keep room for them.
    """

    def __init__(
        self,
        programs: Programs,
        params: Any,
        max_frames: int = 1200,
        first_frames: int = 64,
        first_text: int = 256,
        announce: Callable[[str], None] = lambda line: None,
        chunk: int = 0,
    ):
        self.programs, self.params, self.config = programs, params, programs.config
        self.max_frames, self.announce = max_frames, announce
        self.capacity = Mark(text=first_text, frames=min(first_frames, max_frames))
        self.used = Mark(0, 0)
        self.input_ids: list[int] = []  # everything the stream has been fed
        self.kept: dict[int, Array] = {}  # {layer: i32[1, width, k]} of the last frames that were sent
        self.text_chunks = [size for size in TEXT_CHUNKS if size <= CACHES[self.config.cache].longest]
        chunk = max(chunk, frames_chunk(self.config.tokens_per_frame, 1, 0), self.text_chunks[-1])
        self.cache = make_cache(self.config, self.capacity.frames, self.capacity.text, chunk=chunk)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that the stream holds on the device."""
        return kv_cache.num_bytes(self.cache)

    def _reserve(self, text: int, frames: int) -> None:
        need = Mark(self.used.text + text, self.used.frames + frames)
        if need.frames > self.max_frames:
            raise UserError(
                f"the stream has reached max_frames = {self.max_frames} frames "
                f"({self.max_frames / self.config.fps:.0f} s): start a new stream, or open it with a larger max_frames"
            )
        capacity = self.capacity
        while capacity.text < need.text or capacity.frames < need.frames:
            capacity = larger(capacity, self.max_frames)
        if capacity != self.capacity:
            slots = tuple(cache_slots(self.config, capacity.frames, capacity.text))
            self.cache, self.capacity = self.programs.grow(self.cache, slots), capacity
            self.announce(
                f"cache grown to {capacity.frames} frames and {capacity.text} text tokens "
                f"({self.cache_bytes / 2**20:.1f} MiB)"
            )

    def _record(self, ids: list[int], frames: int) -> None:
        n, positions = self.config.tokens_per_frame, self.config.llama.max_position_embeddings
        if len(self.input_ids) <= positions < len(self.input_ids) + len(ids):
            self.announce(
                f"the stream outgrows the {positions} positions that the model knows after {self.used.frames} frames: "
                "what it says from here on may make no sense; start a new stream"
            )
        self.input_ids += ids
        self.used = Mark(self.used.text + len(ids) - frames * n, self.used.frames + frames)

    def _text_chunk(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        size = next(size for size in self.text_chunks if size >= len(ids))
        chunk = np.zeros((1, size), np.int32)
        chunk[0, : len(ids)] = ids
        return chunk, np.array([len(ids)], np.int32)

    def feed_text(self, ids: list[int]) -> Array | None:
        """Appends text tokens of any number; -> f32[1, V], logits at the last (None for none)."""
        logits, longest = None, self.text_chunks[-1]
        for start in range(0, len(ids), longest):
            part = ids[start : start + longest]
            self._reserve(len(part), 0)
            chunk, length = self._text_chunk(part)
            logits, _, self.cache = self.programs.extend(self.params, self.cache, chunk, None, length, length - 1)
            self._record(part, 0)
        return logits

    def feed_frames(self, ids: list[int], frames: np.ndarray, interval: list[int], width: int = 1) -> np.ndarray:
        """Appends text, then frames with `interval` between them; -> f32[m, V], logits at each frame's last token.

        As `send_frames`, which returns before they are computed.
        """
        return np.asarray(self.send_frames(ids, frames, interval, width))[: len(frames)]

    def send_frames(self, ids: list[int], frames: np.ndarray, interval: list[int], width: int = 1) -> Array:
        """Appends text, then frames with `interval` between them; -> f32[width, V] on the device, padding last.

        frames: u8[m, S, S, 3] pixels or f32[m, n, d_v] features, m <= width; width: frames that the call is compiled
        for (the rest is padding).
        """
        n, count = self.config.tokens_per_frame, len(frames)
        frames = check_frames(self.config, frames, lead=1)
        self._reserve(len(ids) + (count - 1) * len(interval), count)  # before anything is fed
        if len(ids) > FRAME_TEXT:
            self.feed_text(ids[:-FRAME_TEXT])
            ids = ids[-FRAME_TEXT:]
        frame = [self.config.frame_token_id] * n
        tokens = list(ids)
        read = np.zeros(width, np.int32)
        for i in range(count):
            tokens += (interval if i else []) + frame
            read[i] = len(tokens) - 1
        chunk = np.zeros((1, frames_chunk(n, width, len(interval))), np.int32)
        chunk[0, : len(tokens)] = tokens
        padded = np.zeros((1, width, *frames.shape[1:]), frames.dtype)
        padded[0, :count] = frames
        length = np.array([len(tokens)], np.int32)
        logits, self.kept, self.cache = self.programs.extend(self.params, self.cache, chunk, padded, length, read)
        self._record(tokens, count)
        return logits

    @property
    def forgets_anything(self) -> bool:
        """Whether `forget_frames` can go back over all that the stream holds."""
        return CACHES[self.config.cache].exact

    def forget_frames(self, count: int, interval: list[int]) -> None:
        """Rolls back over the last `count` frames, each with the interval before it.

        Raises UserError where the cache holds some of what must stay as codes that those frames went into.
        """
        tokens = count * (self.config.tokens_per_frame + len(interval))
        if len(self.input_ids) - tokens < (first := int(kv_cache.exact_from(self.cache)[0])):
            raise UserError(
                f"a cache of '{self.config.cache}' keeps {len(self.input_ids) - first} tokens as they were: it cannot "
                f"go back {tokens}; take cache 'float'"
            )
        del self.input_ids[len(self.input_ids) - tokens :]
        self.used = Mark(self.used.text - count * len(interval), self.used.frames - count)
        position, frames = np.array([len(self.input_ids)], np.int32), np.array([self.used.frames], np.int32)
        self.cache = self.programs.roll_back(self.cache, position, frames)

    def generate(self, ids: list[int], eos: int, limit: int) -> tuple[list[int], bool]:
        """Appends text, at least a token, and decodes a reply greedily: -> (its tokens without eos, whether it ended by
        itself)."""
        self._reserve(len(ids) + limit, 0)
        logits = self.feed_text(ids)
        out, count, ended, self.cache = self.programs.decode(
            self.params, self.cache, logits, np.int32(eos), limit=limit
        )
        reply = np.asarray(out)[: int(count)].tolist()
        self._record(reply, 0)
        return reply, bool(ended)
