"""Fewer vision tokens without training (HoliTom, arXiv 2505.21334): what stands still is merged over time.

A video is cut into segments of frames so that the most static tokens can be left out. In a segment, each static
position becomes one mean token; density peaks then merge those to a share of them. Of the other tokens of a frame,
those stay that the vision encoder attends to most.

Needs the whole video: one later frame may move every segment and every share. `window` does the same inside windows of
frames, `frame` looks one frame back: both are causal. Here everything has a static shape; `segments_reference` is the
same search, slow and plain.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

CENTRE, OTHER, ADDED = 1, 2, 4  # kinds of tokens: a centre of static ones, one of a single frame, one to fill a budget
NEIGHBOURS = 7
LONGEST = 1024  # frames of a segment


class Merged(NamedTuple):
    """tokens: f32[M, d]; frame, position, kind: i32[M] of each; valid: bool[M], the slots in use, which come first."""

    tokens: Array
    frame: Array
    position: Array
    kind: Array
    valid: Array


# --- segments ---------------------------------------------------------------------------------------------------------


def similarity(x: Array) -> Array:
    """Cosine of each token and the one at its place in the next frame: f32[T, n, d] -> f32[T - 1, n]."""
    norm = jnp.linalg.norm(x, axis=-1)
    return (x[:-1] * x[1:]).sum(-1) / jnp.maximum(norm[:-1] * norm[1:], 1e-12)


def segments_reference(static: np.ndarray, longest: int = LONGEST) -> tuple[int, list[tuple[int, int]]]:
    """The segments that leave out the most, and how many tokens that is: bool[T - 1, n] -> (removed, [(first, last)]).

    A segment of w frames leaves out w - 1 of each position that is static all through it. Of equal choices, a frame
    stays alone, else the shorter segment is taken.
    """
    frames = len(static) + 1
    best, width = [0], []
    for i in range(frames):
        value, chosen = best[i], 1
        for w in range(2, min(i + 1, longest) + 1):
            gain = int(static[i - w + 1 : i].all(0).sum()) * (w - 1)
            if best[i - w + 1] + gain > value:
                value, chosen = best[i - w + 1] + gain, w
        best.append(value)
        width.append(chosen)
    found, end = [], frames - 1
    while end >= 0:
        found.append((end - width[end] + 1, end))
        end -= width[end]
    return best[-1], found[::-1]


def segments(static: Array, longest: int = LONGEST) -> tuple[Array, Array]:
    """`segments_reference` with static shapes: bool[T - 1, n] -> (removed i32[], first i32[T] of each)."""
    frames, size = static.shape[0] + 1, static.shape[1]

    def count(run, now):
        run = jnp.where(now, run + 1, 0)
        return run, run

    _, runs = jax.lax.scan(count, jnp.zeros(size, jnp.int32), static)
    runs = jnp.concatenate([jnp.zeros((1, size), jnp.int32), runs])  # pairs before frame i that are static in a row
    before = jnp.arange(frames)  # w - 1
    gains = jax.vmap(lambda run: before * (run >= before[:, None]).sum(-1) * (before > 0))(runs)

    def step(best, xs):
        i, gain = xs
        value = jnp.where((before <= i) & (before < longest), best[jnp.maximum(i - before, 0)] + gain, -1)
        w = jnp.argmax(value)  # the first of equals: the shortest
        return best.at[i + 1].set(value[w]), w

    best, chosen = jax.lax.scan(step, jnp.zeros(frames + 1, jnp.int32), (jnp.arange(frames), gains))

    def trace(first, xs):
        i, w = xs
        first = jnp.where(i < first, i - w, first)
        return first, first

    _, first = jax.lax.scan(trace, jnp.int32(frames), (jnp.arange(frames), chosen), reverse=True)
    return best[-1], first


# --- how many ---------------------------------------------------------------------------------------------------------


def share_after(share: float, removed: int, total: int) -> float:
    """The share of what is left that spreads a budget of `share` of all tokens over it; float64, in this order."""
    return min(share / ((total - removed) / total), 1)


@functools.cache
def _counts(share: float, frames: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(centres, others): i16[T n + 1, n + 1], by tokens removed and by tokens that there are.

    Of a whole video float64's last bit decides, which devices lack: the few possible values are tabled.
    """
    total = frames * n
    after = np.array([share_after(share, removed, total) if removed < total else 1.0 for removed in range(total + 1)])
    product = after[:, None] * np.arange(n + 1)
    return np.round(product).astype(np.int16), np.ceil(product).astype(np.int16)


