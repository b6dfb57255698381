"""In what form a layer of a stream's cache holds keys and values: a row of `CACHES`, named by `VideoLMConfig.cache`.

    float    as they are
    int8     8.25 bits a number and more exact, no decoding before an integer product
    2bit     2.5 bits
    vidkv2   keys of 1.9 bits, values of 2.5
    vidkv    keys of 1.9 bits, values of 1.85

Bits a number of a long stream, scales and all, at a head width of 128. The last `Codec.window` slots of a layer and a
chunk stay as they are: see `growing`. All forms hold `position: i32[B, S]`, NEVER in empty slots, and `used: i32[B]`
slots; `models/kv_cache.py` sees no more.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jax import Array

from vmod_jax.compression import floats, growing
from vmod_jax.compression.floats import NEVER, LayerCache
from vmod_jax.compression.growing import INT8, VIDKV, Codec, Grouped

__all__ = ["CACHES", "NEVER", "Form", "LayerCache", "form"]


class Form(NamedTuple):
    """holds: the type of what `make` gives, of which the other functions are.

    longest: tokens of text that are best written at once: some forms keep room for as many
    make: (slots, batch, kv_heads, head_dim, dtype, chunk) -> an empty layer; chunk: the most slots written at once
    write: (layer, key, value [B, C, K, h], position i32[B, C]) -> the layer with a chunk behind the slots in use;
        padding (position NEVER) is overwritten by the next chunk, what does not fit is dropped; `used` stays
    advance: (layer, count i32[B]) -> the layer with so many more slots in use
    read: layer -> keys, values [B, S, K, h] of all slots
    attend: (layer, q [B, C, H, h], used i32[B]) -> [B, C, H, h], attention of a chunk that was written behind `used`
        slots; None where an attention of floats takes what `read` gives
    grow: (layer, slots) -> the layer with so many slots
    roll_back: (layer, position i32[B]) -> the layer without tokens of that position or later
    exact_from: layer -> i32[B], the earliest position to which it can be rolled back
    num_bytes: layer, of arrays or of their shapes -> bytes of keys and values
    exact: whether it can be rolled back to any position
    """

    holds: type
    longest: int
    make: Callable[[int, int, int, int, Any, int], Any]
    write: Callable[[Any, Array, Array, Array], Any]
    advance: Callable[[Any, Array], Any]
    read: Callable[[Any], tuple[Array, Array]]
    attend: Callable[[Any, Array, Array], Array] | None
    grow: Callable[[Any, int], Any]
    roll_back: Callable[[Any, Array], Any]
    exact_from: Callable[[Any], Array]
    num_bytes: Callable[[Any], int]
    exact: bool = False


def coded(codec: Codec) -> Form:
    """The form whose groups of tokens a codec holds: see `growing`."""
    return Form(
        Grouped, 128, partial(growing.make, codec=codec), growing.write, growing.advance, growing.read, growing.attend,
        growing.grow, growing.roll_back, growing.exact_from, growing.num_bytes,
    )  # fmt: skip


CACHES = {
    "float": Form(
        LayerCache, 512, floats.make, floats.write, floats.advance, floats.read, None, floats.grow,
        floats.roll_back, floats.exact_from, floats.num_bytes, True,
    ),
    "int8": coded(INT8),
    "2bit": coded(Codec("two", "two")),
    "vidkv2": coded(dataclasses.replace(VIDKV, value="two")),
    "vidkv": coded(VIDKV),
}  # fmt: skip


def form(layer: Any) -> Form:
    """The functions of a layer that was made by one of CACHES: those of one type are the same but for `make`."""
    return next(form for form in CACHES.values() if isinstance(layer, form.holds))
