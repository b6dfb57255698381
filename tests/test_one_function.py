"""One function: the whole sequence, a stream frame by frame, and m frames at once compute the same thing.

Selection is discontinuous: where two scores of a frame come closer than MARGIN, another order of summation may choose
another token. Such draws are drawn again, and counted; most must not need it.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiny_models import POLICIES, margin

from vmod_jax.models.llama import LlamaConfig, LoraConfig, RopeScaling
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, init_params, make_cache

pytestmark = pytest.mark.one_function

LAYERS, WIDTH, VOCAB, D_V, MARGIN = 4, 32, 60, 12, 1e-4
LLAMA = LlamaConfig(VOCAB, WIDTH, 48, LAYERS, 4, 2, 8, 500000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 64))
CASES = [
    *itertools.product(POLICIES, ["raw"]),
    *itertools.product(["interleaved"], ["tanh", "sigmoid", "straight_through"]),
    ("all", "tanh"),
]


def make_config(policy="interleaved", gate="raw", **changes):
    config = VideoLMConfig(
        llama=LLAMA, policy=POLICIES[policy], frame_token_id=VOCAB, vision_hidden_size=D_V,
        grid=(2, 3), gate=gate, lora=LoraConfig(rank=4, alpha=8),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def make_params(config, seed=0):
    """Every branch, gate and LoRA pair has a say in the logits, which are of order one."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    fan_in = lambda s: s.shape[-2] if len(s.shape) > 1 else 1  # noqa: E731
    draws = [jax.random.normal(k, s.shape) * 0.7 / fan_in(s) ** 0.5 for k, s in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(tree, draws)
    params["llama"]["layers"]["expert"]["kernel"] = jax.random.normal(keys[0], (LAYERS, WIDTH)) * 0.2
    return params


def draw_conversation(rng, n, frames):
    """A row of text and whole frames: i32[T] and, for streaming, its pieces [(text ids, whether a frame follows)]."""
    pieces = [(rng.integers(0, VOCAB, rng.integers(0, 6)).tolist(), True) for _ in range(frames)]
    pieces[0] = ([7, *pieces[0][0]], True)
    pieces.append((rng.integers(0, VOCAB, rng.integers(1, 5)).tolist(), False))
    ids = [token for text, frame in pieces for token in text + [VOCAB] * (n * frame)]
    return np.array(ids, np.int32), pieces


ROOM, FRAMES = 48, 6  # every row is padded to these text tokens and frames, so that a policy compiles once


@functools.cache
def forward(config):
    return jax.jit(VideoLM(config).apply)


def whole(config, params, ids, features):
    n = config.tokens_per_frame
    padded = np.zeros((1, ROOM + FRAMES * n), np.int32)
    padded[0, : len(ids)] = ids
    frames = np.zeros((1, FRAMES, n, D_V), np.float32)
    frames[0, : len(features)] = features
    out = forward(config)({"params": params}, padded, frames, np.array([len(ids)], np.int32))
    routing = {layer: jax.tree.map(lambda x: np.asarray(x[0, : len(features)]), r) for layer, r in out.routing.items()}
    return np.asarray(out.logits[0, : len(ids)]), routing


def draw(config, params, seed, frames=5):
    """A conversation whose scores leave a margin; how many draws were thrown away."""
    rng = np.random.default_rng(seed)
    for thrown in range(50):
        ids, pieces = draw_conversation(rng, config.tokens_per_frame, frames)
        features = rng.normal(size=(frames, config.tokens_per_frame, D_V)).astype(np.float32)
        logits, routing = whole(config, params, ids, features)
        if margin(config, routing) > MARGIN:
            return ids, pieces, features, logits, routing, thrown
    raise AssertionError("50 draws without a margin: the router cannot be random")


class Stream:
    """Feeds chunks of given static sizes and collects the logits of their real tokens."""

    def __init__(self, config, params, frames=16, text=64):
        self.model, self.params = VideoLM(config), params
        self.empty = lambda: make_cache(config, frames, text)
        self.n, self.traces = config.tokens_per_frame, 0
        self.step = jax.jit(self._step, donate_argnums=1)
        self.restart()

    def restart(self):
        self.cache, self.logits = self.empty(), []

    def _step(self, params, cache, ids, frames, length):
        self.traces += 1
        hidden, _, cache = self.model.apply({"params": params}, ids, frames, length, cache, method="hidden")
        return self.model.apply({"params": params}, hidden, method="logits"), cache

    def feed(self, ids, features, text_room, frame_room):
        """ids: list; features: [m, n, d_v]; padded to text_room text tokens and frame_room frames."""
        size = text_room + frame_room * self.n
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(ids)] = ids
        frames = np.zeros((1, frame_room, self.n, D_V), np.float32)
        frames[0, : len(features)] = features
        logits, self.cache = self.step(self.params, self.cache, padded, frames, np.array([len(ids)], np.int32))
        self.logits.append(np.asarray(logits[0, : len(ids)]))


