"""Tiny models for the tests of weights: every parameter has a say in the logits, scores of a frame lie far apart."""

import dataclasses

import jax
import numpy as np

from vmod_jax.models.depth import LayerSpec, explicit_policy, make_policy, num_kept
from vmod_jax.models.llama import LlamaConfig, LoraConfig, RopeScaling
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, init_params

LAYERS, WIDTH, VOCAB, D_V, MARGIN = 4, 32, 60, 12, 1e-3
LLAMA = LlamaConfig(VOCAB, WIDTH, 48, LAYERS, 8, 2, 8, 500000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 64))
NAMES = ("full", "early_exit", "layer_skip", "interleaved", "interleaved_deep", "all", "all_deep", "random", "uniform")
POLICIES = {name: make_policy(name, LAYERS, keep=0.3) for name in NAMES} | {
    "explicit": explicit_policy(LAYERS, [0, 3], [0.5, 0.1]),
    "two_ratios": (LayerSpec(0.5, "learned"), LayerSpec(0.2, "learned"), LayerSpec(1.0, "learned"), LayerSpec(0.0)),
}


def make_config(policy="interleaved", gate="raw", **changes):
    config = VideoLMConfig(
        llama=LLAMA, policy=POLICIES[policy], frame_token_id=VOCAB, vision_hidden_size=D_V,
        grid=(2, 3), gate=gate, lora=LoraConfig(rank=4, alpha=8),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def make_params(config, seed=0):
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 1
        noise = rng.normal(size=leaf.shape) * 0.7 / fan_in**0.5
        value = 1 + 0.2 * noise if name == "scale" else noise
        if path[-2].key == "expert":
            value = rng.normal(size=leaf.shape) * 0.2
        return jax.numpy.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def draw_row(config, params, seed, frames=5):
    """A row of text and whole frames, redrawn until the selection has a margin: (pieces, ids, features, logits).

    pieces: [(text ids, whether a frame follows)]
    """
    n = config.tokens_per_frame
    rng = np.random.default_rng(seed)
    apply = jax.jit(VideoLM(config).apply)
    for _ in range(50):
        # All rows have the same length, so that a policy compiles once.
        pieces = [(rng.integers(0, VOCAB, 3).tolist(), True) for _ in range(frames)]
        pieces.append((rng.integers(0, VOCAB, 4).tolist(), False))
        ids = np.array([token for text, frame in pieces for token in text + [VOCAB] * (n * frame)], np.int32)
        features = rng.normal(size=(frames, n, config.vision_hidden_size)).astype(np.float32)
        out = apply({"params": params}, ids[None], features[None])
        if margin(config, out.routing) > MARGIN:
            return pieces, ids, features, np.asarray(out.logits[0])
    raise AssertionError("50 draws without a margin: the router cannot be random")


def margin(config, routing):
    """The smallest gap between the last kept and the first skipped score of any frame and learned layer."""
    gaps = [np.inf]
    for layer, routed in routing.items():
        k = num_kept(config.tokens_per_frame, config.policy[layer].keep)
        if config.policy[layer].selector == "learned" and 0 < k < config.tokens_per_frame:
            scores = -np.sort(-np.asarray(routed.scores), axis=-1)
            gaps.append((scores[..., k - 1] - scores[..., k]).min())
    return min(gaps)