def most_tokens(share: float, frames: int, n: int) -> int:
    """A bound of how many tokens stay, which `outer` has slots for: M <= min(N, ceil(r N + 1.5 T))."""
    return min(frames * n, math.ceil(share * frames * n + 1.5 * frames))


# --- density peaks ----------------------------------------------------------------------------------------------------


def density_peaks(x: Array, there: Array, count: Array, beta: float | None) -> tuple[Array, Array]:
    """Merges tokens to `count` centres: f32[n, d], bool[n], i32[] -> (f32[n, d], bool[n] centres).

    Centres are dense and far from what is denser; every other token joins the nearest. A centre becomes
    beta centre + (1 - beta) mean(members), or with beta = None the mean of itself and its members.
    """
    n, width = x.shape
    pair = there[:, None] & there
    distance = jax.lax.map(lambda row: jnp.linalg.norm(x - row, axis=-1), x) / width**0.5
    near = jnp.sort(jnp.where(pair, distance**2, jnp.inf), axis=-1)[:, :NEIGHBOURS]
    among = jnp.arange(near.shape[1]) < jnp.minimum(NEIGHBOURS, count)
    # The density is exp(-spread): far below what float32 holds, and only its order and its product are asked for.
    spread = jnp.where(among, near, 0).sum(-1) / jnp.maximum(among.sum(), 1)
    denser = pair & (spread < spread[:, None])
    farthest = jnp.where(pair, distance, 0).max()
    delta = jnp.where(denser.any(-1), jnp.where(denser, distance, jnp.inf).min(-1), farthest)
    score = jnp.where(there, jnp.log(delta) - spread, -jnp.inf)
    # A product of 0 comes after all others, and still before what is not there.
    order = jnp.lexsort((jnp.arange(n), -score, ~there))
    rank = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n))
    centre = there & (rank < count)
    joins = jnp.argmin(jnp.where(centre, distance, jnp.inf), axis=-1)
    member = (there & ~centre)[:, None] & (joins[:, None] == jnp.arange(n))  # [token, centre]
    members = member.sum(0)[:, None]
    total = jnp.matmul(member.T.astype(x.dtype), x, precision="highest")
    if beta is None:
        out = (x + total) / (members + 1)
    else:
        out = jnp.where(members > 0, beta * x + (1 - beta) * total / jnp.maximum(members, 1), x)
    return out, centre


# --- the whole video, a window, a frame -------------------------------------------------------------------------------


def _classes(x: Array, a: Array, share: float, tau: float, beta: float | None, longest: int):
    """Every candidate by (frame, static centre or token of the frame, position): the order of a video's tokens.

    -> (tokens f32[T, 2, n, d], kept bool[T, 2, n])
    """
    frames, n, _ = x.shape
    similar = similarity(x) > tau
    removed, first = segments(similar, longest)
    starts = first == jnp.arange(frames)
    # A position is static in a segment if no pair inside it differs.
    inside = first[1:] == first[:-1]
    differs = jax.ops.segment_max((~similar & inside[:, None]).astype(jnp.int32), first[1:], frames)
    length = jax.ops.segment_sum(jnp.ones(frames, jnp.int32), first, frames)
    still = (differs <= 0) & (length > 1)[:, None]  # [segment by its first frame, n]
    mean = jax.ops.segment_sum(x, first, frames) / jnp.maximum(length, 1)[:, None, None]
    centres, others = (jnp.asarray(table)[removed] for table in _counts(share, frames, n))
    there = still & starts[:, None]
    merged, centre = jax.vmap(functools.partial(density_peaks, beta=beta))(
        mean, there, centres[there.sum(-1)].astype(jnp.int32)
    )
    alone = ~still[first]
    rank = jnp.argsort(jnp.argsort(jnp.where(alone, -a, jnp.inf), axis=-1, stable=True), axis=-1, stable=True)
    kept = alone & (rank < others[alone.sum(-1)][:, None])
    return jnp.stack([merged, x], 1), jnp.stack([centre, kept], 1)


