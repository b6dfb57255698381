"""The loss, against its definition written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmod_jax.training.objective import gather_labelled, head_loss, loss


@pytest.fixture
def batch():
    rng = np.random.default_rng(1)
    label = rng.integers(0, 7, (2, 5))
    label[0, 3:] = -100
    is_stream = rng.integers(0, 2, (2, 5)).astype(bool) & (label != -100)
    weight = np.where(label == -100, 0, np.where(is_stream, 0.25, 1)).astype(np.float32)
    logits = rng.normal(size=(2, 5, 7)).astype(np.float32)
    return logits, label.astype(np.int32), weight, is_stream


def test_definition(batch):
    logits, label, weight, is_stream = batch
    total, lm, stream, count = 0.0, [], [], 0
    for b in range(2):
        for m in range(5):
            if label[b, m] == -100:
                continue
            p = np.exp(logits[b, m].astype(np.float64))
            ce = -np.log(p[label[b, m]] / p.sum())
            total, count = total + ce * weight[b, m], count + 1
            (stream if is_stream[b, m] else lm).append(ce)
    assert lm
    assert stream
    value, parts = loss(*map(jnp.asarray, batch))
    np.testing.assert_allclose(value, total / count, rtol=1e-6)
    np.testing.assert_allclose(parts["lm_loss"], np.mean(lm), rtol=1e-6)
    np.testing.assert_allclose(parts["stream_loss"], np.mean(stream), rtol=1e-6)
    assert parts["labels"] == count


def test_padding_counts_for_nothing(batch):
    logits, label, weight, is_stream = map(jnp.asarray, batch)
    value, grad = jax.value_and_grad(lambda x: loss(x, label, weight, is_stream)[0])(logits)
    assert not grad[0, 3:].any()
    other = logits.at[0, 3:].set(1e30)
    assert loss(other, label, weight, is_stream)[0] == value
    empty = jnp.full_like(label, -100)
    value, parts = loss(logits, empty, weight, is_stream)
    assert value == parts["lm_loss"] == parts["stream_loss"] == 0


def test_hidden_states_at_the_labels():
    hidden = jnp.arange(24.0).reshape(2, 4, 3) + 1
    where = jnp.array([[0, 2, 4], [3, 4, 4]])
    got, pull = jax.vjp(lambda x: gather_labelled(x, where), hidden)
    np.testing.assert_array_equal(got[0], [hidden[0, 0], hidden[0, 2], [0, 0, 0]])
    np.testing.assert_array_equal(got[1], [hidden[1, 3], [0, 0, 0], [0, 0, 0]])
    (grad,) = pull(jnp.ones_like(got))
    np.testing.assert_array_equal(grad[..., 0], [[1, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("largest", [1, 28, 60])
def test_parts_of_the_labels_are_the_whole(batch, largest):
    """5, 3 and 2 parts, of which the last is padded or not; the gradient of the head too."""
    _, label, weight, is_stream = map(jnp.asarray, batch)
    rng = np.random.default_rng(2)
    hidden, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 3), (3, 7)))

    def run(largest):
        def value(hidden, kernel):
            return head_loss(lambda x: x @ kernel, hidden, label, weight, is_stream, largest)

        return jax.value_and_grad(value, (0, 1), has_aux=True)(hidden, kernel)

    whole, parts = run(70), run(largest)
    assert jax.tree.structure(whole) == jax.tree.structure(parts)
    for x, y in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def test_parts_never_hold_all_logits():
    """At Llama-3's vocabulary and 2048 labels the temporary memory is that of the parts."""
    labels, width, vocabulary = 2048, 16, 128256
    shapes = [(jnp.bfloat16, (1, labels, width)), (jnp.bfloat16, (width, vocabulary))]
    hidden, kernel = (jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in shapes)
    rest = jnp.zeros((1, labels), jnp.int32), jnp.ones((1, labels)), jnp.zeros((1, labels), bool)

    def temporary(largest):
        def value(hidden, kernel):
            return head_loss(lambda x: (x @ kernel).astype(jnp.float32), hidden, *rest, largest)[0]

        analysis = jax.jit(jax.grad(value)).lower(hidden, kernel).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    logits = 4 * labels * vocabulary
    assert temporary(labels * vocabulary) > logits
    assert temporary(labels * vocabulary // 16) < logits / 4


@pytest.mark.goldens
def test_loss_of_the_reference(goldens):
    """Weights of the tiny LiveLlama are another matter: here its logits alone give its loss."""
    import json

    arrays = np.load(goldens / "live" / "arrays.npz", allow_pickle=False)
    for i, sample in enumerate(json.loads((goldens / "live" / "samples.json").read_text())):
        labels = np.array(sample["labels"])
        (at,) = np.nonzero(labels != -100)
        label = labels[at][None].astype(np.int32)
        is_stream = np.array(sample["input_ids"])[at][None] == 422
        value, _ = loss(
            *map(jnp.asarray, (arrays[f"logits_{i}"][at][None], label, np.ones(label.shape, np.float32), is_stream))
        )
        np.testing.assert_allclose(value, sample["loss"], rtol=1e-5)
