"""Context parallelism without devices: `vmap` with a named axis stands in for the mesh."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import VOCAB, draw_row, make_config, make_params

from vmod_jax.data.batch import Bucket, Row, chunk_stops, collate
from vmod_jax.models import context
from vmod_jax.models.attention import NEVER, attend, chunk_attention
from vmod_jax.models.context import AXIS, Beginning, zigzag
from vmod_jax.models.video_lm import VideoLM


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_zigzag_gives_every_device_the_same_share(devices):
    chunks = np.arange(2 * devices)
    order = zigzag(chunks[None], 2 * devices)[0]
    assert sorted(order) == list(chunks)
    # Chunk i attends to i others and, causally, to itself: i + 1 / 2 of a square.
    work = (order + 0.5).reshape(devices, 2).sum(1)
    assert (work == work[0]).all()
    np.testing.assert_array_equal(zigzag(np.arange(4 * devices)[None], 2 * devices)[0].reshape(-1, 2)[:, 0], 2 * order)


def _draw(devices, size, seed, batch=2, heads=4, kv_heads=2, width=8):
    """Chunks in stream order [B, 2C, S, heads, h] and their lengths i32[B, 2C], some of them nothing and all."""
    rng = np.random.default_rng(seed)
    shape = (batch, 2 * devices, size)
    q, k, v = (jnp.asarray(rng.normal(size=(*shape, n, width)), jnp.float32) for n in (heads, kv_heads, kv_heads))
    length = rng.integers(0, size + 1, shape[:2])
    length[0, 1], length[1, -1] = 0, size
    return q, k, v, jnp.asarray(length, jnp.int32)


def _expected(q, k, v, length):
    """By `attend`, over all chunks end to end."""
    batch, chunks, size = q.shape[:3]
    flat = lambda x: x.reshape(batch, chunks * size, *x.shape[3:])  # noqa: E731
    there = flat(jnp.arange(size) < length[..., None])
    position = jnp.where(there, jnp.cumsum(there, axis=1) - 1, NEVER)
    out = attend(flat(q), flat(k), flat(v), position, position)
    return jnp.where(there[..., None, None], out, 0).reshape(q.shape)


def _mask(out, length):
    return jnp.where((jnp.arange(out.shape[2]) < length[..., None])[..., None, None], out, 0)


def _sharded(q, k, v, length):
    """`context.attention` on C devices -> stream order."""
    batch, chunks = q.shape[:2]
    split = lambda x: jnp.moveaxis(zigzag(x, chunks).reshape(batch, -1, 2, *x.shape[2:]), 1, 0)  # noqa: E731
    rows = [split(x).reshape(chunks // 2, 2 * batch, *x.shape[2:]) for x in (q, k, v, length)]
    out = jax.vmap(context.attention, axis_name=AXIS)(*rows)
    out = jnp.moveaxis(out.reshape(chunks // 2, batch, 2, *out.shape[2:]), 0, 1).reshape(q.shape)
    return _mask(out[:, np.argsort(zigzag(np.arange(chunks)[None], chunks)[0])], length)


def _all_chunks(q, k, v, length):
    """`chunk_attention` in tiles of 8, all chunks at once."""
    there = jnp.arange(q.shape[2]) < length[..., None]
    return _mask(chunk_attention(q, k, v, jnp.arange(q.shape[1]), there, block=8), length)


@pytest.mark.parametrize(("function", "devices", "size"), [(_sharded, 2, 12), (_sharded, 3, 5), (_all_chunks, 2, 20)])
def test_sharded_attention_is_attention(function, devices, size):
    *qkv, length = _draw(devices, size, seed=devices)
    weight = jnp.asarray(np.random.default_rng(9).normal(size=qkv[0].shape), jnp.float32)

    def both(attention):
        value = lambda *qkv: (jnp.sum((out := attention(*qkv, length)) * weight), out)  # noqa: E731
        (_, out), gradient = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(*qkv)
        return out, *gradient

    for got, expected in zip(both(function), both(_expected), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


# --- the whole model --------------------------------------------------------------------------------------------------


def _batch(rows, fmt, chunks):
    """Rows (ids, frames) as chunks, in the smallest bucket, without labels."""
    none = np.zeros(0, np.int32)
    made = [
        Row(ids, frames, none, none, none.astype(np.float32), none.astype(bool), chunk_stops(ids, fmt, chunks))
        for ids, frames in rows
    ]
    tokens, frames = np.max([np.diff(row.stops, axis=0, prepend=0) for row in made], axis=(0, 1))
    return collate(made, [Bucket(chunks * int(frames), chunks * int(tokens), 0)], fmt.tokens_per_frame)


def _stream_order(x, batch, chunks):
    """[B, chunks, T, V] -> of each row its tokens, end to end."""
    return [np.concatenate([x[b, c, : batch["length"][b, c]] for c in range(chunks)]) for b in range(len(x))]


@pytest.mark.parametrize(
    ("policy", "gate", "devices"),
    [
        ("interleaved", "raw", 2),
        ("random", "tanh", 3),
        pytest.param("all", "sigmoid", 2, marks=pytest.mark.slow),
        pytest.param("uniform", "raw", 2, marks=pytest.mark.slow),
        pytest.param("layer_skip", "raw", 2, marks=pytest.mark.slow),
    ],
)
def test_the_whole_model_over_chunks_is_the_whole_model(policy, gate, devices):
    config = make_config(policy, gate)
    params, chunks, n = make_params(config), 2 * devices, config.tokens_per_frame
    fmt = types.SimpleNamespace(frame_token_id=VOCAB, tokens_per_frame=n)
    _, ids, features, expected = draw_row(config, params, seed=3)
    text = np.random.default_rng(4).integers(0, VOCAB, len(ids)).astype(np.int32)  # a row without frames
    model = VideoLM(config)
    none = np.zeros((1, 0, n, config.vision_hidden_size), np.float32)
    expected_text = model.apply({"params": params}, text[None], none).logits[0]
    batch = _batch([(ids, features), (text, none[0])], fmt, chunks)

    def local(ids, frames, length, position, frame):
        hidden, _ = model.apply(
            {"params": params}, ids, frames, length=length, begin=Beginning(position, frame), method="hidden"
        )
        return model.apply({"params": params}, hidden, method="logits")

    def split(name, scalar=False):
        x = batch[name]
        x = zigzag(x, chunks).reshape(2, devices, 2, *([] if scalar else [x.shape[1] // chunks]), *x.shape[2:])
        return jnp.moveaxis(x, 1, 0).reshape(devices, 4, *x.shape[3:])

    arrays = [split(name) for name in ("input_ids", "frames")]
    arrays += [split(name, scalar=True) for name in ("length", "first_position", "first_frame")]
    out = np.asarray(jax.jit(jax.vmap(local, axis_name=AXIS))(*arrays))  # [C, 2 rows x 2 chunks, T, V]
    out = np.moveaxis(out.reshape(devices, 2, 2, *out.shape[2:]), 0, 1).reshape(2, chunks, *out.shape[2:])
    out = out[:, np.argsort(zigzag(np.arange(chunks)[None], chunks)[0])]
    for got, exact in zip(_stream_order(out, batch, chunks), (expected, expected_text), strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-5 * np.abs(exact).max())


# --- the split --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_chunks_hold_every_token_once_and_frames_whole(seed):
    rng = np.random.default_rng(seed)
    n, chunks = int(rng.integers(1, 12)), 2 * int(rng.integers(1, 5))
    fmt = types.SimpleNamespace(frame_token_id=9, tokens_per_frame=n)
    frames = int(rng.integers(0, 15)) if seed else 0
    pieces = [np.concatenate([rng.integers(0, 9, rng.integers(0, 8)), np.full(n, 9)]) for _ in range(frames)]
    ids = np.concatenate([*pieces, rng.integers(0, 9, rng.integers(1, 40))]).astype(np.int32)
    stops = chunk_stops(ids, fmt, chunks)
    tokens, whole = np.diff(stops, axis=0, prepend=0).T
    assert stops[-1].tolist() == [len(ids), frames]
    assert (tokens >= 0).all()
    assert (tokens <= -(-len(ids) // chunks) + n).all()
    for stop, count, frame in zip(stops[:, 0], tokens, whole, strict=True):
        assert (ids[stop - count : stop] == 9).sum() == n * frame
