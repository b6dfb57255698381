"""Frozen vision encoders: a frame's pixels -> its `[CLS?] + h*w` tokens, row-major.

SigLIP (arXiv 2303.15343) and CLIP (arXiv 2103.00020) vision towers, and `patches`: an encoder without parameters for
tiny models. Which outputs become tokens: VideoLLM-MoD, section 3.1 (CLS first, then the average-pooled patches).

Dimensions: S image side, p patch side, G = S // p patches a side, N tokens inside the tower, d width (d_v), L layers.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vmod_jax.errors import UserError, few, short
from vmod_jax.models.values import boolean, count, number

Params = dict[str, Any]

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}

# What the encoders were trained on: (pixel / 255 - mean) / std, per RGB channel. `patches` shares SigLIP's [-1, 1].
_HALF = (0.5, 0.5, 0.5)
_NORMALISATION = {
    "siglip": (_HALF, _HALF),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "patches": (_HALF, _HALF),
}

# Hugging Face writes only what differs from its defaults, so reading a config needs them.
_HF_DEFAULTS = {
    "siglip": {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "clip": {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
_FILE = "vision: config.json"  # what errors name
_HF_DEFAULTS_OF_BOTH = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """An encoder's shape. `patches` uses only the first four fields; its hidden_size is `patches_width(patch_size)`."""

    kind: Literal["siglip", "clip", "patches"]
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    head: bool = True  # SigLIP's attention-pooling head, which makes its CLS token; CLIP and `patches` have none
    # None: tokens are the encoder's output; -1, -2, ...: the hidden state so far from the last, before any last norm
    feature_layer: int | None = None

    def __post_init__(self):
        """Raises UserError when the fields do not make an encoder."""
        if self.kind not in _NORMALISATION:
            raise UserError(f"vision: unknown encoder {self.kind!r}; use one of {', '.join(_NORMALISATION)}")
        if not 0 < self.patch_size <= self.image_size:
            raise UserError(f"vision: patch_size {self.patch_size} must lie between 1 and image_size {self.image_size}")
        if self.kind == "patches":
            if self.hidden_size != (width := patches_width(self.patch_size)):
                raise UserError(
                    f"vision: `patches` with patch_size {self.patch_size} has hidden_size {width} "
                    f"(3 * patch_size**2 + 8), not {self.hidden_size}"
                )
            return
        for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, field) <= 0:
                raise UserError(f"vision: {self.kind} needs a positive {field}, not {getattr(self, field)}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"vision: hidden_size {self.hidden_size} must be a multiple of the {self.num_attention_heads} heads"
            )
        if self.feature_layer is not None and not -self.num_hidden_layers <= self.feature_layer <= -1:
            raise UserError(f"vision: feature_layer {self.feature_layer}: give -1 to -{self.num_hidden_layers}")
        if self.hidden_act not in _ACTIVATIONS:
            raise UserError(f"vision: unknown hidden_act {self.hidden_act!r}; use one of {', '.join(_ACTIVATIONS)}")

    @property
    def side(self) -> int:
        """Patches a side, G: the finest grid of frame tokens."""
        return self.image_size // self.patch_size

    @property
    def layers_run(self) -> int:
        """Layers that the tokens go through; the others are held, so that the tree is the whole published encoder."""
        return self.num_hidden_layers + 1 + (-1 if self.feature_layer is None else self.feature_layer)

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> "VisionConfig":
        """The config.json of a SigLIP or CLIP vision model, or of a model that carries one as its `vision_config`.

        Raises UserError for other encoders and for shapes that this tower does not run.
        """
        kind = _hf_kind(config)
        if "vision_config" in config or "vision_config_dict" in config:
            # Old CLIP files repeat the vision config; where the two differ, `vision_config_dict` is the valid one.
            inner = {}
            for name in ("vision_config", "vision_config_dict"):
                if not isinstance(value := config.get(name) or {}, dict):
                    raise UserError(f"vision: {name} is {short(value)}, not an object; correct config.json")
                inner |= value
            kind = _hf_kind(inner) or kind
            config = inner
        if config.get("model_type") in ("siglip2", "siglip2_vision_model"):
            config = {
                **config,
                "image_size": _native_side(count(config, "num_patches", 256, file=_FILE))
                * _one_side(config.get("patch_size", 16), "patch_size"),
            }
        if kind is None:
            raise UserError(
                f"vision: model_type {short(config.get('model_type'))} is not an encoder that vmod runs; "
                "use a SigLIP or CLIP vision model"
            )
        if config.get("num_channels", 3) != 3:
            raise UserError(
                f"vision: num_channels {short(config['num_channels'])} is not RGB; use an encoder with 3 channels"
            )
        get = {**_HF_DEFAULTS_OF_BOTH, **_HF_DEFAULTS[kind], **config}
        return cls(
            kind=kind,
            image_size=_one_side(get["image_size"], "image_size"),
            patch_size=_one_side(get["patch_size"], "patch_size"),
            hidden_size=count(get, "hidden_size", file=_FILE),
            intermediate_size=count(get, "intermediate_size", file=_FILE),
            num_hidden_layers=count(get, "num_hidden_layers", file=_FILE),
            num_attention_heads=count(get, "num_attention_heads", file=_FILE),
            layer_norm_eps=number(get, "layer_norm_eps", file=_FILE),
            hidden_act=get["hidden_act"] if isinstance(get["hidden_act"], str) else short(get["hidden_act"]),
            head=boolean(get, "vision_use_head", True, file=_FILE),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VisionConfig":
        """The inverse of `to_dict`; raises UserError for unknown fields."""
        unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise UserError(f"vision: unknown fields {few(sorted(unknown))}; remove them")
        return cls(**values)


def _hf_kind(config: dict[str, Any]) -> Literal["siglip", "clip"] | None:
    kinds: dict[str, Literal["siglip", "clip"]] = {
        "siglip": "siglip",
        "siglip_vision_model": "siglip",  # SigLIP 2 of fixed resolution, too
        "siglip2": "siglip",  # of any resolution (NaFlex): run at that of its position table
        "siglip2_vision_model": "siglip",
        "clip": "clip",
        "clip_vision_model": "clip",
    }
    return kinds.get(str(config.get("model_type")))


def _native_side(patches: int) -> int:
    side = math.isqrt(patches)
    if side**2 != patches:
        raise UserError(f"vision: a table of {patches} positions is not square; use a SigLIP 2 with a square one")
    return side


def _one_side(value: Any, name: str) -> int:
    sides = {count({name: side}, name, file=_FILE) for side in (value if isinstance(value, list | tuple) else [value])}
    if len(sides) != 1:
        raise UserError(f"vision: {name} {short(value)} is not square; use an encoder of square images and patches")
    return sides.pop()


# ----------------------------------------------------------------------------------------------- parameters


def parameter_shapes(config: VisionConfig) -> Params:
    """The tower's parameter tree with a shape, a tuple of ints, at every leaf; {} for `patches`.

    Linear layers are `kernel` [in, out] and `bias` [out], layer norms `scale` and `bias` [d]; everything below
    `layers` has a leading L. The patch embedding is a linear layer on p * p * 3 pixels (row, column, channel).
    CLIP's `post_norm` takes no part in the tokens: it is held so that the tree is the whole published encoder.
    """
    if config.kind == "patches":
        return {}
    d, f, stack = config.hidden_size, config.intermediate_size, (config.num_hidden_layers,)

    def linear(inputs: int, outputs: int, lead: tuple[int, ...] = ()) -> Params:
        return {"kernel": (*lead, inputs, outputs), "bias": (*lead, outputs)}

    def norm(lead: tuple[int, ...] = ()) -> Params:
        return {"scale": (*lead, d), "bias": (*lead, d)}

    def attention_and_mlp(lead: tuple[int, ...] = ()) -> Params:
        square = {name: linear(d, d, lead) for name in "qkvo"}
        return {**square, "fc1": linear(d, f, lead), "fc2": linear(f, d, lead)}

    embed: Params = linear(3 * config.patch_size**2, d)
    tree = {
        "embed": embed,
        "layers": {"norm1": norm(stack), "norm2": norm(stack), **attention_and_mlp(stack)},
        "post_norm": norm(),
    }
    if config.kind == "clip":
        del embed["bias"]
        embed |= {"class": (d,), "position": (config.side**2 + 1, d)}
        tree["pre_norm"] = norm()
    else:
        embed["position"] = (config.side**2, d)
        if config.head:
            tree["head"] = {"probe": (d,), "norm": norm(), **attention_and_mlp()}
    return tree


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def num_params(config: VisionConfig) -> int:
    """How many numbers the tower holds; equal to the parameters of Hugging Face's module."""
    return sum(math.prod(shape) for shape in jax.tree.leaves(parameter_shapes(config), is_leaf=_is_shape))


def _init(key: jax.Array, shapes: Params, dtype: Any) -> Params:
    """Unit-variance starting values (towers are loaded, not trained; this is for tests and dummies)."""

    def leaf(path, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        match path[-1].key:
            case "scale":
                return jnp.ones(shape, dtype)
            case "bias":
                return jnp.zeros(shape, dtype)
            case "kernel":
                return jax.random.normal(key, shape, dtype) * shape[-2] ** -0.5
            case _:
                return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5

    leaves, structure = jax.tree.flatten(shapes, is_leaf=_is_shape)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
    return jax.tree_util.tree_map_with_path(leaf, shapes, keys, is_leaf=_is_shape)


# ------------------------------------------------------------------------------------------- the pure functions


def _averaging(size: int, windows: int) -> np.ndarray:
    """f32[windows, size]; row i averages [floor(i * size / windows), ceil((i + 1) * size / windows))."""
    matrix = np.zeros((windows, size), np.float32)
    for i in range(windows):
        start, stop = i * size // windows, -(-(i + 1) * size // windows)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def adaptive_avg_pool(x: jax.Array, h: int, w: int) -> jax.Array:
    """f32[..., H, W, d] -> f32[..., h, w, d], with the windows of torch's adaptive_avg_pool2d.

    The windows overlap where h does not divide H, and repeat rows where h exceeds it. Averaged in real float32 on every
    device: a default float32 product is bfloat16 on TPU.
    """
    chex.assert_type(x, jnp.float32)
    rows, columns = _averaging(x.shape[-3], h), _averaging(x.shape[-2], w)
    return jnp.einsum("iH,...HWd,jW->...ijd", rows, x, columns, precision=jax.lax.Precision.HIGHEST)


def normalise(pixels: jax.Array, config: VisionConfig) -> jax.Array:
    """u8[..., S, S, 3] -> f32 of the same shape, in the encoder's units."""
    mean, std = (np.asarray(values, np.float32) for values in _NORMALISATION[config.kind])
    return (pixels.astype(jnp.float32) / 255 - mean) / std


def patchify(x: jax.Array, p: int) -> jax.Array:
    """[..., H, W, 3] -> [..., (H // p) * (W // p), p * p * 3], row-major; what does not fill a patch is left out."""
    *lead, height, width, channels = x.shape
    h, w = height // p, width // p
    x = x[..., : h * p, : w * p, :].reshape(*lead, h, p, w, p, channels)
    return jnp.swapaxes(x, -4, -3).reshape(*lead, h * w, p * p * channels)


def layer_norm(params: Params, x: jax.Array, eps: float) -> jax.Array:
    """Over the last axis, in float32; x's dtype and shape out."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return (unit * params["scale"].astype(jnp.float32) + params["bias"].astype(jnp.float32)).astype(x.dtype)


def linear(params: Params, x: jax.Array) -> jax.Array:
    """x @ kernel + bias in x's dtype: [..., in] -> [..., out]."""
    return x @ params["kernel"].astype(x.dtype) + params["bias"].astype(x.dtype)


def attention(params: Params, x: jax.Array, context: jax.Array, heads: int) -> jax.Array:
    """Every row of x [..., Q, d] looks at all of context [..., N, d]; softmax in float32. [..., Q, d] in x's dtype."""

    def split(y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:-1], heads, -1)

    q, k, v = split(linear(params["q"], x)), split(linear(params["k"], context)), split(linear(params["v"], context))
    scores = jnp.einsum("...qhc,...khc->...hqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    mixed = jnp.einsum("...hqk,...khc->...qhc", jax.nn.softmax(scores).astype(v.dtype), v)
    return linear(params["o"], mixed.reshape(x.shape))


def mlp(params: Params, x: jax.Array, activation: str) -> jax.Array:
    """fc2(activation(fc1(x))): [..., d] -> [..., d]."""
    return linear(params["fc2"], _ACTIVATIONS[activation](linear(params["fc1"], x)))


def _layers(params: Params, x: jax.Array, config: VisionConfig) -> jax.Array:
    """The stack of pre-norm transformer layers, params with a leading L: [..., N, d] -> [..., N, d]."""
    if config.layers_run < config.num_hidden_layers:
        params = jax.tree.map(lambda leaf: leaf[: config.layers_run], params)

    def layer(x: jax.Array, params: Params) -> tuple[jax.Array, None]:
        y = layer_norm(params["norm1"], x, config.layer_norm_eps)
        x = x + attention(params, y, y, config.num_attention_heads)
        y = layer_norm(params["norm2"], x, config.layer_norm_eps)
        return x + mlp(params, y, config.hidden_act), None

    with jax.named_scope("vision_layers"):
        return jax.lax.scan(layer, x, params)[0]


def siglip(params: Params, x: jax.Array, config: VisionConfig) -> tuple[jax.Array | None, jax.Array]:
    """Normalised pixels [..., S, S, 3] -> the pooler output [..., d] (None without a head), patches [..., G*G, d]."""
    embed = params["embed"]
    x = linear(embed, patchify(x, config.patch_size)) + embed["position"].astype(x.dtype)
    x = _layers(params["layers"], x, config)
    if config.feature_layer is not None:
        return None, x
    x = layer_norm(params["post_norm"], x, config.layer_norm_eps)
    if not config.head:
        return None, x
    head = params["head"]
    probe = jnp.broadcast_to(head["probe"].astype(x.dtype), (*x.shape[:-2], 1, config.hidden_size))
    pooled = attention(head, probe, x, config.num_attention_heads)
    pooled = pooled + mlp(head, layer_norm(head["norm"], pooled, config.layer_norm_eps), config.hidden_act)
    return pooled[..., 0, :], x


def clip(params: Params, x: jax.Array, config: VisionConfig) -> tuple[jax.Array, jax.Array]:
    """Normalised pixels [..., S, S, 3] -> the class token [..., d], patches [..., G*G, d], no last norm."""
    embed = params["embed"]
    x = patchify(x, config.patch_size) @ embed["kernel"].astype(x.dtype)
    first = jnp.broadcast_to(embed["class"].astype(x.dtype), (*x.shape[:-2], 1, config.hidden_size))
    x = jnp.concatenate([first, x], axis=-2) + embed["position"].astype(x.dtype)
    x = _layers(params["layers"], layer_norm(params["pre_norm"], x, config.layer_norm_eps), config)
    return x[..., 0, :], x[..., 1:, :]


def patches_width(patch_size: int) -> int:
    """d_v of `patches`: a cell's p * p pixels of 3 channels, and a code of its place."""
    return 3 * patch_size**2 + 8


def patches(x: jax.Array, config: VisionConfig, grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Normalised pixels [..., S, S, 3] -> their mean cell [..., d], the cells [..., h*w, d], d = p * p * 3 + 8.

    A cell of the h x w grid is shrunk to p x p by averaging areas, and followed by a code of its row and column, since
    other encoders' tokens know their place too. A CLS-only frame is one cell, the whole image.
    """
    h, w = grid if all(grid) else (1, 1)
    pixels = patchify(adaptive_avg_pool(x, h * config.patch_size, w * config.patch_size), config.patch_size)
    places = np.concatenate([np.repeat(place_code(h), w, axis=0), np.tile(place_code(w), (h, 1))], axis=-1)
    cells = jnp.concatenate([pixels, jnp.broadcast_to(places, (*pixels.shape[:-1], 8)).astype(pixels.dtype)], axis=-1)
    return cells.mean(-2), cells


def place_code(count: int) -> np.ndarray:
    """Sine and cosine of two frequencies along one axis of `count` cells: f64[count, 4]."""
    angle = np.pi / 2 * (np.linspace(-1, 1, count) if count > 1 else np.zeros(1))
    return np.stack([np.sin(angle), np.cos(angle), np.sin(2 * angle), np.cos(2 * angle)], axis=-1)


def check_frame_tokens(config: VisionConfig, cls: bool, grid: tuple[int, int]) -> int:
    """The number n of tokens a frame; raises UserError where the encoder cannot make them."""
    h, w = grid
    if not (h == w == 0 or (1 <= h <= config.side and 1 <= w <= config.side)):
        raise UserError(
            f"vision: a grid of {h}x{w} tokens does not fit; use 0x0 or 1x1 up to {config.side}x{config.side} "
            f"(image_size {config.image_size} / patch_size {config.patch_size})"
        )
    if not cls and h == 0:
        raise UserError("vision: a frame needs at least one token; turn cls on or give a grid")
    if cls and config.kind == "siglip" and (not config.head or config.feature_layer is not None):
        raise UserError("vision: this SigLIP has no pooling head, hence no CLS token; turn cls off")
    return int(cls) + h * w


def frame_tokens(
    params: Params,
    pixels: jax.Array,
    config: VisionConfig,
    cls: bool,
    grid: tuple[int, int],
    dtype: Any = jnp.float32,
) -> jax.Array:
    """u8[..., S, S, 3] -> f32[..., n, d]: CLS first if asked for, then the h x w averaged patches, row-major.

    `dtype` is what the tower computes in; norms, softmax and pooling stay float32. A full frame's attention scores take
    heads * N * N * 4 bytes (21 MB for SigLIP-L/16-384), so long videos go through in pieces.
    Raises UserError for a grid that the encoder does not have.
    """
    n = check_frame_tokens(config, cls, grid)
    chex.assert_type(pixels, jnp.uint8)
    chex.assert_shape(pixels, (..., config.image_size, config.image_size, 3))

    x = normalise(pixels, config)
    if config.kind == "patches":
        summary, cells = patches(x, config, grid)
    else:
        summary, cells = (siglip if config.kind == "siglip" else clip)(params, x.astype(dtype), config)
        h, w = grid
        if h:
            square = (*cells.shape[:-2], config.side, config.side, config.hidden_size)
            cells = adaptive_avg_pool(cells.astype(jnp.float32).reshape(square), h, w)
            cells = cells.reshape(*square[:-3], h * w, config.hidden_size)
    tokens = [] if not cls or summary is None else [summary[..., None, :].astype(jnp.float32)]
    tokens += [cells] if all(grid) else []
    tokens = jnp.concatenate(tokens, axis=-2)
    chex.assert_shape(tokens, (*pixels.shape[:-3], n, config.hidden_size))
    return tokens


class VisionTower(nn.Module):
    """Holds an encoder's parameters (tree: `parameter_shapes`) and calls `frame_tokens`."""

    config: VisionConfig
    cls: bool = True
    grid: tuple[int, int] = (3, 3)  # (0, 0): CLS only
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """u8[..., S, S, 3] -> f32[..., n, d_v], n = cls + h * w."""
        shapes = parameter_shapes(self.config)
        params = {name: self.param(name, _init, tree, self.param_dtype) for name, tree in shapes.items()}
        return frame_tokens(params, pixels, self.config, self.cls, self.grid, self.dtype)