def feed_in_groups(stream, pieces, features, m):
    """`m` frames, with the text before each, in one chunk; the text behind the last frame in a chunk of its own."""
    with_frames, tail = pieces[:-1], pieces[-1]
    for start in range(0, len(with_frames), m):
        group = with_frames[start : start + m]
        ids = [token for text, _ in group for token in text + [VOCAB] * stream.n]
        stream.feed(ids, features[start : start + len(group)], 8 * m, m)
    stream.feed(tail[0], features[:0], 8 * m, m)


@pytest.mark.parametrize(("policy", "gate"), CASES)
def test_streaming_and_prefill_equal_the_whole_sequence(policy, gate):
    config = make_config(policy, gate)
    params = make_params(config)
    thrown = 0
    for m in (1, 3):
        stream = Stream(config, params)
        for seed in range(3):
            _, pieces, features, logits, _, again = draw(config, params, seed)
            thrown += again
            stream.restart()
            feed_in_groups(stream, pieces, features, m)
            np.testing.assert_allclose(np.concatenate(stream.logits), logits, atol=1e-5, rtol=0)
        assert stream.traces == 1, "one chunk size, one compile"
    assert thrown <= 10


@pytest.mark.parametrize(("policy", "gate"), [case for case in CASES if case[0] != "random"])
def test_the_slow_reference_agrees(policy, gate):
    config = make_config(policy, gate)
    params = make_params(config)
    ids, _, features, logits, routing, _ = draw(config, params, 11, frames=4)
    expected, decided = reference.forward(config, params, ids, features)
    for layer, routed in routing.items():
        np.testing.assert_array_equal(routed.kept, np.array(decided[layer][1]))
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=0)


def test_the_random_selector_agrees_with_the_reference_on_its_own_choice():
    config = make_config("random")
    params = make_params(config)
    ids, _, features, logits, routing, _ = draw(config, params, 12, frames=4)
    kept = {layer: np.asarray(routed.kept) for layer, routed in routing.items()}
    expected, _ = reference.forward(config, params, ids, features, replay=kept)
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=0)
    assert len({tuple(frame) for layer in kept.values() for frame in layer}) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["interleaved", "all", "layer_skip", "early_exit", "random", "uniform"])
def test_no_skipped_token_changes_a_bit(policy, dtype):
    # A model of one routed layer: what it does not compute must leave as it came, -0.0 and all.
    from vmod_jax.models.layout import find_frames
    from vmod_jax.models.llama import run_layers

    config = make_config(policy, dtype=dtype)
    params = make_params(config)
    rng = np.random.default_rng(0)
    n = config.tokens_per_frame
    ids, _ = draw_conversation(rng, n, 4)
    length = jnp.array([len(ids) - 2])
    layout = find_frames(jnp.asarray(ids[None]), length, VOCAB, n, 4)
    x = rng.normal(size=(1, len(ids), WIDTH)).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = -0.0
    x = jnp.asarray(x, dtype)
    routed_layer = next(i for i, spec in enumerate(config.policy) if spec.routed)
    one = jax.tree.map(lambda leaf: leaf[routed_layer : routed_layer + 1], params["llama"]["layers"])
    out, routing, _ = run_layers(
        one, x, layout, (config.policy[routed_layer],), config.llama, config.routing, config.lora
    )
    skipped = np.array(layout.vision[0] >= 0)
    if routing:
        start = np.asarray(layout.frame_start[0])
        kept = (start[:, None] + np.asarray(routing[0].kept[0])).reshape(-1)
        skipped[kept] = False
    assert skipped.sum() >= 4 * (n - 3)
    bits = np.uint32 if dtype == "float32" else np.uint16
    same = (np.asarray(out[0]).view(bits) == np.asarray(x[0]).view(bits)).all(-1)
    assert same[skipped].all()
    text = np.asarray(layout.vision[0] < 0) & (np.arange(len(ids)) < int(length[0]))
    assert not same[text].any()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_future_changes_nothing(policy):
    config = make_config(policy)
    params = make_params(config)
    rng = np.random.default_rng(3)
    n = config.tokens_per_frame
    ids, _ = draw_conversation(rng, n, 5)
    features = rng.normal(size=(5, n, D_V)).astype(np.float32)
    before, _ = whole(config, params, ids, features)
    changed = features.copy()
    changed[3:] = 10 * rng.normal(size=(2, n, D_V))
    after, _ = whole(config, params, ids, changed)
    first = int(np.flatnonzero(ids == VOCAB)[3 * n])
    np.testing.assert_array_equal(before[:first], after[:first])
    assert not np.allclose(before[first:], after[first:])


