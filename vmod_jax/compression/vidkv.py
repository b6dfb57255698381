"""Keys and values of 1 to 2 bits (VidKV, arXiv 2503.16257): G consecutive tokens of a channel share a scale.

    two      4 levels between the group's least and largest         2 bits, a scale and a minimum a channel
    ternary  -s, 0, s                                               1.6 bits (five in a byte), a scale a channel
    mixed    the channels of the widest range as `two`; the others  1 bit, a scale a channel of the spectrum
             as the signs of their spectrum over channels

Differs from the public code where that loses: ternary values keep their scale, which is the least-squares one; one bit
is -s or s and not 0 or s; the spectrum of m real channels takes m numbers; every group of every head chooses its own
wide channels. A scale is rounded to how it is stored before codes are taken against it.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Codes = Any  # a tree of arrays


# --- packing ----------------------------------------------------------------------------------------------------------


def pack(codes: Array, bits: int) -> Array:
    """Codes of 1 or 2 bits of consecutive tokens in a byte, little end first: [..., G, c] -> u8[..., G bits / 8, c]."""
    each = 8 // bits
    *lead, group, channels = codes.shape
    codes = codes.astype(jnp.uint8).reshape(*lead, group // each, each, channels)
    shift = (bits * jnp.arange(each, dtype=jnp.uint8))[:, None]
    return (codes << shift).sum(-2, dtype=jnp.uint8)


def unpack(packed: Array, bits: int) -> Array:
    """The inverse of `pack`: u8[..., G bits / 8, c] -> u8[..., G, c]."""
    each = 8 // bits
    *lead, rows, channels = packed.shape
    shift = (bits * jnp.arange(each, dtype=jnp.uint8))[:, None]
    codes = (packed[..., None, :] >> shift) & jnp.uint8(2**bits - 1)
    return codes.reshape(*lead, rows * each, channels)


def pack_trits(codes: Array) -> Array:
    """Codes -1, 0, 1 as c + 1 in base 3, five in a byte, token by token of a channel: [..., G, h] -> u8[..., bytes]."""
    *lead, group, channels = codes.shape
    digits = (jnp.swapaxes(codes, -1, -2) + 1).astype(jnp.uint8).reshape(*lead, group * channels)
    digits = jnp.pad(digits, [(0, 0)] * len(lead) + [(0, -digits.shape[-1] % 5)]).reshape(*lead, -1, 5)
    return (digits * jnp.array([1, 3, 9, 27, 81], jnp.uint8)).sum(-1, dtype=jnp.uint8)


def unpack_trits(packed: Array, group: int, channels: int) -> Array:
    """The inverse of `pack_trits`: u8[..., bytes] -> i8[..., G, h]."""
    digits = packed[..., None] // jnp.array([1, 3, 9, 27, 81], jnp.uint8) % jnp.uint8(3)
    digits = digits.reshape(*packed.shape[:-1], -1)[..., : group * channels]
    return jnp.swapaxes(digits.reshape(*packed.shape[:-1], channels, group), -1, -2).astype(jnp.int8) - 1


# --- two bits, ternary, one bit ---------------------------------------------------------------------------------------


class Two(NamedTuple):
    """packed: u8[..., G / 4, c]; scale, least: [..., c]"""

    packed: Array
    scale: Array
    least: Array


def encode_two(x: Array, dtype: Any = jnp.bfloat16) -> Two:
    """Four levels a channel: f32[..., G, c]. dtype: of scales and minima. A channel that is constant has scale 0."""
    least = x.min(-2).astype(dtype)
    scale = ((x.max(-2) - x.min(-2)) / 3).astype(dtype)
    step, low = (y.astype(jnp.float32)[..., None, :] for y in (scale, least))
    codes = jnp.round(jnp.clip((x - low) / jnp.where(step > 0, step, 1), 0, 3))
    return Two(pack(codes, 2), scale, least)


def decode_two(codes: Two) -> Array:
    """-> f32[..., G, c]"""
    step, low = (y.astype(jnp.float32)[..., None, :] for y in (codes.scale, codes.least))
    return unpack(codes.packed, 2).astype(jnp.float32) * step + low


class Ternary(NamedTuple):
    """packed: u8[..., ceil(G h / 5)]; scale: [..., h]"""

    packed: Array
    scale: Array


def trits(x: Array, gamma: float) -> tuple[Array, Array]:
    """sign(x) where |x| > gamma mean|x|, else 0, and the best scale for that: f32[..., G, h] -> (codes, [..., h])."""
    size = jnp.abs(x)
    there = size > gamma * size.mean(-2, keepdims=True)
    scale = jnp.where(there, size, 0).sum(-2) / jnp.maximum(there.sum(-2), 1)
    return jnp.sign(x) * there, scale


def encode_ternary(x: Array, gamma: float = 0.7, dtype: Any = jnp.bfloat16) -> Ternary:
    """Three levels a channel: f32[..., G, h]."""
    codes, scale = trits(x, gamma)
    return Ternary(pack_trits(codes), scale.astype(dtype))


def decode_ternary(codes: Ternary, group: int) -> Array:
    """-> f32[..., G, h]"""
    scale = codes.scale.astype(jnp.float32)
    return unpack_trits(codes.packed, group, scale.shape[-1]).astype(jnp.float32) * scale[..., None, :]


class One(NamedTuple):
    """packed: u8[..., G / 8, c]; scale: [..., c]"""

    packed: Array
    scale: Array


def encode_one(x: Array, dtype: Any = jnp.bfloat16) -> One:
    """Signs and the mean size a channel: f32[..., G, c]."""
    return One(pack(x >= 0, 1), jnp.abs(x).mean(-2).astype(dtype))


def decode_one(codes: One) -> Array:
    """-> f32[..., G, c]"""
    sign = 2 * unpack(codes.packed, 1).astype(jnp.float32) - 1
    return sign * codes.scale.astype(jnp.float32)[..., None, :]


# --- keys: wide channels by two bits, the others' spectrum by one -----------------------------------------------------


class Mixed(NamedTuple):
    """hard: u8[..., ceil(h / 8)], a bit a channel; two: of the d hard channels; one: of the m = h - d easy ones."""

    hard: Array
    two: Two
    one: One


@functools.cache
def spectrum(m: int) -> tuple[np.ndarray, np.ndarray]:
    """The real FFT of m channels as a matrix, and its inverse: f32[m, m] each, for x @ F and y @ inverse.

    Numbers of a spectrum are [re_0 ... re_{m/2}, im_1 ... im_{m/2-1}]. Products of [G, m] by [m, m] suit a matrix unit.
    """
    full = np.fft.rfft(np.eye(m), axis=-1)
    forward = np.concatenate([full.real, full.imag[:, 1 : (m + 1) // 2]], axis=-1)
    return forward.astype(np.float32), np.linalg.inv(forward).astype(np.float32)


def num_hard(channels: int, share: float) -> int:
    """How many channels take two bits: even, so that an even number is left for the spectrum."""
    return 2 * round(share * channels / 2)


def _split(hard: Array, d: int) -> tuple[Array, Array]:
    """Channels of two bits and of one, each ascending: bool[..., h] -> i32[..., d], i32[..., h - d]."""
    order = jnp.argsort(~hard, axis=-1, stable=True)
    return order[..., :d], order[..., d:]


def _take(x: Array, channels: Array) -> Array:
    return jnp.take_along_axis(x, channels[..., None, :], axis=-1)


def _turn(x: Array, matrix: np.ndarray) -> Array:
    return jnp.matmul(x, matrix, precision=lax.Precision.HIGHEST)


def encode_mixed(x: Array, share: float = 0.5, fft: bool = True, dtype: Any = jnp.bfloat16) -> Mixed:
    """Channels of the widest range (lower ones first in a tie) by two bits, the others by one: f32[..., G, h]."""
    channels, d = x.shape[-1], num_hard(x.shape[-1], share)
    _, widest = lax.top_k(x.max(-2) - x.min(-2), d)
    hard = (jnp.arange(channels) == widest[..., None]).any(-2)
    wide, easy = _split(hard, d)
    rest = _take(x, easy)
    if fft and d < channels:
        rest = _turn(rest, spectrum(channels - d)[0])
    bits = jnp.pad(hard, [(0, 0)] * (hard.ndim - 1) + [(0, -channels % 8)])
    return Mixed(pack(bits[..., None], 1)[..., 0], encode_two(_take(x, wide), dtype), encode_one(rest, dtype))


def hard_channels(codes: Mixed) -> Array:
    """Which channels take two bits: bool[..., h]."""
    channels = codes.two.scale.shape[-1] + codes.one.scale.shape[-1]
    return unpack(codes.hard[..., None], 1)[..., :channels, 0] > 0


def decode_mixed(codes: Mixed, fft: bool = True) -> Array:
    """-> f32[..., G, h]"""
    rest, d = decode_one(codes.one), codes.two.scale.shape[-1]
    if fft and rest.shape[-1]:
        rest = _turn(rest, spectrum(rest.shape[-1])[1])
    both = jnp.concatenate([decode_two(codes.two), rest], axis=-1)
    hard = hard_channels(codes)
    place = jnp.where(hard, jnp.cumsum(hard, -1) - 1, d + jnp.cumsum(~hard, -1) - 1)
    return _take(both, place)
