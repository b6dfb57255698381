"""What the device at hand must show: its own attention kernel, one function, and steps that repeat.

On a CPU these run with the other tests, with a CPU's back end. On a machine with a GPU or a TPU they are where to
begin: `pytest -m gpu` or `pytest -m tpu` takes these alone.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmod_jax.lm import LanguageModel
from vmod_jax.models import attention
from vmod_jax.models.depth import make_policy
from vmod_jax.models.llama import LlamaConfig, LoraConfig
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, init_params
from vmod_jax.streaming.engine import Engine, Programs

pytestmark = [pytest.mark.gpu, pytest.mark.tpu]

OWN = {"cpu": "blocked", "gpu": "cudnn", "tpu": "splash"}
HEADS, KV_HEADS, WIDTH = 32, 8, 128  # Llama-3-8B's
BF16 = jnp.dtype(jnp.bfloat16)
VOCAB, D_V, FRAMES, TOKENS, INTERVAL = 60, 12, 6, 10, [7, 8]


def test_the_devices_own_kernel_agrees_with_the_reference():
    """On packed rows, padded ones and a chunk against a cache, forwards and backwards; else it would be left out."""
    own = OWN[jax.default_backend()]
    apart = attention.apart(own, HEADS, KV_HEADS, WIDTH, BF16)
    assert apart.keys() == {"out", "dq", "dk", "dv", "cache"}
    assert max(apart.values()) <= 1e-2, apart
    assert [attention.fault(own, HEADS, KV_HEADS, WIDTH, BF16, to) for to in attention.CHECKS] == [None, None]
    assert attention.choose("auto", HEADS, KV_HEADS, WIDTH, BF16) == own


def make_model(dtype, policy, **changes):
    llama = LlamaConfig(VOCAB, 256, 512, 2, 4, 2, WIDTH, 500000.0)
    config = VideoLMConfig(
        llama=llama, policy=make_policy(policy, 2, keep=0.3), frame_token_id=VOCAB, vision_hidden_size=D_V, grid=(3, 3),
        lora=LoraConfig(rank=4, alpha=8), dtype=dtype, **changes,
    )  # fmt: skip
    return config, init_params(config, jax.random.key(0))


def draw():
    """A row with INTERVAL before each frame: i32[1, T], f32[1, F, n, d_v]."""
    ids = np.array([*INTERVAL, *[VOCAB] * TOKENS] * FRAMES, np.int32)
    return ids[None], np.random.default_rng(0).normal(size=(1, FRAMES, TOKENS, D_V)).astype(np.float32)


def off(x, exact):
    """How far apart two trees of arrays are, relative to the norm of the second."""
    flat = lambda tree: np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])  # noqa: E731
    return np.linalg.norm(flat(x) - flat(exact)) / np.linalg.norm(flat(exact))


# A router whose scores lie a rounding apart chooses otherwise, and all behind it is different: here nothing is learned.
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("width", [1, 3])
def test_a_stream_is_the_whole_sequence(dtype, limit, width):
    """Frame by frame and three in a call; against the reference's attention over the whole sequence in float32."""
    ids, frames = draw()
    config, params = make_model(dtype, "uniform")
    with jax.default_matmul_precision("highest"):
        exact = dataclasses.replace(config, dtype="float32", attention="reference")
        whole = LanguageModel(exact, params).logits(ids, frames)[0, TOKENS + 1 :: TOKENS + 2]
        merged = LanguageModel(config, params).merged
        engine = Engine(Programs(merged.config), merged.params, FRAMES)
        calls = [frames[0, i : i + width] for i in range(0, FRAMES, width)]
        said = np.concatenate([engine.feed_frames(INTERVAL, call, INTERVAL, width) for call in calls])
    assert said.shape == whole.shape == (FRAMES, VOCAB)
    assert off(said, whole) <= limit


def gradient(config):
    """The gradient of a loss of the logits, as a compiled function of the parameters."""
    ids, frames = draw()
    model, length = VideoLM(config), np.array([ids.size], np.int32)

    def loss(params):
        return jnp.square(model.apply({"params": params}, ids, frames, length).logits.astype(jnp.float32)).mean()

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_gradient_is_the_references(dtype, limit):
    config, params = make_model(dtype, "uniform", remat="attention")
    with jax.default_matmul_precision("highest"):
        exact = gradient(dataclasses.replace(config, dtype="float32", attention="reference", remat="none"))(params)
        assert off(gradient(config)(params), exact) <= limit


def test_a_gradient_repeats_to_the_bit():
    if jax.default_backend() == "gpu" and "--xla_gpu_deterministic_ops=true" not in os.environ.get("XLA_FLAGS", ""):
        pytest.skip("on a GPU, bits need XLA_FLAGS=--xla_gpu_deterministic_ops=true")
    config, params = make_model("bfloat16", "interleaved", remat="attention")
    compiled = gradient(config)
    one, two = (jax.tree.leaves(compiled(params)) for _ in range(2))
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(one, two, strict=True))