@pytest.mark.parametrize("policy", POLICIES)
def test_padding_and_neighbours_change_nothing(policy):
    config = make_config(policy)
    params = make_params(config)
    n = config.tokens_per_frame
    rows = [draw(config, params, seed, frames) for seed, frames in ((1, 2), (2, 5), (3, 3))]
    ids = np.random.default_rng(0).integers(0, VOCAB, (3, ROOM + FRAMES * n)).astype(np.int32)
    features = np.random.default_rng(1).normal(size=(3, FRAMES, n, D_V)).astype(np.float32)
    for b, row in enumerate(rows):
        ids[b, : len(row[0])] = row[0]
        features[b, : len(row[2])] = row[2]
    length = np.array([len(row[0]) for row in rows], np.int32)
    out = forward(config)({"params": params}, ids, features, length)
    for b, (own, _, _, logits, routing, _) in enumerate(rows):
        np.testing.assert_allclose(out.logits[b, : len(own)], logits, atol=1e-5, rtol=0)
        for layer, routed in routing.items():
            np.testing.assert_array_equal(out.routing[layer].kept[b, : routed.kept.shape[0]], routed.kept)


@pytest.mark.parametrize("policy", ["full", "interleaved", "all"])
def test_gradients_do_not_depend_on_remat(policy):
    config = make_config(policy)
    params = make_params(config)
    ids, _, features, _, _, _ = draw(config, params, 5)

    def gradient(remat):
        model = VideoLM(dataclasses.replace(config, remat=remat))
        loss = lambda p: jnp.square(model.apply({"params": p}, ids[None], features[None]).logits).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    plain, again = gradient("none"), gradient("full")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), plain, again)
    expert = np.asarray(plain["llama"]["layers"]["expert"]["kernel"])
    learned = [spec.selector == "learned" for spec in config.policy]
    assert ((np.abs(expert).max(1) > 0) == learned).all()


def test_straight_through_teaches_the_router_and_nothing_else():
    """Beside a gate that is 1 because its router is zero: the same output and the same gradients, but the router's."""
    config = make_config(gate="straight_through")
    params = make_params(config)
    ids, _, features, _, routing, _ = draw(config, params, 9)
    kept = {layer: np.asarray(routed.kept)[None] for layer, routed in routing.items()}

    def run(config, params):
        def loss(params):
            model = VideoLM(config)
            return jnp.square(model.apply({"params": params}, ids[None], features[None], replay=kept).logits).mean()

        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        return value, gradient, gradient["llama"]["layers"].pop("expert")["kernel"]

    value, gradient, router = run(config, params)
    zero = {**params["llama"]["layers"], "expert": {"kernel": jnp.zeros((LAYERS, WIDTH))}}
    expected = run(make_config(gate="tanh"), {**params, "llama": {**params["llama"], "layers": zero}})
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), gradient, expected[1])
    assert ((np.abs(router).max(1) > 0) == [spec.selector == "learned" for spec in config.policy]).all()


def test_always_keep_last():
    config = make_config("all", always_keep_last=True)
    params = make_params(config)
    _, _, _, _, routing, _ = draw(config, params, 4)
    n = config.tokens_per_frame
    assert all((np.asarray(routed.kept)[:, -1] == n - 1).all() for routed in routing.values())


def test_rolling_back_forgets():
    from vmod_jax.models import kv_cache

    config = make_config("two_ratios")
    params = make_params(config)
    _, pieces, features, logits, _, _ = draw(config, params, 6)
    stream = Stream(config, params)
    n = stream.n
    head = pieces[0][0] + [VOCAB] * n
    stream.feed(head, features[:1], 8, 1)
    stream.feed([1, 2] + [VOCAB] * n, 10 * features[3:4], 8, 1)
    stream.cache = kv_cache.roll_back(stream.cache, np.array([len(head)], np.int32), np.array([1], np.int32))
    del stream.logits[1]
    feed_in_groups(stream, pieces[1:], features[1:], 1)
    np.testing.assert_allclose(np.concatenate(stream.logits), logits, atol=1e-5, rtol=0)


def test_replay_uses_the_given_tokens():
    config = make_config("interleaved")
    params = make_params(config)
    ids, _, features, logits, routing, _ = draw(config, params, 8)
    other = {layer: np.sort((np.asarray(r.kept) + 1) % 7, -1)[None] for layer, r in routing.items()}
    model = VideoLM(config)
    replayed = model.apply({"params": params}, ids[None], features[None], replay=other)
    expected, _ = reference.forward(config, params, ids, features, {k: v[0] for k, v in other.items()})
    np.testing.assert_allclose(replayed.logits[0], expected, atol=2e-5, rtol=0)
    assert not np.allclose(replayed.logits[0], logits, atol=1e-3)
