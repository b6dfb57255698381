"""Which layers to route, by the rank of their attention maps (gamma-MoD, arXiv 2410.13859).

A layer whose attention maps have a low rank mixes tokens in few ways, and can do without many of them: gamma-MoD routes
the layers of lowest rank, measured before routing, on a model that computes everything. It also shares one router
(`model.shared_router`) and hides the tokens of questions from it; here text is never skipped at all, in any policy: a
reply's tokens come one by one, and a choice among them would need those to come.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from vmod_jax.errors import UserError
from vmod_jax.lm import LanguageModel
from vmod_jax.models.layout import find_frames
from vmod_jax.models.llama import block_update
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, check_frames


def attention_ranks(
    lm: LanguageModel, input_ids: Any, frames: Any, length: Any = None, tolerance: float | None = None
) -> np.ndarray:
    """Each layer's ARank, the mean over rows and heads of the rank of its causal attention map: f32[L].

    Every layer computes every token, whatever the model's policy. A map is the softmax's weights, f32[t, t] over a
    row's t tokens, vision and text; its rank the number of singular values above `tolerance` times the largest.
    Default: t times float32's epsilon, as in numpy.linalg.matrix_rank. (A causal map is triangular with a positive
    diagonal, formally of full rank: its rank is low where some tokens hardly see themselves.)

    input_ids: i32[B, T], of which row b uses the first length[b] (default: all); frames: f32[B, F, n, d_v] features,
    u8[B, F, S, S, 3] pixels, or None. One map a head is held at a time, of one row and layer; time grows with t^3.
    """
    config, ids = lm.config, np.asarray(input_ids, np.int32)
    length = np.full(len(ids), ids.shape[1]) if length is None else np.asarray(length)
    frames = None if frames is None else check_frames(config, frames, lead=2)
    ranks = np.zeros((len(ids), config.llama.num_hidden_layers))
    for b, size in enumerate(length):
        x = _embed(config, lm.params, ids[b : b + 1], None if frames is None else frames[b : b + 1])
        for layer in range(ranks.shape[1]):
            x, maps = _layer(config, lm.params["llama"]["layers"], layer, x)
            # What comes behind the row's tokens is seen by none of them.
            ranks[b, layer] = np.linalg.matrix_rank(np.asarray(maps)[:, :size, :size], rtol=tolerance).mean()
    return ranks.mean(0).astype(np.float32)


def ranked_layers(ranks: Sequence[float] | np.ndarray, count: int) -> tuple[int, ...]:
    """The `count` layers of lowest rank, ascending; of equal ranks the lower layer. For `model.routed_layers`."""
    if not 0 <= count <= len(ranks):
        raise UserError(f"{count} layers of {len(ranks)} cannot be routed: give a count from 0 to {len(ranks)}")
    return tuple(sorted(np.argsort(ranks, kind="stable")[:count].tolist()))


@functools.partial(jax.jit, static_argnums=0)
def _embed(config: VideoLMConfig, params: Any, input_ids: Array, frames: Array | None) -> Array:
    """What enters the first layer: [1, T, d]."""
    count = 0 if frames is None else frames.shape[1]
    length = jnp.full(1, input_ids.shape[1])
    layout = find_frames(input_ids, length, config.frame_token_id, config.tokens_per_frame, count)
    return VideoLM(config).apply({"params": params}, input_ids, frames, layout, method="embed")  # type: ignore


@functools.partial(jax.jit, static_argnums=0)
def _layer(config: VideoLMConfig, stacked: Any, layer: Array | int, x: Array) -> tuple[Array, Array]:
    """One block of the stacked ones over all tokens of a row: [1, T, d] -> (x + f(x), its maps f32[H, T, T])."""
    params = jax.tree.map(lambda leaf: leaf[layer], stacked)
    position = jnp.arange(x.shape[1])[None]
    update, maps = block_update(params, x, position, _attention, config.llama, config.lora)
    return x + update, maps[0]


def _attention(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Causal attention in real float32, with its map: q: [B, T, H, h]; k, v: [B, T, K, h] -> (as q, f32[B, H, T, T])"""
    q32, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    logits = dot("bthd,bshd->bhts", q32, k) * q.shape[-1] ** -0.5
    maps = jax.nn.softmax(jnp.where(jnp.tri(q.shape[1], dtype=bool), logits, -jnp.inf))
    return dot("bhts,bshd->bthd", maps, v).astype(q.dtype), maps
