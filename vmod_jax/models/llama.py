"""Llama: configuration from Hugging Face, parameters, and its layers as plain functions under a depth policy.

Parameters of all layers are stacked, one array a tensor whatever the policy, `layers/q/kernel: [L, d, H * h]`: a
checkpoint does not know under which policy it will run. Whole sequences go through the layers in one `lax.scan` a
segment of the policy; chunks of a stream through one layer after another (`_run_one_by_one`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from vmod_jax.errors import UserError, few, short
from vmod_jax.models import context, kv_cache, layer_expert
from vmod_jax.models.attention import NEVER, causal_attention, kept_by_remat
from vmod_jax.models.depth import LayerSpec, Policy, Segment, kept_counts, num_kept, segments
from vmod_jax.models.kv_cache import Cache, LayerCache
from vmod_jax.models.layout import Layout, Slots, add_rows, by_frame, compact, compaction_slots, take_frames, take_rows
from vmod_jax.models.placement import by_rows, on_rows
from vmod_jax.models.values import boolean, count, number

# --- configuration ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3.x's scaling of RoPE frequencies ("llama3"), or the division of all of them by a factor ("linear")."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class Kind(NamedTuple):
    """What sets a Hugging Face model type apart from a Llama; architecture: its class in transformers.

    head_dim: where its config.json says nothing; 0: hidden_size / heads.
    """

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int = 0


KINDS = {
    "llama": Kind("LlamaForCausalLM"),
    "mistral": Kind("MistralForCausalLM"),
    "qwen2": Kind("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Kind("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The part of a Hugging Face config (of a model type in `KINDS`) that decides what is computed; their names.

    qkv_bias: q, k and v add a bias (Qwen2); qk_norm: every head's q and k go through a norm before RoPE (Qwen3)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 8192
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"{self.num_attention_heads} attention heads cannot share {self.num_key_value_heads} key/value heads: "
                "the second must divide the first"
            )

    @classmethod
    def from_hf_config(cls, hf: dict[str, Any]) -> "LlamaConfig":
        """From config.json as a dictionary; both `rope_theta`/`rope_scaling` and transformers 5's `rope_parameters`.

        Raises UserError for an architecture or an option that this decoder does not compute.
        """
        if not isinstance(kind := hf.get("model_type", "llama"), str) or kind not in KINDS:
            raise UserError(f"model_type {short(kind)} is not supported: bring one of {', '.join(KINDS)}")
        missing = [
            name
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            if name not in hf
        ]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}: is it a Llama config?")
        for option in ("attention_bias", "mlp_bias"):
            if boolean(hf, option, False):
                raise UserError(f"{option}=true is not supported: bring a Llama without biases")
        if hf.get("hidden_act", "silu") != "silu":
            raise UserError(f"hidden_act {short(hf['hidden_act'])} is not supported: Llama's is silu")
        if boolean(hf, "use_sliding_window", False):
            raise UserError("use_sliding_window=true is not supported: bring a model whose layers see every token")
        hf = {name: value for name, value in hf.items() if value is not None or name not in _MAY_BE_NULL}
        heads = count(hf, "num_attention_heads")
        head_dim = count(hf, "head_dim", KINDS[kind].head_dim or count(hf, "hidden_size") // heads)
        if head_dim % 2:
            raise UserError(f"head_dim {head_dim} is odd: RoPE turns pairs; correct config.json")
        theta, scaling = _rope(hf)
        return cls(
            vocab_size=count(hf, "vocab_size"),
            hidden_size=count(hf, "hidden_size"),
            intermediate_size=count(hf, "intermediate_size"),
            num_hidden_layers=count(hf, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=count(hf, "num_key_value_heads", heads),
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=number(hf, "rms_norm_eps", 1e-6),
            tie_word_embeddings=boolean(hf, "tie_word_embeddings", False),
            max_position_embeddings=count(hf, "max_position_embeddings", 2048),
            qkv_bias=KINDS[kind].qkv_bias,
            qk_norm=KINDS[kind].qk_norm,
        )


_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters", "partial_rotary_factor")
# What a RoPE section holds beside its type and theta. A key that is not understood may change what is computed.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling of a config.json, as transformers 5 has them where it names RoPE twice.

    A `rope_scaling` that holds anything takes the place of all of `rope_parameters`; either one's own theta and
    length go before the config's, but for an `original_max_position_embeddings` of the config, which goes first.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(hf.get(name, {}), dict):
            raise UserError(f"config.json: {name} is {short(hf[name])}, not an object; correct it")
    rope = {**(hf.get("rope_scaling") or hf.get("rope_parameters") or {})}
    kinds = [rope.pop(name) for name in ("rope_type", "type") if name in rope] or ["default"]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise UserError(f"config.json: its RoPE has rope_type {short(kinds[0])} and type {short(kinds[1])}; keep one")
    if not isinstance(kinds[0], str) or kinds[0] not in _ROPE_KEYS:
        raise UserError(
            f"rope scaling {short(kinds[0])} is not supported: use a checkpoint with {', '.join(_ROPE_KEYS)} RoPE"
        )
    parts = [source.pop("partial_rotary_factor", 1) for source in (rope, {**hf})]
    if any(part != 1 for part in parts if part is not None):
        raise UserError("config.json: partial_rotary_factor is not supported: use a checkpoint that turns whole heads")
    theta = float(number({"rope_theta": 10000.0, **hf, **rope}, "rope_theta"))
    names = _ROPE_KEYS[kinds[0]]
    if unknown := sorted(rope.keys() - {"rope_theta", *names}):
        raise UserError(f"config.json: {few(unknown)} in its {kinds[0]} RoPE is not supported: use another checkpoint")
    if not names:
        return theta, None
    length = "original_max_position_embeddings"
    own = {length: hf.get("max_position_embeddings", 2048), **rope}
    own[length] = hf.get(length, own[length])
    factors: dict[str, Any] = {name: number(own, name) for name in names}
    scaling = RopeScaling(kinds[0], **factors)
    if scaling.rope_type == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UserError("config.json: high_freq_factor of its RoPE must be above low_freq_factor; correct it")
    return theta, scaling


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside every linear layer, `lm_head` included; rank 0 has none."""

    rank: int = 0
    alpha: float = 256.0
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


