"""The decoder: what its checkpoints save, its RoPE scaling, its configuration."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmod_jax.errors import UserError
from vmod_jax.models.depth import make_policy
from vmod_jax.models.llama import LlamaConfig, RopeScaling, low_rank, rope_frequencies
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, init_params
from vmod_jax.performance.jaxprs import stacked

CONFIG = VideoLMConfig(
    llama=LlamaConfig(64, 64, 128, 8, 4, 2, 16),
    policy=make_policy("full", 8),
    frame_token_id=64,
    vision_hidden_size=8,
    remat="full",
)


def saved_between_layers(policy: str) -> int:
    """Bytes of floats [.., T or T', d] that the scan over layers stacks for the backward pass."""
    frames, n, text = 40, CONFIG.tokens_per_frame, 40
    config = dataclasses.replace(CONFIG, policy=make_policy(policy, 8))
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    ids = jnp.concatenate([jnp.full((1, frames * n), 64), jnp.zeros((1, text), jnp.int32)], axis=1)
    features = jnp.zeros((1, frames, n, 8))

    def loss(params):
        return VideoLM(config).apply({"params": params}, ids, features, method="hidden")[0].sum()

    width = CONFIG.llama.hidden_size
    kept = stacked(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    return sum(a.size * a.dtype.itemsize for a in kept if a.dtype == jnp.float32 and a.shape[-1:] == (width,))


def test_a_routed_layers_checkpoint_saves_its_compacted_input():
    tokens, kept = 40 * 10 + 40, 40 * 2 + 40
    ratio = saved_between_layers("interleaved") / saved_between_layers("full")
    assert ratio == pytest.approx((tokens + kept) / (2 * tokens), rel=1e-3)


@pytest.mark.parametrize("lead", [(7,), (2, 5), ()])
def test_loras_product_and_its_gradient_are_those_of_the_plain_product(lead):
    rng = np.random.default_rng(len(lead))
    x, a, b, weight = (rng.normal(size=size).astype(np.float32) for size in ((*lead, 12), (12, 3), (3, 8), (*lead, 8)))
    want = jax.value_and_grad(lambda x, a, b: jnp.sum(weight * ((x @ a) @ b)), (0, 1, 2))(x, a, b)
    got = jax.value_and_grad(lambda x, a, b: jnp.sum(weight * low_rank(x @ a, b)), (0, 1, 2))(x, a, b)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=2e-5, atol=1e-5), got, want)
    x, a, b = (jnp.asarray(part, jnp.bfloat16) for part in (x, a, b))
    half = low_rank(x @ a, b)
    assert half.dtype == jnp.bfloat16


def test_llama3_rope_scaling_equals_transformers():
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    scaling = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(CONFIG.llama, head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    hf = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **dataclasses.asdict(scaling)},
    )  # fmt: skip
    pytest.importorskip("torch")
    expected, _ = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](hf, "cpu")
    np.testing.assert_allclose(rope_frequencies(config), expected.numpy(), rtol=1e-6)


HF = {
    "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


def test_both_spellings_of_rope():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = LlamaConfig.from_hf_config({**HF, "rope_theta": 5e5, "rope_scaling": scaling})
    new = LlamaConfig.from_hf_config({**HF, "rope_parameters": {"rope_theta": 5e5, **scaling}})
    assert old == new
    assert new.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 2048)  # max_position_embeddings, as transformers
    assert LlamaConfig.from_hf_config(HF).rope_scaling is None


LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "rope_scaling": LINEAR},
        {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": LINEAR},
        {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": LINEAR, "rope_theta": 700.0},
        {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": {}, "rope_theta": 700.0},
        {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": None, "rope_theta": 700.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 2}, "rope_theta": 700.0},
        {"rope_parameters": None, "rope_theta": 700.0},
        {"rope_scaling": {**LINEAR, "rope_theta": 99.0}, "rope_theta": 700.0},
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}, "rope_scaling": LINEAR},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "rope_scaling": LLAMA3},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}, "original_max_position_embeddings": 16},
        {"rope_scaling": {**LINEAR, "factor": 0.5, "rope_type": "linear"}},
    ],
)
def test_rope_that_is_named_twice_is_what_transformers_computes(rope):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import AutoConfig

    config = {**HF, "head_dim": 16, "max_position_embeddings": 256, **rope}
    theirs = modeling.LlamaRotaryEmbedding(AutoConfig.for_model(**copy.deepcopy(config))).inv_freq
    ours = rope_frequencies(LlamaConfig.from_hf_config(config))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_moe"}, "qwen2_moe"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_scaling": ["linear", 2.0]}, "rope_scaling is"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "factor is None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor is '4'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": {"rope_type": "linear", "type": "default", "factor": 2.0}}, "keep one"),
        ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "rope scaling None"),
        ({"rope_scaling": {"rope_type": {}, "factor": 2.0}}, "rope scaling {}"),
        ({"rope_scaling": {"factor": 2.0}}, "factor in its default RoPE"),
        ({"rope_scaling": {**LINEAR, "attention_factor": 1.5}}, "attention_factor in its linear RoPE"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, "full_attention in its"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta is None"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "must be above low_freq_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_key_value_heads": 3}, "3 key/value heads"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0, not a whole number"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
    ],
)
def test_configs_that_are_not_computed(change, message):
    with pytest.raises(UserError, match=message):
        LlamaConfig.from_hf_config({**HF, **change})
    with pytest.raises(UserError, match="lacks vocab_size"):
        LlamaConfig.from_hf_config({name: value for name, value in HF.items() if name != "vocab_size"})


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5, 1e6])
def test_frequencies_are_pytorchs(theta):
    """One bit of them is 4e-4 of a real model's logits after 2000 tokens."""
    torch = pytest.importorskip("torch")
    for h in (32, 64, 128):
        made = rope_frequencies(LlamaConfig(10, 8, 8, 1, 1, 1, h, theta))
        theirs = (1.0 / theta ** (torch.arange(0, h, 2).float() / h)).numpy()
        assert (made != theirs).sum() <= 1  # PyTorch's own power is not always rounded right
        np.testing.assert_allclose(made, theirs, rtol=1e-7)
