"""The training objective (paper section 3.3): cross-entropy at the labelled positions, and nowhere else."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from vmod_jax.data.conversation import IGNORE
from vmod_jax.models.layout import invert, take_rows


def gather_labelled(hidden: jax.Array, label_pos: jax.Array) -> jax.Array:
    """The hidden states that predict something: dtype[B, T, d] at i32[B, M] -> dtype[B, M, d].

    Positions outside the row (the padding, T) give zeros and get no gradient; those inside are unique, so that the
    gradient is a gather as well, without a scatter of floats.
    """
    chex.assert_rank([hidden, label_pos], [3, 2])
    return take_rows(hidden, label_pos, invert(label_pos, hidden.shape[1]))


# Logits f32[B, M, V] of more numbers a device than this (1 GiB, and as much for their gradient) are made in parts.
LARGEST = 1 << 28


def head_loss(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    label: jax.Array,
    label_weight: jax.Array,
    label_is_stream: jax.Array,
    largest: int = LARGEST,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`loss` of head(hidden), without logits of all labels at once where those are more than `largest` numbers.

    head: dtype[B, m, d] -> f32[B, m, V]; hidden: dtype[B, M, d] at the labelled positions. In parts, each part's logits
    are computed again on the way back, and where the head is split over devices each part gathers it anew.
    """
    batch, labels, _ = hidden.shape
    vocabulary = jax.eval_shape(head, hidden).shape[-1]
    parts = min(labels, -(-batch * labels * vocabulary // largest))
    if parts <= 1:
        return loss(head(hidden), label, label_weight, label_is_stream)
    size = -(-labels // parts)

    def split(x: jax.Array, fill: int = 0) -> jax.Array:
        """[B, M, ...] -> [parts, B, size, ...]: part i is labels i, i + parts, ..., a share of every device's."""
        x = jnp.pad(x, ((0, 0), (0, parts * size - labels), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, size, parts, *x.shape[2:]), 2, 0)

    part = jax.checkpoint(lambda hidden, label: _cross_entropy(head(hidden), label), prevent_cse=False)
    _, values = jax.lax.scan(lambda _, x: (None, part(*x)), None, (split(hidden), split(label, IGNORE)))
    return _means(jnp.moveaxis(values, 0, 2).reshape(batch, -1)[:, :labels], label, label_weight, label_is_stream)


def loss(
    logits: jax.Array, label: jax.Array, label_weight: jax.Array, label_is_stream: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """sum(CE * weight) / count(labels) over the whole batch.

    logits: f32[B, M, V] at the labelled positions; label: i32[B, M], -100 where there is none; label_weight: f32[B, M];
    label_is_stream: bool[B, M], the speak-or-stay-silent labels.
    Returns the loss f32[] and its parts, all f32[]: lm_loss and stream_loss, the unweighted mean cross-entropy of the
    assistant's text and of the frames (0 where the batch has none), and labels, their number.
    """
    batch, labels = label.shape
    chex.assert_shape(logits, (batch, labels, None))
    chex.assert_shape([label_weight, label_is_stream], (batch, labels))
    chex.assert_type([logits, label, label_weight, label_is_stream], [jnp.float32, jnp.int32, jnp.float32, bool])
    return _means(_cross_entropy(logits, label), label, label_weight, label_is_stream)


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """f32[B, M, V], i32[B, M] -> f32[B, M], 0 where there is no label."""
    there = label != IGNORE
    values = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(there, label, 0))
    return jnp.where(there, values, 0)


def _means(
    cross_entropy: jax.Array, label: jax.Array, label_weight: jax.Array, label_is_stream: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    there = label != IGNORE

    def mean(values: jax.Array, among: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(among, values, 0)) / jnp.maximum(jnp.sum(among), 1)

    return mean(cross_entropy * label_weight, there), {
        "lm_loss": mean(cross_entropy, there & ~label_is_stream),
        "stream_loss": mean(cross_entropy, there & label_is_stream),
        "labels": jnp.sum(there).astype(jnp.float32),
    }