def outer(
    x: Array, a: Array, share: float, tau: float = 0.8, beta: float | None = 0.6, longest: int = LONGEST
) -> Merged:
    """The tokens of a whole video: x: f32[T, n, d]; a: f32[T, n], attention that each token receives -> Merged.

    share: of all tokens that stay, about: see `most_tokens`, which are the slots. tau: tokens of a greater cosine are
    static. Segment by segment: static centres (which stand at the segment's first frame), then each frame's tokens.
    """
    frames, n, width = x.shape
    tokens, kept = _classes(x, a, share, tau, beta, longest)
    kept = kept.reshape(-1)
    # Centres of a segment come before its first frame's tokens, as the candidates do.
    place = jnp.argsort(~kept, stable=True)[: most_tokens(share, frames, n)]
    frame, kind, position = place // (2 * n), jnp.where(place // n % 2, OTHER, CENTRE), place % n
    valid = kept[place]
    return Merged(
        jnp.where(valid[:, None], tokens.reshape(-1, width)[place], 0),
        frame,
        position,
        jnp.where(valid, kind, 0),
        valid,
    )


def window(x: Array, a: Array, share: float, tau: float = 0.8, beta: float | None = 0.6) -> Merged:
    """Exactly ceil(r W n) tokens of a window of W frames: x: f32[W, n, d]; a: f32[W, n] -> Merged, all valid.

    As `outer` of these frames alone; then tokens of the lowest `a` go, static centres last, or those of the highest
    come back as they were. By frame, then position.
    """
    frames, n, width = x.shape
    tokens, kept = _classes(x, a, share, tau, beta, LONGEST)
    kind = jnp.where(kept[:, 0], CENTRE, jnp.where(kept[:, 1], OTHER, ADDED))
    total = math.ceil(share * frames * n)
    order = jnp.lexsort((-a.reshape(-1), kind.reshape(-1)))
    place = jnp.sort(order[:total])
    kind = kind.reshape(-1)[place]
    whole = jnp.where(kept[:, 0, :, None], tokens[:, 0], x).reshape(-1, width)
    return Merged(whole[place], place // n, place % n, kind, jnp.ones(total, bool))


def frame(x: Array, before: Array | None, a: Array, share: float, tau: float = 0.8) -> Array:
    """Which ceil(r n) tokens of one frame stay: x, before: f32[n, d], None for the first frame; a: f32[n] -> i32[m].

    The last one always (after it the model decides whether to speak), then those that changed since the frame before,
    then static ones; each by `a`. Ascending.
    """
    n = len(x)
    static = jnp.zeros(n, bool) if before is None else similarity(jnp.stack([before, x]))[0] > tau
    order = jnp.lexsort((-a, static, jnp.arange(n) < n - 1))
    return jnp.sort(order[: math.ceil(share * n)])


# --- inside the language model ----------------------------------------------------------------------------------------


def inner(hidden: Array, received: Array, first: int, count: int, keep: float = 0.5, merge: str = "mean"):
    """Merges video tokens at the input of a layer: hidden: f32[L, d]; received: f32[L], the attention that the last
    token of the prompt pays to each; tokens [first, first + count) are the video's.

    Of these, round(keep count) stay, and each of the others joins the one that is nearest by cosine. merge: "mean" of
    all that join, or "halving", one after the other, as the public code does.
    -> (f32[L - dropped, d], i32[L - dropped], what stays: original places)
    """
    video, stay = hidden[first : first + count], round(keep * count)
    order = jnp.argsort(-received[first : first + count], stable=True)
    kept, gone = jnp.sort(order[:stay]), jnp.sort(order[stay:])
    unit = video / jnp.maximum(jnp.linalg.norm(video, axis=-1, keepdims=True), 1e-12)
    joins = jnp.argmax(jnp.matmul(unit[gone], unit[kept].T, precision="highest"), axis=-1)
    tokens = _MERGES[merge](video[kept], video[gone], joins)
    places = jnp.concatenate([jnp.arange(first), first + kept, jnp.arange(first + count, len(hidden))])
    return jnp.concatenate([hidden[:first], tokens, hidden[first + count :]]), places


def _mean(kept: Array, gone: Array, joins: Array) -> Array:
    count = jnp.ones(len(kept)).at[joins].add(1.0)
    return kept.at[joins].add(gone) / count[:, None]


def _halving(kept: Array, gone: Array, joins: Array) -> Array:
    def step(kept, xs):
        token, place = xs
        return kept.at[place].set((kept[place] + token) / 2), None

    return jax.lax.scan(step, kept, (gone, joins))[0]


_MERGES = {"mean": _mean, "halving": _halving}
