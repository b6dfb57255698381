"""The LayerExpert: which tokens of each frame a layer computes (paper, section 3.2, eq. 1-2).

Selection is made frame by frame, so that no frame decides about another: training on a whole sequence and streaming
it are then the same function. Scores are float32, computed in real float32, because bf16 scores tie often among ten
tokens and flip with the order of a sum; ties go to the lower index.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from vmod_jax.errors import UserError

# What multiplies a kept token's update. `raw` is the paper's. `tanh` is exactly 1 for a zero router, so that a
# pretrained block is unharmed at the first step. `straight_through` scales nothing: its router learns by
# `straight_through`. Text is never scaled.
GATES = {
    "raw": lambda mu: mu,
    "tanh": lambda mu: 1 + 0.2 * jnp.tanh(mu),
    "sigmoid": jax.nn.sigmoid,
    "straight_through": jnp.ones_like,
}


def gate(name: str, mu: Array) -> Array:
    """The factor of a kept token's update, of the same shape as `mu: f32[...]`."""
    if name not in GATES:
        raise UserError(f"unknown gate '{name}': use one of {', '.join(GATES)}")
    return GATES[name](mu)


def straight_through(scores: Array, always_keep_last: bool = False) -> Array:
    """Exactly 1 for every token, with the gradient of `n` times its share of the frame's softmax.

    The router so learns which tokens' updates are worth more than those of the others of their frame, and nothing
    else: a gate that scales learns to make all updates larger besides, and a bounded one stops at its bound.
    A last token that is kept always has no part in it. scores: f32[B, F, n] -> f32[B, F, n]. Not in the paper.
    """
    if always_keep_last:
        scores = scores.at[..., -1].set(-jnp.inf)
    share = scores.shape[-1] * jax.nn.softmax(scores)
    return 1 + (share - lax.stop_gradient(share))


def router_init_std(gate_name: str, d: int) -> float:
    """Standard deviation of a router's initial weights.

    raw: 1/sqrt(d), so that mu has the scale of its input and the kept tokens' blocks are not all but switched off;
    the others: 0.02/sqrt(d), so that the gate starts at its value for 0 and selection is already spread.
    """
    return (1.0 if gate_name == "raw" else 0.02) / d**0.5


def router_scores(x: Array, weight: Array) -> Array:
    """mu = w . x in float32. x: [..., d] of any float type; weight: f32[d] -> f32[...]."""
    chex.assert_type(weight, jnp.float32)
    return jnp.einsum("...d,d->...", x.astype(jnp.float32), weight, precision=lax.Precision.HIGHEST)


def random_scores(seed: int, layer: Array | int, frame_index: Array, n: int) -> Array:
    """Scores that depend on (seed, layer, number of the frame in its stream) alone: i32[B, F] -> f32[B, F, n]."""
    key = jax.random.fold_in(jax.random.key(seed), layer)
    draw = lambda frame: jax.random.uniform(jax.random.fold_in(key, frame), (n,))  # noqa: E731
    return jax.vmap(jax.vmap(draw))(frame_index)


def uniform_indices(n: int, k: int) -> np.ndarray:
    """`k` indices spread evenly over a frame, its first token (CLS) included: i32[k]."""
    return np.round(np.linspace(0, n - 1, k)).astype(np.int32)


def select(scores: Array, k: int, always_keep_last: bool = False) -> Array:
    """The indices of the `k` highest scores of each frame, ascending: f32[B, F, n] -> i32[B, F, k].

    always_keep_last: the frame's last token, at which the model decides whether to speak, is always among them.
    """
    chex.assert_type(scores, jnp.float32)
    scores = jnp.where(scores == 0, 0.0, scores)  # top_k puts -0.0 below 0.0, but they are a tie
    if always_keep_last:
        scores = scores.at[..., -1].set(jnp.inf)
    return jnp.sort(lax.top_k(scores, k)[1], axis=-1).astype(jnp.int32)
