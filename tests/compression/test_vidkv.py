"""Codes of keys and values: numbers of the public code and of our form, round trips, and what must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmod_jax.compression import vidkv


@pytest.fixture(scope="module")
def golden(goldens):
    path = goldens / "compression" / "vidkv.npz"
    if not path.exists():
        pytest.skip(f"no {path}")
    return np.load(path)


def groups(x, size):
    """[B, S, K, h] -> [B, g, K, G, h]"""
    batch, slots, heads, width = x.shape
    return jnp.asarray(x).reshape(batch, slots // size, size, heads, width).swapaxes(2, 3)


def tokens(x):
    """[B, g, K, G, h] -> [B, S, K, h]"""
    return np.asarray(x.swapaxes(2, 3)).reshape(x.shape[0], -1, x.shape[2], x.shape[4])


def test_our_form_is_the_golden_one(golden):
    g, dtype = int(golden["group"]), jnp.float32
    key, value = groups(golden["key"], g), groups(golden["value"], g)
    close = lambda name, x: np.testing.assert_allclose(np.asarray(x), golden[name], atol=2e-5, rtol=0)  # noqa: E731
    same = lambda name, x: np.testing.assert_array_equal(np.asarray(x), golden[name])  # noqa: E731
    ternary = vidkv.encode_ternary(value, dtype=dtype)
    same("ternary_bytes", ternary.packed)
    close("ternary_scale", ternary.scale)
    close("ternary_out", tokens(vidkv.decode_ternary(ternary, g)))
    two = vidkv.encode_two(value, dtype)
    same("two_bytes", two.packed)
    close("two_scale", two.scale)
    close("two_min", two.least)
    close("two_out", tokens(vidkv.decode_two(two)))
    mixed = vidkv.encode_mixed(key, dtype=dtype)
    same("mixed_hard", vidkv.hard_channels(mixed))
    same("mixed_two_bytes", mixed.two.packed)
    close("mixed_two_scale", mixed.two.scale)
    close("mixed_two_min", mixed.two.least)
    same("mixed_one_bytes", mixed.one.packed)
    close("mixed_one_scale", mixed.one.scale)
    close("mixed_out", tokens(vidkv.decode_mixed(mixed)))
    close("mixed_plain_out", tokens(vidkv.decode_mixed(vidkv.encode_mixed(key, fft=False, dtype=dtype), fft=False)))
    close("mixed_quarter_out", tokens(vidkv.decode_mixed(vidkv.encode_mixed(key, 0.25, dtype=dtype))))


def words(codes, bits):
    """The public packing: codes [B, S, K, h] in 32-bit words over tokens -> i32[B, K, h, S bits / 32]."""
    codes = np.asarray(codes).astype(np.uint64).transpose(0, 2, 3, 1)
    each = 32 // bits
    codes = codes.reshape(*codes.shape[:-1], -1, each) << (bits * np.arange(each, dtype=np.uint64))
    return codes.sum(-1).astype(np.uint32).view(np.int32)


def test_the_public_numbers_are_ours_but_for_packing_and_what_the_module_says(golden):
    g = int(golden["group"])
    close = lambda name, x: np.testing.assert_allclose(np.asarray(x), golden[name], atol=2e-5, rtol=0)  # noqa: E731
    by_channel = lambda x: np.moveaxis(np.asarray(x), 1, -1)  # noqa: E731  [B, g, K, h] -> [B, K, h, g]
    two = vidkv.encode_two(groups(golden["public_key_two"], g), jnp.float32)
    np.testing.assert_array_equal(words(tokens(vidkv.unpack(two.packed, 2)), 2), golden["public_two_packed"])
    close("public_two_scale", by_channel(two.scale))
    close("public_two_min", by_channel(two.least))
    close("public_two_out", tokens(vidkv.decode_two(two)))
    one = vidkv.encode_one(groups(golden["key"], g), jnp.float32)
    bits = tokens(vidkv.unpack(one.packed, 1))
    np.testing.assert_array_equal(words(bits, 1), golden["public_one_packed"])
    close("public_one_scale", by_channel(one.scale))
    close("public_one_out", bits * np.repeat(np.asarray(one.scale), g, 1).reshape(bits.shape))  # {0, s}, not {-s, s}
    value = groups(golden["value"], g)
    codes, _ = vidkv.trits(value, 0.5)
    np.testing.assert_array_equal(words(tokens(codes) + 1, 2), golden["public_ternary_packed"])
    close("public_ternary_scale", by_channel(jnp.abs(value).mean(-2)))
    close("public_ternary_out", tokens(codes))  # the scale is lost


def test_a_constant_two_values_and_zeros_come_back_exactly():
    x = jnp.full((16, 4), 0.5)
    for decoded in (vidkv.decode_two(vidkv.encode_two(x)), vidkv.decode_ternary(vidkv.encode_ternary(x), 16)):
        np.testing.assert_array_equal(decoded, x)
    pair = jnp.where(jnp.arange(16)[:, None] % 3 == 0, -1.0, 2.0) * jnp.ones(4)
    np.testing.assert_array_equal(vidkv.decode_two(vidkv.encode_two(pair)), pair)
    for coded in (
        vidkv.decode_two(vidkv.encode_two(0 * x)),
        vidkv.decode_ternary(vidkv.encode_ternary(0 * x), 16),
        vidkv.decode_mixed(vidkv.encode_mixed(0 * x)),
    ):
        np.testing.assert_array_equal(coded, 0 * x)


@pytest.mark.parametrize("name", ["two", "ternary", "mixed"])
def test_scaling_by_a_power_of_two_and_permuting_heads_commute_with_coding(name):
    coded = {
        "two": lambda x: vidkv.decode_two(vidkv.encode_two(x)),
        "ternary": lambda x: vidkv.decode_ternary(vidkv.encode_ternary(x), 16),
        "mixed": lambda x: vidkv.decode_mixed(vidkv.encode_mixed(x)),
    }[name]
    x = jax.random.normal(jax.random.key(0), (3, 16, 24))
    np.testing.assert_array_equal(coded(4 * x), 4 * coded(x))
    np.testing.assert_array_equal(coded(x[::-1]), coded(x)[::-1])
    np.testing.assert_array_equal(coded(x[1:2]), coded(x)[1:2])


def test_errors_are_within_a_step():
    x = jax.random.normal(jax.random.key(1), (2, 64, 32))
    two = vidkv.encode_two(x, jnp.float32)
    assert (jnp.abs(vidkv.decode_two(two) - x) <= two.scale[:, None] / 2 + 1e-6).all()
    ternary = vidkv.decode_ternary(vidkv.encode_ternary(x, dtype=jnp.float32), 64)
    relative = lambda y: float(jnp.linalg.norm(y - x) / jnp.linalg.norm(x))  # noqa: E731
    assert relative(ternary) < 0.45  # 0.43 for a normal
    assert relative(vidkv.decode_mixed(vidkv.encode_mixed(x, dtype=jnp.float32))) < 0.55


def test_packing_is_its_slow_description():
    rng = np.random.default_rng(0)
    codes, bits = rng.integers(-1, 2, (16, 3)), rng.integers(0, 4, (16, 3))
    flat = [*codes.T.reshape(-1), -1, -1]
    slow = [sum((int(c) + 1) * 3**i for i, c in enumerate(flat[j : j + 5])) for j in range(0, 50, 5)]
    packed = vidkv.pack_trits(jnp.asarray(codes))
    np.testing.assert_array_equal(packed, slow)
    np.testing.assert_array_equal(vidkv.unpack_trits(packed, 16, 3), codes)
    packed = vidkv.pack(jnp.asarray(bits), 2)
    np.testing.assert_array_equal(packed[1, 2], sum(int(bits[4 + i, 2]) << 2 * i for i in range(4)))
    np.testing.assert_array_equal(vidkv.unpack(packed, 2), bits)


@pytest.mark.parametrize("m", [2, 4, 16, 96])
def test_the_spectrum_is_numpys(m):
    x = np.random.default_rng(m).normal(size=(5, m))
    y = np.fft.rfft(x)
    forward, back = vidkv.spectrum(m)
    np.testing.assert_allclose(x @ forward, np.concatenate([y.real, y.imag[:, 1 : m // 2]], 1), atol=1e-5)
    np.testing.assert_allclose(x @ forward @ back, x, atol=1e-5)