NO_LORA = LoraConfig()


# --- parameters -------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Holds a kernel [..., in, out], perhaps a bias [..., out], and its LoRA pair [..., in, r], [..., r, out].

    Calling it returns them. The base kernel is of `param_dtype`, ~ N(0, 1/in), a bias too, 0; LoRA is float32,
    a ~ N(0, 1/in), b = 0.
    """

    shape: tuple[int, int]
    layers: int | None = None
    lora: LoraConfig = NO_LORA
    param_dtype: Any = jnp.float32
    base: bool = True
    bias: bool = False

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        size_in, size_out = self.shape
        stack = () if self.layers is None else (self.layers,)
        params = {}
        if self.base:
            init = nn.initializers.normal(size_in**-0.5)
            params["kernel"] = self.param("kernel", init, (*stack, size_in, size_out), self.param_dtype)
        if self.bias:
            params["bias"] = self.param("bias", nn.initializers.zeros, (*stack, size_out), self.param_dtype)
        if self.has_variable("params", "scale"):  # of an int8 kernel: see `models/inference.py`
            params["scale"] = self.get_variable("params", "scale")
        if self.lora.rank:
            init_a = nn.initializers.normal(size_in**-0.5)
            params["lora_a"] = self.param("lora_a", init_a, (*stack, size_in, self.lora.rank), jnp.float32)
            zeros = nn.initializers.zeros
            params["lora_b"] = self.param("lora_b", zeros, (*stack, self.lora.rank, size_out), jnp.float32)
        return params


class Leaf(nn.Module):
    """Holds one array under the name `leaf`; calling it returns {leaf: array}."""

    leaf: str
    initializer: Any
    shape: tuple[int, ...]
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        return {self.leaf: self.param(self.leaf, self.initializer, self.shape, self.param_dtype)}


class StackedLayers(nn.Module):
    """Holds the parameters of all layers, stacked; calling it returns them as a tree, leaves [L, ...]."""

    config: LlamaConfig
    lora: LoraConfig
    param_dtype: Any
    expert_std: float

    @nn.compact
    def __call__(self) -> dict[str, dict[str, Array]]:
        c, stack = self.config, self.config.num_hidden_layers
        d, hidden = c.hidden_size, c.intermediate_size
        width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        shapes = {
            "q": (d, width),
            "k": (d, kv_width),
            "v": (d, kv_width),
            "o": (width, d),
            "gate": (d, hidden),
            "up": (d, hidden),
            "down": (hidden, d),
        }
        norms = {"input_norm": d, "post_norm": d} | ({"q_norm": c.head_dim, "k_norm": c.head_dim} if c.qk_norm else {})
        expert_init = nn.initializers.normal(self.expert_std)
        return {
            **{
                name: Leaf("scale", nn.initializers.ones, (stack, size), self.param_dtype, name=name)()
                for name, size in norms.items()
            },
            **{
                name: Linear(shape, stack, self.lora, self.param_dtype, bias=c.qkv_bias and name in "qkv", name=name)()
                for name, shape in shapes.items()
            },
            "expert": Leaf("kernel", expert_init, (stack, d), name="expert")(),
        }


class Llama(nn.Module):
    """Holds the parameters of the decoder and hands them to the functions below.

    expert_std: initial standard deviation of the LayerExperts' weights, one row [d] a layer.
    shared_router: all layers choose by the LayerExpert of layer 0 (see `share_router`)
    """

    config: LlamaConfig
    lora: LoraConfig = NO_LORA
    param_dtype: Any = jnp.float32
    expert_std: float = 0.0
    shared_router: bool = False

    def setup(self):
        c, dtype = self.config, self.param_dtype
        # Tokens enter the residual stream at the scale of what the layers add; a tied head wants logits of order one.
        embed_std = c.hidden_size**-0.5 if c.tie_word_embeddings else 1.0
        self.embed = Leaf("embedding", nn.initializers.normal(embed_std), (c.vocab_size, c.hidden_size), dtype)
        self.layers = StackedLayers(c, self.lora, dtype, self.expert_std)
        self.norm = Leaf("scale", nn.initializers.ones, (c.hidden_size,), dtype)
        self.head = Linear((c.hidden_size, c.vocab_size), None, self.lora, dtype, base=not c.tie_word_embeddings)

    def embedding(self) -> Array:
        """[V, d]"""
        return self.embed()["embedding"]

    def layer_params(self) -> dict[str, dict[str, Array]] | tuple[dict[str, dict[str, Array]], ...]:
        """Of all layers: every leaf with a leading axis of layers or, where they are kept so, a tuple of each one's."""
        layers = self.get_variable("params", "unstacked") if self.has_variable("params", "unstacked") else self.layers()
        return share_router(layers) if self.shared_router else layers

    def logits(self, hidden: Array) -> Array:
        """Final norm and head: [..., d] -> f32[..., V]."""
        hidden = rms_norm(hidden, self.norm()["scale"], self.config.rms_norm_eps)
        params = self.head()
        if self.config.tie_word_embeddings:
            params = {**params, "kernel": self.embedding().T}
        return linear(params, hidden, self.lora).astype(jnp.float32)


