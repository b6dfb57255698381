"""The cache of a stream: writing, growing and rolling back layers that hold different numbers of tokens."""

import jax.numpy as jnp
import numpy as np

from vmod_jax.models.attention import NEVER
from vmod_jax.models.kv_cache import advance, grow, make_cache, num_bytes, roll_back, write

N, KEPT = 3, (1, 3)  # a routed layer keeps 1 of a frame's 3 tokens, a full one all
WIDTH = 4


def feed(cache, tokens):
    """One chunk of a stream: "t" text, "F" a frame. Keys and values of a token are its position."""
    position, first = int(cache.position[0]), 0
    layers = []
    for layer, k in zip(cache.layers, KEPT, strict=True):
        at, place = [], position
        for token in tokens:
            at += [place] if token == "t" else [place + N - 1 - i for i in range(k)][::-1]
            place += 1 if token == "t" else N
        first = place - position
        at = np.array([at + [NEVER] * (8 - len(at))])  # chunks are padded
        value = np.broadcast_to(at[..., None, None], (1, 8, 1, WIDTH)).astype(np.float32)
        layers.append(write(layer, jnp.asarray(value), jnp.asarray(value) + k, jnp.asarray(at)))
    cache = cache._replace(layers=tuple(layers))
    return advance(cache, KEPT, N, jnp.array([first]), jnp.array([tokens.count("F")]))


def empty(text=6, frames=3):
    return make_cache([text + frames * k for k in KEPT], 1, 1, WIDTH, jnp.float32)


def drawn(cache):
    """Each layer's slots as a string: the position in hex, "." where empty."""
    rows = []
    for layer, k in zip(cache.layers, KEPT, strict=True):
        position = np.asarray(layer.position[0])
        rows.append("".join("." if p == NEVER else f"{p:x}" for p in position))
        for slot in np.flatnonzero(position != NEVER):
            assert (layer.key[0, slot] == position[slot]).all()
            assert (layer.value[0, slot] == position[slot] + k).all()
    return rows


def test_layers_hold_what_they_keep():
    cache = feed(empty(), "ttF")
    assert drawn(cache) == ["014......", "01234.........."]
    cache = feed(cache, "tF")
    assert drawn(cache) == ["01458....", "012345678......"]
    assert [layer.used.tolist() for layer in cache.layers] == [[5], [9]]
    assert (cache.position.tolist(), cache.frames.tolist()) == ([9], [2])


def test_growing_keeps_the_contents():
    cache = feed(empty(), "ttF")
    before = num_bytes(cache)
    cache = grow(cache, [8 + 4 * k for k in KEPT])
    assert drawn(cache) == ["014.........", "01234..............."]
    assert num_bytes(cache) == 2 * WIDTH * 4 * (12 + 20) > before == 2 * WIDTH * 4 * (9 + 15)
    assert drawn(feed(cache, "F")) == ["0147........", "01234567............"]


def test_rolling_back_goes_by_position():
    """Two frames too many: each layer forgets what it held of them, and goes on as if they had never come."""
    before = feed(empty(), "ttF")
    after = feed(before, "tFtF")
    cache = roll_back(after, np.array([5]), np.array([1]))
    assert drawn(cache) == drawn(before)
    for name in ("position", "frames"):
        assert getattr(cache, name).tolist() == getattr(before, name).tolist()
    assert [x.used.tolist() for x in cache.layers] == [x.used.tolist() for x in before.layers]
    assert drawn(feed(cache, "Ft")) == drawn(feed(before, "Ft")) == ["01478....", "012345678......"]
    between = roll_back(after, np.array([9]), np.array([2]))
    assert drawn(between) == ["01458....", "012345678......"]


def test_what_does_not_fit_is_dropped_and_nothing_else_is_touched():
    cache = feed(empty(text=2, frames=1), "ttF")
    assert drawn(cache) == ["014", "01234"]
    assert drawn(feed(cache, "tt")) == ["014", "01234"]


def test_rows_of_a_batch_are_apart():
    cache = make_cache([6], 2, 1, WIDTH, jnp.float32)
    layer = cache.layers[0]._replace(used=jnp.array([0, 3]))
    ones = jnp.ones((2, 2, 1, WIDTH))
    layer = write(layer, ones, ones, jnp.array([[4, 5], [6, NEVER]]))
    assert layer.position.tolist() == [[4, 5] + [NEVER] * 4, [NEVER] * 3 + [6] + [NEVER] * 2]
    rolled = roll_back(cache._replace(layers=(layer,)), jnp.array([5, 6]), jnp.array([0, 0]))
    assert rolled.layers[0].used.tolist() == [1, 0]
