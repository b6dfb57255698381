"""The whole model: frames -> vision tower -> connector -> Llama under a depth policy -> logits.

`VideoLM.hidden` is the one forward pass. Training calls it on whole sequences, a stream on one chunk after another
with a cache; both are the same function.
"""

import dataclasses
import json
from math import prod
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from vmod_jax.compression.forms import CACHES
from vmod_jax.compression.mergers import MERGERS
from vmod_jax.errors import UserError
from vmod_jax.models import kv_cache
from vmod_jax.models.attention import BACKENDS, round_slots
from vmod_jax.models.connectors import CONNECTORS, pool
from vmod_jax.models.context import Beginning
from vmod_jax.models.depth import LayerSpec, Policy, kept_counts
from vmod_jax.models.kv_cache import Cache
from vmod_jax.models.layer_expert import GATES, router_init_std
from vmod_jax.models.layout import Layout, find_frames, invert, take_rows
from vmod_jax.models.llama import (
    NO_LORA,
    REMAT,
    Leaf,
    Llama,
    LlamaConfig,
    LoraConfig,
    RopeScaling,
    Routed,
    Routing,
    run_layers,
)
from vmod_jax.models.placement import lookup
from vmod_jax.models.vision import VisionConfig, VisionTower

# How parameters are stored: every leaf below `layers` holds all layers, whatever the policy (there is no scan unit).
FORMAT = {"version": 1, "layers": "stacked"}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class VideoLMConfig:
    """Everything that decides what the model computes; `model.json` of a workdir.

    vision: None where frames come as features only; vision_hidden_size: d_v of those features
    cls, grid: a frame is its CLS token (if cls) and h x w pooled patches; frame_token_id: of the frame's place in text
    pooled: h' x w' tokens that `connector.pool` makes of those behind the connector; None: it leaves them as they are
    form: of its conversations, a name of `data.conversation.FORMS`
    newline_token_id: of a token whose embedding is not its row but `newline`, which closes a LLaVA's video
    policy: one LayerSpec a layer; gate, always_keep_last, router_seed: see `llama.Routing`
    shared_router: all routed layers choose by one LayerExpert, row 0 of the stacked ones
    remat, attention, connector, cache, merger: names of `llama.REMAT`, `attention.BACKENDS`, `connectors.CONNECTORS`,
    `compression.forms.CACHES` and `compression.mergers.MERGERS`
    dtype: of the computation; param_dtype: of frozen base weights (LoRA, connector and experts are float32)
    """

    llama: LlamaConfig
    policy: Policy
    frame_token_id: int
    vision_hidden_size: int
    vision: VisionConfig | None = None
    cls: bool = True
    grid: tuple[int, int] = (3, 3)
    interval: str = ","
    fps: float = 2.0
    gate: str = "raw"
    always_keep_last: bool = False
    router_seed: int = 0
    shared_router: bool = False
    lora: LoraConfig = NO_LORA
    remat: str = "none"
    attention: str = "auto"
    dtype: str = "float32"
    param_dtype: str = "float32"
    pooled: tuple[int, int] | None = None
    newline_token_id: int | None = None
    form: str = "plain"
    connector: str = "mlp"
    cache: str = "float"
    merger: str = "none"

    def __post_init__(self):
        if len(self.policy) != self.llama.num_hidden_layers:
            raise UserError(f"a policy of {len(self.policy)} layers for a model of {self.llama.num_hidden_layers}")
        for name, value, allowed in (
            ("gate", self.gate, GATES),
            ("remat", self.remat, REMAT),
            ("attention", self.attention, BACKENDS),
            ("connector", self.connector, CONNECTORS),
            ("cache", self.cache, CACHES),
            ("merger", self.merger, MERGERS),
            ("dtype", self.dtype, DTYPES),
            ("param_dtype", self.param_dtype, DTYPES),
        ):
            if value not in allowed:
                raise UserError(f"unknown {name} '{value}': use one of {', '.join(allowed)}")
        if self.tokens_per_frame < 1:
            raise UserError("a frame needs at least one token: turn cls on or give a grid such as (3, 3)")
        if self.pooled and self.cls:
            raise UserError("tokens that are pooled behind the connector are a grid's: turn cls off")

    @property
    def features_per_frame(self) -> int:
        """Features that the connector is given of a frame."""
        return int(self.cls) + self.grid[0] * self.grid[1]

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a frame in the language model."""
        return MERGERS[self.merger].count(prod(self.pooled) if self.pooled else self.features_per_frame)

    @property
    def routing(self) -> Routing:
        return Routing(self.tokens_per_frame, self.gate, self.always_keep_last, self.router_seed)

    @property
    def kept(self) -> tuple[int, ...]:
        """Tokens of a frame that each layer computes."""
        return kept_counts(self.policy, self.tokens_per_frame)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "VideoLMConfig":
        raw = json.loads(text)
        if (there := raw.pop("format", FORMAT)) != FORMAT:
            raise UserError(
                f"the model is in format {there}, this version reads {FORMAT}: use the version that wrote it"
            )
        scaling = raw["llama"].pop("rope_scaling", None)
        raw["llama"] = LlamaConfig(**raw["llama"], rope_scaling=RopeScaling(**scaling) if scaling else None)
        raw["policy"] = tuple(LayerSpec(**spec) for spec in raw["policy"])
        raw["lora"] = LoraConfig(**raw["lora"])
        raw["grid"] = tuple(raw["grid"])
        raw["pooled"] = tuple(raw["pooled"]) if raw.get("pooled") else None
        raw["vision"] = VisionConfig.from_dict(raw["vision"]) if raw.get("vision") else None
        return cls(**raw)


class Output(NamedTuple):
    """logits: f32[B, T, V]; routing: {layer: Routed(scores f32[B, F, n], kept i32[B, F, k])} of the routed layers."""

    logits: Array
    routing: dict[int, Routed]


class VideoLM(nn.Module):
    """VideoLLM-MoD (arXiv 2408.16730) as a Linen module."""

    config: VideoLMConfig

    def setup(self):
        c = self.config
        expert_std = router_init_std(c.gate, c.llama.hidden_size)
        self.llama = Llama(c.llama, c.lora, DTYPES[c.param_dtype], expert_std, c.shared_router)
        self.connector = CONNECTORS[c.connector](c.vision_hidden_size, c.llama.hidden_size, DTYPES[c.dtype])
        if c.vision is not None:
            self.vision = VisionTower(c.vision, cls=c.cls, grid=c.grid)
        if c.newline_token_id is not None:
            self.newline = Leaf("embedding", nn.initializers.normal(1.0), (c.llama.hidden_size,), DTYPES[c.param_dtype])

    def features(self, frames: Array) -> Array:
        """Frames to encoder features: u8[B, F, S, S, 3] pixels -> f32[B, F, n, d_v]; features pass as they are."""
        if frames.ndim == 4:
            chex.assert_shape(frames, (None, None, self.config.features_per_frame, self.config.vision_hidden_size))
            return frames
        if self.config.vision is None:
            raise UserError("this model has no vision tower: give it features f32[B, F, n, d_v], not pixels")
        return jax.lax.stop_gradient(self.vision(frames))

    def embed(self, input_ids: Array, frames: Array | None, layout: Layout) -> Array:
        """Text from the embedding table, frame tokens from the connector: -> [B, T, d]."""
        dtype = DTYPES[self.config.dtype]
        table = self.llama.embedding()
        # The frame token has no row of its own; its embedding is never looked at.
        text = lookup(table, jnp.clip(input_ids, 0, table.shape[0] - 1)).astype(dtype)
        if (newline := self.config.newline_token_id) is not None:
            text = jnp.where((input_ids == newline)[..., None], self.newline()["embedding"].astype(dtype), text)
        if frames is None or frames.shape[1] == 0:
            if self.is_initializing():
                self.connector(jnp.zeros((1, self.config.vision_hidden_size)))
            return text
        tokens = self.connector(self.features(frames))
        if self.config.pooled is not None:
            tokens = pool(tokens, self.config.grid, self.config.pooled)
        tokens = MERGERS[self.config.merger].merge(tokens.astype(dtype))
        tokens = tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
        index = jnp.where(layout.vision >= 0, layout.vision, tokens.shape[1])
        vision = take_rows(tokens, index, invert(index, tokens.shape[1]))
        return jnp.where((layout.vision >= 0)[..., None], vision, text)

    def hidden(
        self,
        input_ids: Array,
        frames: Array | None,
        length: Array | None = None,
        cache: Cache | None = None,
        replay: dict[int, Array] | None = None,
        begin: Beginning | None = None,
    ) -> Any:
        """The last layer's output before the final norm.

        input_ids: i32[B, T], of which row b uses the first length[b] (default: all); T >= n F + each row's text
        frames: f32[B, F, n, d_v] features, u8[B, F, S, S, 3] pixels, or None; a row uses as many as its text has
        cache: continue this stream; replay: {layer: kept i32[B, F, k]} instead of the selector's choice
        begin: the rows are this device's chunks of streams that are split over devices (see `context`)
        -> (hidden [B, T, d], {layer: Routed}) and, with a cache, the cache that includes this chunk
        """
        c = self.config
        chex.assert_rank(input_ids, 2)
        batch, size = input_ids.shape
        num_frames = 0 if frames is None else frames.shape[1]
        length = jnp.full(batch, size, jnp.int32) if length is None else length
        start = begin or ((0, 0) if cache is None else (cache.position, cache.frames))
        with jax.named_scope("routing"):
            layout = find_frames(input_ids, length, c.frame_token_id, c.tokens_per_frame, num_frames, *start)
        x = self.embed(input_ids, frames, layout)
        dropout_key = self.make_rng("dropout") if self.has_rng("dropout") else None
        x, routed, cache = run_layers(
            self.llama.layer_params(), x, layout, c.policy, c.llama, c.routing, c.lora, c.remat, cache,
            dropout_key, replay, c.attention, begin is not None,
        )  # fmt: skip
        for layer, decision in routed.items():
            self.sow("intermediates", f"routing_{layer}", decision)
        if cache is None:
            return x, routed
        shown = (layout.frame_start < size).sum(-1, dtype=jnp.int32)
        return x, routed, kv_cache.advance(cache, c.kept, c.tokens_per_frame, length, shown)

    def logits(self, hidden: Array) -> Array:
        """Hidden states of any leading shape to logits: [..., d] -> f32[..., V]."""
        return self.llama.logits(hidden)

    def __call__(self, input_ids: Array, frames: Array | None, length: Array | None = None, replay=None) -> Output:
        """Logits at every position; arguments as `hidden`."""
        hidden, routed = self.hidden(input_ids, frames, length, replay=replay)
        return Output(self.logits(hidden), routed)


def dummy_frames(config: VideoLMConfig, batch: int = 1, frames: int = 1) -> Array:
    """Zeros in the form in which the model takes frames: pixels where it has a tower, else features."""
    if config.vision is None:
        return jnp.zeros((batch, frames, config.features_per_frame, config.vision_hidden_size))
    return jnp.zeros((batch, frames, config.vision.image_size, config.vision.image_size, 3), jnp.uint8)


def check_frames(config: VideoLMConfig, frames: Any, lead: int) -> Any:
    """A user's frames with `lead` axes in front, u8[..., S, S, 3] pixels or [..., n, d_v] features (made float32).

    Raises UserError where they are not what the model takes.
    """
    features, pixels = (config.features_per_frame, config.vision_hidden_size), dummy_frames(config).shape[2:]
    if frames.shape[lead:] not in (features, pixels):
        takes = f"{list(pixels)}" if features == pixels else f"{list(pixels)} pixels or {list(features)} features"
        raise UserError(f"a frame of shape {list(frames.shape[lead:])}, but the model takes {takes}")
    if frames.shape[lead:] == features:
        return frames.astype(jnp.float32)
    if frames.dtype != jnp.uint8:
        raise UserError(f"a frame of {frames.dtype} pixels: give uint8, 0 to 255")
    return frames


def init_params(config: VideoLMConfig, key: Array) -> Any:
    """A freshly initialised parameter tree (see README for its names)."""
    ids = jnp.full((1, config.tokens_per_frame), config.frame_token_id)
    return VideoLM(config).init(key, ids, dummy_frames(config))["params"]


def make_cache(config: VideoLMConfig, frames: int, text: int, batch: int = 1, chunk: int = 512) -> Cache:
    """An empty cache with room for `frames` frames and `text` text tokens a row, fed in chunks of at most `chunk`."""
    c, slots, dtype = config.llama, cache_slots(config, frames, text), DTYPES[config.dtype]
    return kv_cache.make_cache(slots, batch, c.num_key_value_heads, c.head_dim, dtype, config.cache, chunk)


def cache_slots(config: VideoLMConfig, frames: int, text: int) -> list[int]:
    """Slots of each layer: text, and the kept tokens of every frame."""
    return [round_slots(max(1, text + frames * k)) for k in config.kept]


def num_params(params: Any) -> int:
    """Numbers in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
