"""Attention by small integers: the papers' numbers, block by block, a stream and its kernel."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmod_jax.compression import int8, sage
from vmod_jax.compression.online import dot, from_rows, to_rows
from vmod_jax.compression.sage import SAGE4, SAGE8, Variant

causal = jax.jit(sage.causal, static_argnames="variant")
cached = jax.jit(sage.cached, static_argnames="variant")
kernel = jax.jit(functools.partial(sage.kernel, interpret=True), static_argnames="variant")


@pytest.fixture(scope="module")
def golden(goldens):
    folder = goldens / "compression"
    if not (folder / "sage.npz").exists():
        pytest.skip(f"no {folder}/sage.npz")
    metrics = json.loads((folder / "sage.json").read_text())
    return np.load(folder / "sage.npz"), next(iter(metrics.values()))


def exact_attention(q, k, v, seen):
    """In float64: q: [B, H, T, h]; k, v: [B, K, S, h]; seen: bool[T, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = np.where(seen, q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def near(got, expected, l1=1e-3):
    """The goldens' limits of float32 code."""
    got = np.asarray(got, np.float64)
    assert np.abs(got - expected).max() <= 0.1
    assert np.abs(got - expected).sum() <= l1 * np.abs(expected).sum()


def away(x):
    """Half away from zero, as the public kernels round."""
    return jnp.trunc(x + jnp.where(x >= 0, 0.5, -0.5))


def test_the_public_quantisers_and_block_attention(golden):
    arrays, metrics = golden
    q, v = jnp.asarray(arrays["q"], jnp.float32), jnp.asarray(arrays["v"], jnp.float32)
    k = jnp.asarray(arrays["k"] - arrays["k_mean"], jnp.float32)
    size, width = q.shape[2:]
    factor = np.float32(width**-0.5 * np.log2(np.e))
    coded = {
        "block_q": sage.quantise(q * factor, sage.block_rows(size, 128), rounding=away),
        "block_k": sage.quantise(k, sage.block_rows(size, 64), rounding=away),
        "thread_q": sage.quantise(q, sage.thread_queries(size), eps=1e-7, rounding=away),
        "thread_k": sage.quantise(k, sage.thread_keys(size), eps=1e-7, rounding=away),
    }
    for name, (codes, scale) in coded.items():
        apart = np.abs(np.asarray(codes, np.int32) - arrays[f"public_{name}"])
        assert apart.max() <= 1, name
        assert apart.mean() <= 1e-3, name
        np.testing.assert_allclose(scale, arrays[f"public_{name}_scale"], rtol=1e-6, err_msg=name)
    groups = q.shape[1] // k.shape[1]
    (q_codes, q_scale), (k_codes, k_scale) = coded["block_q"], coded["block_k"]
    rows = lambda scale, block: jnp.repeat(scale, block, -1)[..., :size]  # noqa: E731
    logits = sage._integer_dot(q_codes, jnp.repeat(k_codes, groups, 1)) * rows(q_scale, 128)[..., None]
    logits *= jnp.repeat(rows(k_scale, 64), groups, 1)[..., None, :]
    for name, seen in (("causal", np.tri(size, dtype=bool)), ("full", np.ones((size, size), bool))):
        hidden = jnp.where(seen, logits, -jnp.inf)
        top = hidden.max(-1, keepdims=True)
        weights = jnp.exp2(hidden - top)
        total = weights.sum(-1, keepdims=True)
        out = weights @ jnp.repeat(v, groups, 1) / total
        np.testing.assert_allclose(out, np.float32(arrays[f"public_block_out_{name}"]), atol=5e-3, rtol=0)
        np.testing.assert_allclose((top + jnp.log2(total))[..., 0], arrays[f"public_block_lse2_{name}"], atol=1e-4)
        found = sage.compare(jnp.asarray(exact_attention(arrays["q"], arrays["k"], v, seen)), out)
        np.testing.assert_allclose(found, metrics[f"public_block_{name}"], atol=1e-3)


def test_the_papers_definition(golden):
    arrays, metrics = golden
    run = jax.jit(sage.paper, static_argnames=("causal", "variant"))
    t = arrays["8b_tail"].shape[2]
    tail = [arrays[name][:, :, :t] for name in "qkv"]
    whole = [arrays[name] for name in "qkv"]
    unsmoothed = SAGE4._replace(smooth=False)
    for name, inputs, is_causal, variant in (
        ("8b_causal", whole, True, SAGE8),
        ("8b_full", whole, False, SAGE8),
        ("4b_causal", whole, True, SAGE4),
        ("4b_full", whole, False, SAGE4),
        ("4b_q_unsmoothed_causal", whole, True, unsmoothed),
        ("4b_q_unsmoothed_full", whole, False, unsmoothed),
        ("8b_tail", tail, True, SAGE8),
    ):
        out = run(*map(jnp.asarray, inputs), is_causal, variant)
        if name in arrays:
            near(out, arrays[name])
        size = out.shape[2]
        seen = np.tri(size, dtype=bool) if is_causal else np.ones((size, size), bool)
        found = sage.compare(jnp.asarray(exact_attention(*inputs, seen)), out)
        np.testing.assert_allclose(found, metrics[name], atol=1e-3, err_msg=name)


def test_a_chunk_against_settled_blocks(golden):
    arrays, metrics = golden
    n, c, settled, block = map(int, arrays["cache_sizes"])
    assert block == sage.BLOCK
    q, k, v = (jnp.asarray(arrays[name], jnp.float32).swapaxes(1, 2) for name in "qkv")
    chunk, kv_heads = q[:, n : n + c], k.shape[2]
    groups = q.shape[2] // kv_heads
    rows = to_rows(chunk, kv_heads)
    by_head = rows.reshape(*rows.shape[:2], groups, c, -1)
    of_rows = sage.thread_queries(c)
    scale = sage.quantise(by_head, of_rows)[1][..., of_rows[0]].reshape(*rows.shape[:3], 1)
    seen = jnp.arange(settled, n + c) <= jnp.tile(n + jnp.arange(c), groups)[:, None]
    exact = arrays["cache_exact"]
    for values in ("none", "int8", "e4m3"):
        variant = Variant(values="float" if values == "none" else values)
        blocks = sage.encode_blocks(k[:, :settled], v[:, :settled], variant)
        queries = sage.encode_queries(rows, variant, scale)
        count = jnp.full((1, rows.shape[2]), settled // block)
        near_keys, near_values = (x[:, settled : n + c] for x in (k, v))
        out, running = (
            from_rows(
                sage.blocked_attention(queries, blocks, count, near_keys, near_values, seen[None], variant, whole),
                chunk,
            ).swapaxes(1, 2)
            for whole in (True, False)
        )
        name = f"cache_{values}"
        near(out, arrays[name], 2e-3 if values == "e4m3" else 1e-3)
        np.testing.assert_allclose(sage.compare(jnp.asarray(exact), out), metrics[name], atol=1e-3)
        near(running, arrays[name], 0.03)
        if values != "e4m3":
            np.testing.assert_allclose(out, arrays[name], atol=3e-3)


def draw(size, heads=4, kv_heads=2, width=16, batch=2, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = lambda count: (batch, size, count, width)  # noqa: E731
    q, k, v = (jax.random.normal(key, shape(n)) for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True))
    return q, k + 2 * jnp.arange(width) / width, v


def exact(q, k, v):
    heads = lambda x: np.asarray(x).swapaxes(1, 2)  # noqa: E731
    return exact_attention(heads(q), heads(k), heads(v), np.tri(q.shape[1], dtype=bool)).swapaxes(1, 2)


@pytest.mark.parametrize("variant", [SAGE8, SAGE4, Variant(values="float")], ids=["8", "4", "8float"])
def test_the_kernel_is_the_plain_form(variant):
    q, k, v = draw(150)
    np.testing.assert_allclose(kernel(q, k, v, variant), causal(q, k, v, variant), atol=1e-5)


def test_it_is_attention_as_near_as_the_papers_say():
    q, k, v = draw(320)
    cosine, l1, _ = sage.compare(jnp.asarray(exact(q, k, v)), causal(q, k, v))
    assert cosine >= 0.999
    assert l1 <= 0.05


def test_without_rounding_it_is_attention():
    """Means by block and means of all keys are one in exact arithmetic."""
    q, k, v = draw(200)
    fine = lambda x, scale, limit: x / jnp.where(scale > 0, scale, 1)[..., None, :]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "_codes", fine)
        patch.setattr(sage, "_integer_dot", functools.partial(dot, "...th,...sh->...ts"))
        patch.setattr(sage, "encode_queries", lambda rows, variant: _unrounded(rows, variant))
        for variant in (Variant(values="float"), SAGE4._replace(values="float")):
            np.testing.assert_allclose(sage.causal(q, k, v, variant), exact(q, k, v), atol=1e-5)


def _unrounded(rows, variant):
    mean = rows.mean(2, keepdims=True) * variant.smooth
    scale = jnp.abs(rows - mean).max(-1, keepdims=True) / variant.limit
    return sage.Queries(rows, (rows - mean) / scale, scale, jnp.broadcast_to(mean, rows.shape))


def test_a_stream_is_its_whole_sequence():
    q, k, v = draw(200)
    whole, at = causal(q, k, v), 0
    for size in (60, 10, 1, 64, 65):
        held = jnp.full((2, 256, 2, 16), 77.0)
        k_held, v_held = (held.at[:, : at + size].set(x[:, : at + size]) for x in (k, v))
        out = cached(q[:, at : at + size], k_held, v_held, jnp.full(2, at))
        np.testing.assert_allclose(out, whole[:, at : at + size], atol=2e-6)
        at += size


def test_nothing_later_and_no_other_row_changes_a_result():
    q, k, v = draw(150)
    out = causal(q, k, v)
    later = [x.at[:, 100:].set(50.0) for x in (q, k, v)]
    np.testing.assert_array_equal(causal(*later)[:, :100], out[:, :100])
    other = [x.at[1].multiply(30.0) for x in (q, k, v)]
    np.testing.assert_array_equal(causal(*other)[0], out[0])


def test_heads_constants_zeros_and_one_key():
    q, k, v = draw(130)
    out = causal(q, k, v)
    repeated = causal(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2))
    np.testing.assert_allclose(out, repeated, atol=1e-6)
    np.testing.assert_array_equal(causal(q[:, :, ::-1], k[:, :, ::-1], v[:, :, ::-1]), out[:, :, ::-1])
    _, l1, _ = sage.compare(out, causal(q, k + 1.5, v))
    assert l1 < 0.02
    zero = causal(q, k.at[:, :64].set(0), v.at[:, :64].set(0))
    assert np.isfinite(zero).all()
    np.testing.assert_allclose(causal(q[:, :1], k[:, :1], v[:, :1]), jnp.repeat(v[:, :1], 2, 2), atol=1e-6)