# --- plain functions --------------------------------------------------------------------------------------------------


def share_router(layers: Any) -> Any:
    """The layers with LayerExpert 0 in every one: one router for all, whose gradient comes from every layer.

    gamma-MoD (arXiv 2410.13859) shares its router too, and masks the tokens of questions from it. Here text is never
    skipped at all, so questions always are masked.
    """
    if isinstance(layers, tuple):
        return tuple({**layer, "expert": layers[0]["expert"]} for layer in layers)
    rows = layers["expert"]["kernel"]
    return {**layers, "expert": {"kernel": jnp.broadcast_to(rows[:1], rows.shape)}}


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square norm in float32, of any float type: [..., d], [d] -> [..., d] in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * scale.astype(x.dtype)


def linear(params: dict[str, Array], x: Array, lora: LoraConfig, dropout_key: Array | None = None) -> Array:
    """x W + bias + (alpha / r) drop(x) A B in x's dtype: [..., in] -> [..., out]. W may be int8, a scale a column."""
    y = x @ params["kernel"].astype(x.dtype)
    if "scale" in params:
        y = (y.astype(jnp.float32) * params["scale"]).astype(x.dtype)
    if "bias" in params:
        y += params["bias"].astype(x.dtype)
    if "lora_a" in params:
        low = x
        if dropout_key is not None and lora.dropout:
            kept = jax.random.bernoulli(dropout_key, 1 - lora.dropout, x.shape)
            low = jnp.where(kept, x / (1 - lora.dropout), 0)
        y += low_rank(low @ params["lora_a"].astype(x.dtype), (params["lora_b"] * lora.scale).astype(x.dtype))
    return y


