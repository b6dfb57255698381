"""The cache of a stream: writing, growing and rolling back stacks that hold different numbers of tokens."""

import jax.numpy as jnp
import numpy as np

from vmod_jax.models.attention import NEVER
from vmod_jax.models.kv_cache import advance, grow, make_cache, num_bytes, roll_back, write

N, KEPT = 3, (1, 3)  # routed layers keep 1 of a frame's 3 tokens, full ones all
LAYERS, WIDTH = (2, 1), 4


def feed(cache, tokens):
    """One chunk of a stream: "t" text, "F" a frame. Keys and values of a token are its position."""
    position, first = int(cache.position[0]), 0
    stacks = []
    for stack, k, layers in zip(cache.stacks, KEPT, LAYERS, strict=True):
        at, place = [], position
        for token in tokens:
            at += [place] if token == "t" else [place + N - 1 - i for i in range(k)][::-1]
            place += 1 if token == "t" else N
        first = place - position
        at = np.array([at + [NEVER] * (8 - len(at))])  # chunks are padded
        value = np.broadcast_to(at[..., None, None], (1, 8, 1, WIDTH)).astype(np.float32)
        for layer in range(layers):
            stack = write(stack, layer, jnp.asarray(value), jnp.asarray(value) + layer, jnp.asarray(at))
        stacks.append(stack)
    cache = cache._replace(stacks=tuple(stacks))
    return advance(cache, KEPT, N, jnp.array([first]), jnp.array([tokens.count("F")]))


def empty(text=6, frames=3):
    return make_cache(list(LAYERS), [text + frames * k for k in KEPT], 1, 1, WIDTH, jnp.float32)


def drawn(cache):
    """Each stack's slots as a string: the position in hex, "." where empty; all its layers must agree."""
    rows = []
    for stack in cache.stacks:
        lines = {"".join("." if p == NEVER else f"{p:x}" for p in layer[0].tolist()) for layer in stack.position}
        assert len(lines) == 1
        for slot in np.flatnonzero(np.asarray(stack.position[0, 0]) != NEVER):
            assert (stack.key[:, 0, slot] == stack.position[0, 0, slot]).all()
            assert (stack.value[-1, 0, slot] == stack.position[0, 0, slot] + stack.position.shape[0] - 1).all()
        rows += lines
    return rows


def test_stacks_hold_what_their_layers_keep():
    cache = feed(empty(), "ttF")
    assert drawn(cache) == ["014......", "01234.........."]
    cache = feed(cache, "tF")
    assert drawn(cache) == ["01458....", "012345678......"]
    assert [stack.used.tolist() for stack in cache.stacks] == [[5], [9]]
    assert (cache.position.tolist(), cache.frames.tolist()) == ([9], [2])


def test_growing_keeps_the_contents():
    cache = feed(empty(), "ttF")
    before = num_bytes(cache)
    cache = grow(cache, [8 + 4 * k for k in KEPT])
    assert drawn(cache) == ["014.........", "01234..............."]
    assert num_bytes(cache) == 2 * WIDTH * 4 * (2 * 12 + 20) > before == 2 * WIDTH * 4 * (2 * 9 + 15)
    assert drawn(feed(cache, "F")) == ["0147........", "01234567............"]


def test_rolling_back_goes_by_position():
    """Two frames too many: each stack forgets what it held of them, and goes on as if they had never come."""
    before = feed(empty(), "ttF")
    after = feed(before, "tFtF")
    cache = roll_back(after, np.array([5]), np.array([1]))
    assert drawn(cache) == drawn(before)
    for name in ("position", "frames"):
        assert getattr(cache, name).tolist() == getattr(before, name).tolist()
    assert [s.used.tolist() for s in cache.stacks] == [s.used.tolist() for s in before.stacks]
    assert drawn(feed(cache, "Ft")) == drawn(feed(before, "Ft")) == ["01478....", "012345678......"]
    between = roll_back(after, np.array([9]), np.array([2]))
    assert drawn(between) == ["01458....", "012345678......"]


def test_what_does_not_fit_is_dropped_and_nothing_else_is_touched():
    cache = feed(empty(text=2, frames=1), "ttF")
    assert drawn(cache) == ["014", "01234"]
    assert drawn(feed(cache, "tt")) == ["014", "01234"]


def test_rows_of_a_batch_are_apart():
    cache = make_cache([1], [6], 2, 1, WIDTH, jnp.float32)
    (stack,) = cache.stacks
    stack = stack._replace(used=jnp.array([0, 3]))
    ones = jnp.ones((2, 2, 1, WIDTH))
    stack = write(stack, 0, ones, ones, jnp.array([[4, 5], [6, NEVER]]))
    assert stack.position[0].tolist() == [[4, 5] + [NEVER] * 4, [NEVER] * 3 + [6] + [NEVER] * 2]
    rolled = roll_back(cache._replace(stacks=(stack,)), jnp.array([5, 6]), jnp.array([0, 0]))
    assert rolled.stacks[0].used.tolist() == [1, 0]
