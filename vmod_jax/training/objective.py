"""The training objective (paper section 3.3): cross-entropy at the labelled positions, and nowhere else."""

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
    there = label != IGNORE
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(there, label, 0))
    cross_entropy = jnp.where(there, cross_entropy, 0)

    def mean(values: jax.Array, among: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(among, values, 0)) / jnp.maximum(jnp.sum(among), 1)

    return mean(cross_entropy * label_weight, there), {
        "lm_loss": mean(cross_entropy, there & ~label_is_stream),
        "stream_loss": mean(cross_entropy, there & label_is_stream),
        "labels": jnp.sum(there).astype(jnp.float32),
    }