@jax.custom_vjp
def low_rank(low: Array, b: Array) -> Array:
    """low B, the second half of LoRA's product: [..., r], [r, out] -> [..., out].

    Its own backward pass: left to itself, XLA for CPUs transposes the gradient [tokens, out] for the product that gives
    B's, and computes it element by element a second time on the way. Here only [tokens, r] is transposed.
    """
    return low @ b


def _low_rank_backward(saved, grad):
    low, b = saved
    tokens = tuple(range(low.ndim - 1))
    return grad @ b.T, lax.dot_general(low, grad, ((tokens, tokens), ((), ())))


low_rank.defvjp(lambda low, b: (low @ b, (low, b)), _low_rank_backward)


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angular frequency of each pair of a head's channels, in radians a token: f32[h / 2]."""
    h = config.head_dim
    # A power rounded once, as PyTorch's is: NumPy's in float32 is a bit off, which 2000 positions make much of.
    power = np.float64(config.rope_theta) ** (np.arange(0, h, 2, dtype=np.float32) / np.float32(h)).astype(np.float64)
    freq = 1 / power.astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return freq.astype(np.float32)
    if scaling.rope_type == "linear":
        return (freq / scaling.factor).astype(np.float32)
    # Llama 3.x: long wavelengths are stretched by `factor`, short ones stay, those between are blended.
    wavelength = 2 * np.pi / freq
    turns = scaling.original_max_position_embeddings / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return ((1 - blend) * freq / scaling.factor + blend * freq).astype(np.float32)


def rope(x: Array, position: Array, frequencies: np.ndarray) -> Array:
    """Rotates pairs (i, i + h/2) of channels by position * frequency. x: [B, T, H, h]; position: i32[B, T]."""
    angle = position[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def block_update(params, x: Array, position: Array, attention, config: LlamaConfig, lora: LoraConfig, key=None):
    """f of a Llama block, the sum of what its two branches add: x -> (attn + mlp, whatever `attention` returns more).

    x: [B, T, d]; position: i32[B, T]; attention: (q, k, v) -> (out, extra), after RoPE; key: for LoRA dropout
    """
    c, batch, size = config, *x.shape[:2]

    def project(name, y, index):
        return linear(params[name], y, lora, None if key is None else jax.random.fold_in(key, index))

    y = rms_norm(x, params["input_norm"]["scale"], c.rms_norm_eps)
    q = project("q", y, 0).reshape(batch, size, c.num_attention_heads, c.head_dim)
    k = project("k", y, 1).reshape(batch, size, c.num_key_value_heads, c.head_dim)
    v = project("v", y, 2).reshape(batch, size, c.num_key_value_heads, c.head_dim)
    if c.qk_norm:
        q = rms_norm(q, params["q_norm"]["scale"], c.rms_norm_eps)
        k = rms_norm(k, params["k_norm"]["scale"], c.rms_norm_eps)
    frequencies = rope_frequencies(c)
    out, extra = attention(rope(q, position, frequencies), rope(k, position, frequencies), v)
    a = project("o", out.reshape(batch, size, -1), 3)
    y = rms_norm(x + a, params["post_norm"]["scale"], c.rms_norm_eps)
    m = project("down", jax.nn.silu(project("gate", y, 4)) * project("up", y, 5), 6)
    return a + m, extra


# --- layers under a policy --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Routing:
    """How routed layers choose and scale.

    n: tokens a frame; gate: a name of `layer_expert.GATES`; seed: of the random selector.
    """

    n: int
    gate: str = "raw"
    always_keep_last: bool = False
    seed: int = 0


class Routed(NamedTuple):
    """What a routed layer decided. scores: f32[B, F, n] (its selector's); kept: i32[B, F, k], ascending."""

    scores: Array
    kept: Array


# What the backward pass of a block computes again: nothing; all of it, from its (compacted) input; or all of it but
# attention, whose output and log-sum-exp are kept.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda block: block,
    # A scan's body is not merged with another pass.
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
    "attention": functools.partial(jax.checkpoint, prevent_cse=False, policy=kept_by_remat),
}


