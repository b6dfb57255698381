"""What each rematerialisation computes again, counted in the traced backward pass, and the memory it takes."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import pytest

from vmod_jax.models import attention
from vmod_jax.models.depth import make_policy
from vmod_jax.models.llama import REMAT, LlamaConfig
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, init_params
from vmod_jax.performance.jaxprs import equations

CONFIG = VideoLMConfig(
    llama=LlamaConfig(64, 32, 64, 16, 4, 2, 8),
    policy=make_policy("interleaved", 16),
    frame_token_id=64,
    vision_hidden_size=8,
)


def gradient(remat, **changes):
    """The gradient of a function of the parameters, and shapes for its argument: 40 frames and 40 text tokens."""
    config = dataclasses.replace(CONFIG, remat=remat, **changes)
    frames, n = 40, config.tokens_per_frame
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    ids = jnp.concatenate([jnp.full((1, frames * n), 64), jnp.zeros((1, 40), jnp.int32)], axis=1)
    features = jnp.zeros((1, frames, n, 8))

    def loss(params):
        return VideoLM(config).apply({"params": params}, ids, features, method="hidden")[0].sum()

    return jax.grad(loss), params


def attention_products(remat, backend):
    """Matrix products batched by row and key/value head: those of attention."""
    function, params = gradient(remat, attention=backend)
    products = [e for e in equations(jax.make_jaxpr(function)(params).jaxpr) if e.primitive.name == "dot_general"]
    return sum(len(e.params["dimension_numbers"][1][0]) == 2 for e in products)


def test_attention_is_not_computed_again_where_it_is_kept():
    # A tile of the forward pass takes 2 products, of the backward pass 5; on and off the diagonal; full, routed layer.
    forward, backward = 2 * 2 * 2, 5 * 2 * 2
    assert attention_products("none", "blocked") == forward + backward
    assert attention_products("full", "blocked") == forward + forward + backward
    assert attention_products("attention", "blocked") == forward + backward
    # The reference has no kernel of its own: its logits are needed again, its sum over values is not.
    assert attention_products("full", "reference") - attention_products("attention", "reference") == 2


def test_memory_lies_between():
    def temporary(remat):
        function, params = gradient(remat)
        return jax.jit(function).lower(params).compile().memory_analysis().temp_size_in_bytes

    none, kept, full = (temporary(remat) for remat in ("none", "attention", "full"))
    # Kept: the output [T, d] and the log-sum-exp [T, H] of 8 full and 8 routed layers, in float32.
    llama, tokens = CONFIG.llama, (40 * 10 + 40) + (40 * 2 + 40)
    extra = 8 * tokens * (llama.hidden_size + llama.num_attention_heads) * 4
    assert full + extra / 2 < kept < full + extra < none / 2


@pytest.fixture
def a_gpu(monkeypatch):
    """cuDNN's attention can be traced and lowered without a device once it believes in a version of cuDNN."""
    kernel = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(kernel, "check_compute_capability", lambda version: True)
    monkeypatch.setattr(kernel, "is_cuda_compute_capability_equal", lambda version: False)


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("full", 2), ("attention", 1)])
def test_forward_kernels_of_cudnn(a_gpu, remat, forward):
    def loss(q, k, v):
        causal = functools.partial(attention.causal_attention, backend="cudnn")
        return REMAT[remat](causal)(q, k, v).astype(jnp.float32).sum()

    q, k = (jax.ShapeDtypeStruct((1, 256, heads, 128), jnp.bfloat16) for heads in (8, 2))
    names = [e.primitive.name for e in equations(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, k).jaxpr)]
    assert names.count("dot_product_attention_fwd_wrapper") == forward
    assert names.count("dot_product_attention_bwd_wrapper") == 1


def test_a_step_with_cudnn_lowers_for_a_gpu(a_gpu):
    llama = dataclasses.replace(CONFIG.llama, head_dim=16)
    function, params = gradient("attention", llama=llama, attention="cudnn", dtype="bfloat16")
    checks = [jax.export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{way}") for way in ("", "Backward")]
    module = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(params).mlir_module()
    # A full and a routed layer, traced once each; no bias and no mask is passed: queries, keys and values alone.
    assert module.count("@__cudnn$fmhaSoftmax(") == 2
    assert module.count("@__cudnn$fmhaSoftmaxBackward(") == 2
    assert "CAUSAL" in module
