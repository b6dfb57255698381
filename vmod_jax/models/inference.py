"""Parameters as a stream wants them, which reads every weight for every frame: LoRA merged, weights of 8 bits, every
layer's arrays its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from vmod_jax.models.llama import NO_LORA, LoraConfig
from vmod_jax.models.video_lm import VideoLMConfig

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def merge_lora(config: VideoLMConfig, params: Any) -> tuple[VideoLMConfig, Any]:
    """The same model without adapters: every kernel becomes W + (alpha / r) A B, summed in float32, in W's dtype.

    A head that is the embedding becomes one of its own.
    """
    if not config.lora.rank:
        return config, params
    llama = params["llama"]
    if config.llama.tie_word_embeddings:
        llama = {**llama, "head": {**llama["head"], "kernel": llama["embed"]["embedding"].T}}
    untied = dataclasses.replace(config.llama, tie_word_embeddings=False)
    merged = _linears({**params, "llama": llama}, lambda leaves: _merged(leaves, config.lora))
    return dataclasses.replace(config, llama=untied, lora=NO_LORA), merged


def to_int8(config: VideoLMConfig, params: Any) -> tuple[VideoLMConfig, Any]:
    """The same model, LoRA merged, with the decoder's kernels as {kernel: i8[..., in, out], scale: f32[..., out]}.

    Symmetric, one scale an output channel, weights alone: a weight is off by at most half of 1/127 of the largest of
    its channel. Embedding, norms, experts, connector and tower stay as they are, a head that is the embedding too.
    """
    config, params = merge_lora(config, params)
    return config, _linears(params, _quantized)


def unstack(params: Any) -> Any:
    """The same parameters with arrays of their own for every layer: `layers`, leaves [L, ...], -> a tuple `unstacked`.

    What is computed is the same. A frame's few tokens are soon done with a layer's weights, and copying them out of the
    stack, as XLA does on any device before a layer reads them, would take longer than reading them.
    """
    llama = dict(params["llama"])
    if "unstacked" in llama:
        return params
    leaves, tree = jax.tree.flatten(llama.pop("layers"))
    each = zip(*map(_split, leaves), strict=True)
    llama["unstacked"] = tuple(jax.tree.unflatten(tree, layer) for layer in each)
    return {**params, "llama": llama}


def stack(params: Any) -> Any:
    """What `unstack` was given."""
    llama = dict(params["llama"])
    if "unstacked" in llama:
        llama["layers"] = jax.tree.map(lambda *layers: jnp.stack(layers), *llama.pop("unstacked"))
    return {**params, "llama": llama}


_split = jax.jit(jnp.unstack)


def _linears(params: Any, change: Any) -> Any:
    """The parameters with `change` made to the leaves of every linear layer of the decoder."""
    llama = dict(params["llama"])

    def changed(layers):
        return {name: change(leaves) if name in LINEARS else leaves for name, leaves in layers.items()}

    if "unstacked" in llama:
        llama["unstacked"] = tuple(map(changed, llama["unstacked"]))
    else:
        llama["layers"] = changed(llama["layers"])
    if "head" in llama:
        llama["head"] = change(llama["head"])
    return {**params, "llama": llama}


@jax.jit
def _sum(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
    return (kernel.astype(jnp.float32) + scale * jnp.einsum("...ir,...ro->...io", a, b)).astype(kernel.dtype)


def _merged(leaves: dict[str, Array], lora: LoraConfig) -> dict[str, Array]:
    base = {name: leaf for name, leaf in leaves.items() if not name.startswith("lora_")}
    return {**base, "kernel": _sum(leaves["kernel"], leaves["lora_a"], leaves["lora_b"], jnp.float32(lora.scale))}


@jax.jit
def _round(kernel: Array) -> tuple[Array, Array]:
    kernel = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(kernel), axis=-2) / 127
    steps = kernel / jnp.where(scale > 0, scale, 1)[..., None, :]
    return jnp.round(steps).astype(jnp.int8), scale


def _quantized(leaves: dict[str, Array]) -> dict[str, Array]:
    if "kernel" not in leaves:  # a tied head has none
        return leaves
    kernel, scale = _round(leaves["kernel"])
    return {**leaves, "kernel": kernel, "scale": scale}