def run_layers(
    params,
    x: Array,
    layout: Layout,
    policy: Policy,
    config: LlamaConfig,
    routing: Routing,
    lora: LoraConfig = NO_LORA,
    remat: str = "none",
    cache: Cache | None = None,
    dropout_key: Array | None = None,
    replay: dict[int, Array] | None = None,
    attention: str = "auto",
    chunks: bool = False,
) -> tuple[Array, dict[int, Routed], Cache | None]:
    """All layers over a chunk `x: [B, T, d]`, a whole sequence or, with a cache, the next part of a stream.

    params: of all layers, leaves [L, ...], or a tuple of each layer's own (`inference.unstack`)
    remat: a name of `REMAT`; attention: a name of `attention.BACKENDS`.
    chunks: the rows are this device's chunks of streams that are split over devices: see `context`.
    replay: kept indices i32[B, F, k] of routed layers to use in place of the selector's, by layer.
    Returns the hidden states [B, T, d], what each routed layer decided, and the cache with the chunk in it.
    """
    chex.assert_rank(x, 3)
    if remat not in REMAT:
        raise UserError(f"unknown remat policy '{remat}': use one of {', '.join(REMAT)}")
    # What is the same in all layers that keep k tokens a frame: once, not once a layer.
    with jax.named_scope("routing"):
        slots = {k: compaction_slots(layout, routing.n, k) for k in sorted(set(kept_counts(policy, routing.n)))}
    rows = _Rows(params, layout, slots, config, routing, lora, remat, dropout_key, replay, attention, chunks)
    if cache is not None or isinstance(params, tuple):
        return _run_one_by_one(rows, policy, x, cache)
    decided: dict[int, Routed] = {}
    for segment in segments(policy):
        x, routed = _run_segment(rows, segment, x)
        decided |= routed
    return x, dict(sorted(decided.items())), None


class _Rows(NamedTuple):
    """What every layer of one call shares."""

    params: Any
    layout: Layout
    slots: dict[int, Slots]
    config: LlamaConfig
    routing: Routing
    lora: LoraConfig
    remat: str
    dropout_key: Array | None
    replay: dict[int, Array] | None
    attention: str
    chunks: bool


_OPTIONS = ("config", "routing", "lora", "remat", "attention", "chunks")  # of `_Rows`: what is no array


def _run_one_by_one(rows: _Rows, policy: Policy, x: Array, cache: Cache | None):
    """Every layer on its own. A chunk of a stream is small beside the weights and the cache that it reads, and a scan
    would copy each layer's part of both out of their stacks before the layer reads it."""
    caches: list[LayerCache | None] = [None] * len(policy) if cache is None else list(cache.layers)
    decided: dict[int, Routed] = {}
    for i, spec in enumerate(policy):
        params = rows.params[i] if isinstance(rows.params, tuple) else _one(rows.params, i)
        replay = rows.replay[i] if rows.replay is not None and spec.selector is not None else None
        x, caches[i], routed = _layer(rows, spec, params, x, i, caches[i], replay)
        if routed is not None:
            decided[i] = routed
    return x, decided, None if cache is None else cache._replace(layers=tuple(caches))


