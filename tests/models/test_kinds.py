"""What Qwen2 (biases on q, k, v) and Qwen3 (norms on q and k) add to a Llama, under the method."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AbstractMesh, PartitionSpec
from tiny_models import LLAMA, VOCAB, draw_row, make_config, make_params

from vmod_jax.errors import UserError
from vmod_jax.models.inference import merge_lora, to_int8
from vmod_jax.models.llama import KINDS, LlamaConfig
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, make_cache
from vmod_jax.training.sharding import spec
from vmod_jax.weights import export

ADDED = (*(f"{x}/bias" for x in "qkv"), "q_norm/scale", "k_norm/scale")


@pytest.fixture(scope="module")
def both():
    """A model with biases and norms, its parameters and a row of text and frames with their logits."""
    config = make_config(llama=dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True, head_dim=12))
    params = make_params(config)
    return config, params, draw_row(config, params, 0)


@functools.cache
def compiled(config):
    return jax.jit(VideoLM(config).apply)


def logits(config, params, ids, features):
    return np.asarray(compiled(config)({"params": params}, ids[None], features[None]).logits[0])


@pytest.mark.one_function
def test_whole_stream_and_reference_are_one_function(both):
    config, params, (pieces, ids, features, whole) = both
    slow, _ = reference.forward(config, params, ids, features)
    np.testing.assert_allclose(whole, slow, atol=2e-5, rtol=0)
    model = VideoLM(config)

    @jax.jit
    def extend(params, cache, chunk, shown, length):
        hidden, _, cache = model.apply({"params": params}, chunk, shown, length, cache, method="hidden")
        return model.apply({"params": params}, hidden[0], method="logits"), cache

    out, cache, n = [], make_cache(config, 16, 64), config.tokens_per_frame
    for i, (text, frame) in enumerate(pieces):
        chunk = text + [VOCAB] * (n * frame)
        padded = np.zeros((1, 4 + n), np.int32)
        padded[0, : len(chunk)] = chunk
        shown = features[None, i : i + 1] if frame else np.zeros_like(features[None, :1])
        got, cache = extend(params, cache, padded, shown, np.array([len(chunk)]))
        out.append(got[: len(chunk)])
    np.testing.assert_allclose(np.concatenate(out), whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ADDED)
def test_each_has_a_say(both, name):
    config, params, (_, ids, features, whole) = both
    layers, (module, leaf) = params["llama"]["layers"], name.split("/")
    other = {**layers, module: {**layers[module], leaf: layers[module][leaf] * jnp.linspace(0.5, 2, 4)[:, None]}}
    got = logits(config, {**params, "llama": {**params["llama"], "layers": other}}, ids, features)
    assert np.abs(got - whole).max() > 1e-3


def test_merged_and_8_bit_weights_keep_them(both):
    config, params, (_, ids, features, whole) = both
    np.testing.assert_allclose(logits(*merge_lora(config, params), ids, features), whole, atol=1e-5)
    layers, small = params["llama"]["layers"], to_int8(config, params)[1]["llama"]["layers"]
    for name in ADDED:
        module, leaf = name.split("/")
        np.testing.assert_array_equal(small[module][leaf], layers[module][leaf])


def test_the_pytorch_runtime_has_them(both, tmp_path):
    torch = pytest.importorskip("torch")
    from vmod_jax.weights.torch_runtime import modeling_vmod

    config, params, (_, ids, features, whole) = both
    export.vmod_folder(tmp_path, config, params, {})
    model = modeling_vmod.VideoLM.from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(model(ids[None], torch.from_numpy(features[None]))[0], whole, atol=1e-4, rtol=0)


def test_a_model_of_before_still_loads():
    config = make_config()
    old = json.loads(config.to_json())
    assert not old["llama"].pop("qkv_bias")
    assert not old["llama"].pop("qk_norm")
    assert VideoLMConfig.from_json(json.dumps(old)) == config
    shapes = make_params(config)["llama"]["layers"]
    assert shapes.keys() == {"input_norm", "post_norm", "q", "k", "v", "o", "gate", "up", "down", "expert"}
    assert shapes["q"].keys() == {"kernel", "lora_a", "lora_b"}


def test_biases_are_placed_with_their_heads():
    mesh = AbstractMesh((2, 2, 1, 2), ("data", "fsdp", "context", "tensor"))
    assert spec("llama/layers/k/bias", (4, 64), mesh) == PartitionSpec(None, "tensor")
    assert spec("llama/layers/k_norm/scale", (4, 64), mesh) == PartitionSpec()


SIZES = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_kinds_are_read_from_a_config():
    for kind in KINDS:
        made = LlamaConfig.from_hf_config({"model_type": kind, **SIZES})
        assert (made.qkv_bias, made.qk_norm) == (kind == "qwen2", kind == "qwen3")
        assert made.head_dim == (128 if kind == "qwen3" else 4)  # Qwen3's default does not follow from its width
    for changes, message in (
        ({"model_type": "qwen2_moe"}, "model_type 'qwen2_moe' is not supported: bring one of llama, mistral, qwen2"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
    ):
        with pytest.raises(UserError, match=message):
            LlamaConfig.from_hf_config({**SIZES, **changes})
