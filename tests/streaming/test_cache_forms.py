"""Streams over caches of codes: under every policy the whole sequence's function, with the same tokens as codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import D_V, POLICIES, VOCAB, make_config, make_params

from vmod_jax.compression import forms, growing
from vmod_jax.errors import UserError
from vmod_jax.models import llama
from vmod_jax.models.attention import NEVER
from vmod_jax.models.video_lm import VideoLM, make_cache
from vmod_jax.streaming.engine import Engine, Programs

CODED = [name for name in forms.CACHES if name != "float"]
FRAMES, TEXT = 9, 3  # text tokens before each frame


def small(name):
    """The codec of a row of CACHES, with few tokens a group and in the window."""
    codec = forms.CACHES[name].make.keywords["codec"]
    return dataclasses.replace(codec, group=8, window=5, scale="float32")


@pytest.fixture
def few_tokens(monkeypatch):
    for name in CODED:
        monkeypatch.setitem(forms.CACHES, name, forms.coded(small(name)))


def conversation(config, seed=0):
    """A row of `FRAMES` frames with text before each: i32[1, T], f32[1, F, n, d_v]."""
    rng, n = np.random.default_rng(seed), config.tokens_per_frame
    ids = np.full((1, FRAMES * (TEXT + n)), VOCAB, np.int32)
    places = (np.arange(FRAMES)[:, None] * (TEXT + n) + np.arange(TEXT)).reshape(-1)
    ids[0, places] = rng.integers(0, VOCAB, len(places))
    return ids, rng.normal(size=(1, FRAMES, n, D_V)).astype(np.float32)


def streamed(config, params, ids, features):
    """Hidden states, a frame and the text before it at a time."""
    model, size = VideoLM(config), TEXT + config.tokens_per_frame
    step = jax.jit(
        lambda cache, ids, frames: model.apply({"params": params}, ids, frames, None, cache, method="hidden")
    )
    cache, out = make_cache(config, FRAMES, FRAMES * TEXT, chunk=size), []
    for i in range(FRAMES):
        hidden, _, cache = step(cache, ids[:, i * size : (i + 1) * size], features[:, i : i + 1])
        out.append(hidden)
    return np.concatenate(out, 1), cache


def whole(config, params, ids, features, codec, monkeypatch):
    """The same of the whole sequence, each query seeing codes of what was settled when its chunk began."""
    size = TEXT + config.tokens_per_frame

    def attention(rows, cache, position, valid):
        begins = jnp.where(valid, position // size * size, 0)
        before = (valid[:, None] & (position[:, None] < begins[..., None])).sum(-1)
        return lambda q, k, v: (growing.attend_whole(q, k, v, before, codec), None)

    with monkeypatch.context() as patched:
        patched.setattr(llama, "_attention", attention)
        return jax.jit(lambda: VideoLM(config).apply({"params": params}, ids, features, method="hidden")[0])()


FAST = [("interleaved", "vidkv"), ("explicit", "int8")]
SLOW = [*((policy, "vidkv") for policy in POLICIES), *(("interleaved", form) for form in CODED)]


@pytest.mark.parametrize(
    ("policy", "form"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in FAST)]
)
def test_a_stream_is_its_whole_sequence(few_tokens, monkeypatch, policy, form):
    config = make_config(policy, cache=form)
    params = make_params(config)
    ids, features = conversation(config)
    got, cache = streamed(config, params, ids, features)
    expected = whole(config, params, ids, features, small(form), monkeypatch)
    logits = lambda hidden: VideoLM(config).apply({"params": params}, hidden, method="logits")  # noqa: E731
    np.testing.assert_allclose(logits(got), logits(expected), atol=1e-5, rtol=0)
    assert all(int(layer.settled[0]) > 0 for layer, k in zip(cache.layers, config.kept, strict=True) if k > 0)
    exact, _ = streamed(dataclasses.replace(config, cache="float"), params, ids, features)
    assert not np.allclose(got, exact, atol=1e-3)


@pytest.fixture(scope="module")
def engine_of():
    config = make_config(cache="vidkv")
    params = make_params(config)
    rows = {}

    def make(**changes):
        key = tuple(changes.items())
        if key not in rows:
            rows[key] = Programs(dataclasses.replace(config, **changes))
        return Engine(rows[key], params, max_frames=64, first_frames=8, first_text=300, chunk=64)

    return make


def frames(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, make_config().tokens_per_frame, D_V)).astype(np.float32)


def test_frames_that_are_forgotten_leave_no_trace(few_tokens, engine_of):
    """Also where the cache grows between, and where groups settle."""
    shown, ends = frames(12), []
    for extra in (0, 3):
        engine = engine_of()
        for i in range(8):
            engine.feed_frames([1, 2], shown[i : i + 1], [1])
        assert int(engine.cache.layers[1].settled[0]) > 0
        engine.feed_frames([3], np.concatenate([shown[8:9], frames(extra, seed=1)]), [1], width=4)
        if extra:
            engine.forget_frames(extra, [1])
        ends.append(np.concatenate([engine.feed_frames([1], shown[i : i + 1], [1]) for i in (9, 10)]))
        reply = engine.generate([4, 5], eos=VOCAB - 1, limit=5)
        ends[-1] = ends[-1], reply, engine.input_ids
    np.testing.assert_array_equal(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_what_is_codes_cannot_be_forgotten(few_tokens, engine_of):
    engine = engine_of()
    for i in range(10):
        engine.feed_frames([1], frames(1, seed=i), [1])
    with pytest.raises(UserError, match=r"a cache of 'vidkv' keeps \d+ tokens as they were: it cannot go back"):
        engine.forget_frames(9, [1])
    engine.forget_frames(1, [1])


def test_texts_of_any_length_go_in(few_tokens, engine_of):
    engine = engine_of()
    text = np.random.default_rng(0).integers(0, VOCAB, 261).tolist()
    engine.feed_text(text)
    assert engine.input_ids == text
    assert int(engine.cache.position[0]) == 261


def test_a_long_stream_takes_an_eighth_and_with_mod_a_tenth_of_bfloat16():
    """Of a model with heads of 128 over an hour at 2 frames a second, with what is kept exact and all positions."""
    base = make_config("full", dtype="bfloat16")
    wide = dataclasses.replace(base.llama, num_attention_heads=4, num_key_value_heads=2, head_dim=128)
    held = {}
    for policy in ("full", "interleaved"):
        for form in forms.CACHES:
            config = dataclasses.replace(base, llama=wide, policy=POLICIES[policy], cache=form)
            cache = jax.eval_shape(lambda config=config: make_cache(config, 7200, 2048, chunk=128))
            held[policy, form] = sum(forms.form(layer).num_bytes(layer) for layer in cache.layers)
    share = lambda policy, form: held[policy, form] / held["full", "float"]  # noqa: E731
    assert share("full", "vidkv") < 0.13
    assert share("interleaved", "vidkv") < 0.10
    assert share("full", "int8") < 0.53
    assert held["full", "float"] == 4 * (7200 * base.tokens_per_frame + 2048) * 2 * 2 * 128 * 2


def test_empty_slots_have_no_position(few_tokens):
    cache = make_cache(make_config(cache="vidkv"), 2, 8)
    assert (cache.layers[0].position == NEVER).all()