def _layer(rows: _Rows, spec: LayerSpec, params, x: Array, layer: int, cache, replay):
    """One layer under `jit`: it is traced once, and lowered once, for all layers that are alike."""
    options = {name: getattr(rows, name) for name in _OPTIONS}
    arrays = {name: getattr(rows, name) for name in ("layout", "slots", "dropout_key")}
    return _traced_once(spec, tuple(options.items()), arrays, params, x, jnp.int32(layer), cache, replay)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _traced_once(spec: LayerSpec, options: tuple, arrays: dict[str, Any], params, x: Array, layer, cache, replay):
    rows = _Rows(params=None, replay=None, **arrays, **dict(options))
    return _run_layer(rows, spec, None, params, by_rows(x), layer, cache, replay)


def _run_layer(rows: _Rows, spec: LayerSpec, place: int | None, params, x: Array, layer, cache, replay):
    with jax.named_scope("routed_layer" if spec.routed else "layer"):
        run = _routed_layer if spec.routed else _full_layer
        return run(rows, spec, place, params, x, layer, cache, replay)


def _run_segment(rows: _Rows, segment: Segment, x: Array):
    """One scan over the repeats of a segment's unit."""
    size, repeats = len(segment.unit), segment.repeats

    def fold(leaf):
        """[L, ...] -> [repeats, size, ...]; [repeats, ...] for one layer: XLA would copy all weights to drop the 1."""
        leaf = leaf[segment.start : segment.stop]
        return leaf if size == 1 else leaf.reshape(repeats, size, *leaf.shape[1:])

    params = jax.tree.map(fold, rows.params)
    layers = jnp.arange(segment.start, segment.stop).reshape(repeats, size)
    replay = tuple(
        jnp.stack([rows.replay[segment.start + j + r * size] for r in range(repeats)])
        if rows.replay is not None and spec.selector is not None
        else None
        for j, spec in enumerate(segment.unit)
    )

    def step(x, xs):
        x = by_rows(x)
        params, layer, replay = xs
        decided = []
        for j, spec in enumerate(segment.unit):
            x, _, routed = _run_layer(rows, spec, None if size == 1 else j, params, x, layer[j], None, replay[j])
            decided.append(routed)
        return x, decided

    x, decided = lax.scan(step, x, (params, layers, replay))
    named = {
        segment.start + j + r * size: jax.tree.map(lambda leaf, r=r: leaf[r], routed)
        for j, routed in enumerate(decided)
        if routed is not None
        for r in range(repeats)
    }
    return x, named


def _attention(rows: _Rows, cache: LayerCache | None, position: Array, valid: Array):
    """Attention of a layer: causal over the chunk itself, over a stream's chunks on all devices or, with a cache, over
    what it holds and then the chunk.

    -> function (q, k, v) -> (out, cache)
    """
    if rows.chunks:
        return lambda q, k, v: (context.attention(q, k, v, valid.sum(1)), None)
    if cache is None:
        return lambda q, k, v: (causal_attention(q, k, v, rows.attention), None)

    def cached(q, k, v):
        grown = kv_cache.write(cache, k, v, jnp.where(valid, position, NEVER))
        # What was in use before is read from the grown cache: reading the old one would keep it from being donated.
        return kv_cache.attend(grown, q, k, v, cache.used, rows.attention), grown

    return cached


def _dropout_key(rows: _Rows, layer: Array):
    return None if rows.dropout_key is None else jax.random.fold_in(rows.dropout_key, layer)


def _one(params, place: int | None):
    """The parameters of a layer of a unit. Taken inside a checkpoint, which then saves the scan's own, no copies.

    place: in the unit; None where it is the only one (see `_run_segment`)
    """
    return params if place is None else jax.tree.map(lambda leaf: leaf[place], params)


