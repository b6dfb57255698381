"""Llama-3-8B with SigLIP-L/16-384 and LoRA on 1200 frames, in shapes alone: nothing is computed or compiled."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from vmod_jax.models.depth import make_policy, num_kept
from vmod_jax.models.flops import LLAMA_3_8B
from vmod_jax.models.llama import NO_LORA, LoraConfig
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, cache_slots, init_params, make_cache, num_params
from vmod_jax.models.vision import VisionConfig
from vmod_jax.training import objective
from vmod_jax.training.optimizer import merge, split

SIGLIP_L = VisionConfig(
    kind="siglip", image_size=384, patch_size=16, hidden_size=1024, intermediate_size=4096,
    num_hidden_layers=24, num_attention_heads=16,
)  # fmt: skip
FRAMES, TEXT, LABELS, RANK = 1200, 146, 1300, 128
GRIDS = {10: (3, 3), 50: (7, 7)}


def make_config(tokens=10, vision=True, lora=True, policy="interleaved"):
    config = VideoLMConfig(
        llama=LLAMA_3_8B,
        policy=make_policy(policy, 32),
        frame_token_id=128256,
        vision_hidden_size=1024,
        vision=SIGLIP_L if vision else None,
        grid=GRIDS[tokens],
        lora=LoraConfig(RANK, 256.0) if lora else NO_LORA,
        remat="full",
        dtype="bfloat16",
        param_dtype="bfloat16",
    )
    assert config.tokens_per_frame == tokens
    return config


def parameters(config):
    return jax.eval_shape(partial(init_params, config), jax.random.key(0))


def inputs(config, rows=1):
    """A batch of the longest streams: pixels where the model has a tower, else features."""
    n = config.tokens_per_frame
    frame = (384, 384, 3) if config.vision else (n, config.vision_hidden_size)
    array = jax.ShapeDtypeStruct
    return {
        "input_ids": array((rows, TEXT + FRAMES * n), jnp.int32),
        "length": array((rows,), jnp.int32),
        "frames": array((rows, FRAMES, *frame), jnp.uint8 if config.vision else jnp.float32),
        "label_pos": array((rows, LABELS), jnp.int32),
        "label": array((rows, LABELS), jnp.int32),
        "label_weight": array((rows, LABELS), jnp.float32),
        "label_is_stream": array((rows, LABELS), jnp.bool_),
    }


def forward(config, params, batch):
    """The training loss, as `vmod train` computes it, and what the routed layers decided."""
    model = VideoLM(config)
    hidden, routing = model.apply(
        {"params": params}, batch["input_ids"], batch["frames"], batch["length"], method="hidden"
    )
    logits = model.apply({"params": params}, objective.gather_labelled(hidden, batch["label_pos"]), method="logits")
    loss, _ = objective.loss(logits, batch["label"], batch["label_weight"], batch["label_is_stream"])
    return loss, (hidden, logits, routing)


def test_parameters_are_hugging_faces():
    params = parameters(make_config(lora=False))
    llama, experts = params["llama"], params["llama"]["layers"].pop("expert")
    assert num_params(llama) == 8_030_261_248
    assert num_params(params["vision"]) == 316_283_904
    assert num_params(experts) == 32 * 4096
    assert num_params(params["connector"]) == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert {leaf.dtype.name for leaf in jax.tree.leaves(llama)} == {"bfloat16"}


def test_lora_is_everywhere_and_what_is_trained():
    """A pair [in, r], [r, out] beside q, k, v, o, gate, up, down of every layer and beside the head; float32."""
    trained, frozen = split(parameters(make_config()), {"lora", "connector", "expert"})
    layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 2 * (4096 + 14336) + (14336 + 4096)
    lora = RANK * (32 * layer + 4096 + 128256)
    assert num_params(trained) == lora + 32 * 4096 + 20_979_712
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained)} == {"float32"}
    assert num_params(frozen) == 8_030_261_248 + 316_283_904


@pytest.mark.parametrize(
    ("tokens", "vision"), [(10, False), (10, True), (50, True)], ids=["10-features", "10-pixels", "50-pixels"]
)
def test_training_forward_at_1200_frames(tokens, vision):
    config = make_config(tokens, vision)
    loss, (hidden, logits, routing) = jax.eval_shape(partial(forward, config), parameters(config), inputs(config))
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert (hidden.shape, hidden.dtype) == ((1, TEXT + FRAMES * tokens, 4096), jnp.bfloat16)
    assert (logits.shape, logits.dtype) == ((1, LABELS, 128256), jnp.float32)
    assert list(routing) == list(range(1, 32, 2))
    for decided in routing.values():
        assert (decided.scores.shape, decided.scores.dtype) == ((1, FRAMES, tokens), jnp.float32)
        assert (decided.kept.shape, decided.kept.dtype) == ((1, FRAMES, num_kept(tokens, 0.2)), jnp.int32)


@pytest.mark.parametrize(
    ("tokens", "vision"), [(10, True), pytest.param(50, False, marks=pytest.mark.slow)], ids=["10", "50"]
)
def test_gradient_of_what_is_trained(tokens, vision):
    config = make_config(tokens, vision)
    trained, frozen = split(parameters(config), {"lora", "connector", "expert"})

    def loss(trained, frozen, batch):
        return forward(config, merge(trained, frozen), batch)[0]

    gradient = jax.eval_shape(jax.grad(loss), trained, frozen, inputs(config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), gradient) == jax.tree.map(lambda x: (x.shape, x.dtype), trained)


def test_the_cache_of_a_stream():
    """Bytes at 1200 frames x 10 tokens: 16 full layers hold every token, 16 routed ones text and 2 of 10."""
    config = make_config()
    assert cache_slots(config, FRAMES, 1024) == 16 * [1024 + 10 * FRAMES, 1024 + 2 * FRAMES]
    cache = jax.eval_shape(lambda: make_cache(config, FRAMES, 1024))
    held = sum(x.size * x.dtype.itemsize for layer in cache.layers for x in (layer.key, layer.value))
    full = 2 * 2 * 32 * 8 * 128 * (1024 + 10 * FRAMES)
    assert held == full * (1024 + 2 * FRAMES + 1024 + 10 * FRAMES) / (2 * (1024 + 10 * FRAMES))