def _full_layer(rows: _Rows, spec: LayerSpec, place: int | None, params, x, layer, cache, replay):
    """x + f(x) for every token."""
    layout = rows.layout

    def block(params, x):
        attention = _attention(rows, cache, layout.position, layout.valid)
        return block_update(
            _one(params, place), x, layout.position, attention, rows.config, rows.lora, _dropout_key(rows, layer)
        )

    update, cache = REMAT[rows.remat](block)(params, x)
    return x + update, cache, None


def _routed_layer(rows: _Rows, spec: LayerSpec, place: int | None, params, x, layer, cache, replay):
    """x + g f(x̂) for kept tokens, x + f(x̂) for text, and every other token as it is, to the bit."""
    layout, routing, n = rows.layout, rows.routing, rows.routing.n
    k = num_kept(n, spec.keep)
    weight = _one(params["expert"]["kernel"], place)

    # Which tokens: outside the checkpoint, so that the backward pass cannot choose others, and without a gradient,
    # which reaches the router through the gate alone.
    with jax.named_scope("routing"):
        routed = _choose(spec, lax.stop_gradient(x), lax.stop_gradient(weight), layout, routing, layer, k)
        if replay is not None and routed is not None:
            routed = routed._replace(kept=replay)
        kept = jnp.zeros((*layout.frame_start.shape, 0), jnp.int32) if routed is None else routed.kept
        packed = compact(layout, rows.slots[k], kept)
        # An empty slot comes after all others; it is given the position NEVER and no query of a real token sees it.
        position = jnp.take_along_axis(layout.position, packed.index, axis=1, mode="fill", fill_value=NEVER)
        valid = packed.index < x.shape[1]
        x_kept = take_rows(x, packed.index, packed.inverse)

    factor = None
    # With a cache no gradient is taken, and the gate is 1 without the work that only a gradient needs.
    if spec.selector == "learned" and routing.gate == "straight_through" and cache is None:
        # The gradient of the router's weight is summed over devices, as those of all weights are.
        scores = layer_expert.router_scores(lax.stop_gradient(x), weight)
        with jax.named_scope("routing"):
            scores = by_frame(scores, layout.frame_start, n, 0)
            factor = take_frames(layer_expert.straight_through(scores, routing.always_keep_last), layout, packed)

    def block(params, x_kept):
        params = _one(params, place)
        attention = _attention(rows, cache, position, valid)
        # RoPE of empty slots: any finite angle will do.
        rope_position = jnp.where(valid, position, 0)
        update, grown = block_update(
            params, x_kept, rope_position, attention, rows.config, rows.lora, _dropout_key(rows, layer)
        )
        if spec.selector == "learned":
            mu = layer_expert.router_scores(x_kept, params["expert"]["kernel"])
            gate = layer_expert.gate(routing.gate, mu) if factor is None else factor
            update = (update.astype(jnp.float32) * jnp.where(packed.vision, gate, 1.0)[..., None]).astype(update.dtype)
        return update, grown

    # The checkpoint saves the compacted rows, not the whole sequence.
    update, cache = REMAT[rows.remat](block)(params, x_kept)
    with jax.named_scope("routing"):
        return add_rows(x, update, packed.index, packed.inverse), cache, routed


def _choose(spec: LayerSpec, x, weight, layout: Layout, routing: Routing, layer, k: int) -> Routed | None:
    """What the layer's selector keeps of each frame; None where there is nothing to choose."""
    if spec.selector is None:
        return None
    n, frames = routing.n, layout.frame_start.shape
    if spec.selector == "uniform":
        kept = jnp.broadcast_to(layer_expert.uniform_indices(n, k), (*frames, k))
        return Routed(jax.nn.one_hot(kept, n).sum(-2), kept)
    if spec.selector == "random":
        scores = layer_expert.random_scores(routing.seed, layer, layout.frame_index, n)
    else:
        scores = by_frame(layer_expert.router_scores(x, weight), layout.frame_start, n, 0)
    select = functools.partial(layer_expert.select, k=k, always_keep_last=routing.always_keep_last)
    return Routed(scores, on_rows(select)(scores))
