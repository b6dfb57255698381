"""One router for all routed layers: row 0 alone is read and trained, in training, streaming, export and import."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import LAYERS, WIDTH, draw_row, make_config, make_params

import vmod_jax as vmod
from vmod_jax.models.experts import adapt, learned_layers
from vmod_jax.models.layer_expert import router_init_std
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig
from vmod_jax.streaming.engine import Engine, Programs
from vmod_jax.training.config import defaults, method
from vmod_jax.weights import export


def experts(params):
    return np.asarray(params["llama"]["layers"]["expert"]["kernel"])


def with_experts(params, rows):
    layers = {**params["llama"]["layers"], "expert": {"kernel": jnp.asarray(rows)}}
    return {**params, "llama": {**params["llama"], "layers": layers}}


def test_it_is_a_model_whose_routers_are_copies_of_row_0():
    shared = make_config("interleaved", shared_router=True, remat="full")
    own = dataclasses.replace(shared, shared_router=False)
    params = make_params(shared)
    copies = with_experts(params, np.tile(experts(params)[:1], (LAYERS, 1)))
    _, ids, features, logits = draw_row(shared, params, 0)

    def gradient(config, params):
        def loss(params):
            out = VideoLM(config).apply({"params": params}, ids[None], features[None])
            return jnp.square(out.logits).mean(), out

        (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return out, experts(gradient)

    (out, moved), (want, each) = gradient(shared, params), gradient(own, copies)
    np.testing.assert_allclose(out.logits, want.logits, atol=1e-6, rtol=0)
    for layer, routed in want.routing.items():
        np.testing.assert_array_equal(out.routing[layer].kept, routed.kept)
    assert not moved[1:].any()
    assert np.abs(each[learned_layers(shared.policy)]).max(1).min() > 1e-5
    np.testing.assert_allclose(moved[0], each.sum(0), atol=1e-6, rtol=1e-4)
    # What it is not: each layer with the row of its own.
    other = jax.jit(VideoLM(own).apply)({"params": params}, ids[None], features[None])
    assert np.abs(other.logits[0] - logits).max() > 1e-3


def test_a_stream_equals_the_whole_sequence():
    config = make_config("all", shared_router=True)
    params = make_params(config)
    pieces, ids, features, logits = draw_row(config, params, 1)
    engine = Engine(Programs(config), params, first_frames=8, first_text=64)
    got = [engine.feed_frames(text, features[i : i + 1], [])[0] for i, (text, frame) in enumerate(pieces) if frame]
    ends = np.flatnonzero(ids == config.frame_token_id)[config.tokens_per_frame - 1 :: config.tokens_per_frame]
    np.testing.assert_allclose(got, logits[ends], atol=1e-5, rtol=0)


def test_the_export_runs_in_pytorch_and_comes_back(tmp_path):
    torch = pytest.importorskip("torch")
    from vmod_jax.weights.torch_runtime import modeling_vmod

    torch.set_num_threads(1)
    config = make_config("interleaved", shared_router=True)
    params = make_params(config)
    _, ids, features, logits = draw_row(config, params, 2)
    export.vmod_folder(tmp_path, config, params, {})
    model = modeling_vmod.VideoLM.from_pretrained(tmp_path).eval()
    got = model(ids[None], torch.from_numpy(features[None]))[0]
    np.testing.assert_allclose(got.detach().numpy(), logits, atol=1e-4, rtol=0)
    again = vmod.load(tmp_path)
    assert again.config.shared_router
    np.testing.assert_array_equal(experts(again.params), np.tile(experts(params)[:1], (LAYERS, 1)))
    np.testing.assert_allclose(again.logits(ids[None], features[None])[0], logits, atol=1e-5, rtol=0)


def test_it_is_a_key_and_a_field_that_old_files_lack():
    config = defaults()
    assert method(config, LAYERS)["shared_router"] is False
    config.model.shared_router = True
    assert method(config, LAYERS)["shared_router"] is True
    shared = make_config(shared_router=True)
    assert VideoLMConfig.from_json(shared.to_json()) == shared
    old = json.loads(shared.to_json())
    del old["shared_router"]
    assert VideoLMConfig.from_json(json.dumps(old)) == make_config()


def fresh(layers):
    return f"LayerExperts of layers {layers} are at their initialisation"


def left_out(layers):
    return f"trained LayerExperts of layers {layers} are left out"


@pytest.mark.parametrize(
    ("there", "here", "trained", "line", "scaled"),
    [
        # (policy, shared) there and here; layers trained there; what is said; rows that follow the new gate
        (("interleaved", True), ("interleaved", True), [1, 3], None, []),
        (("interleaved", True), ("all", True), [1, 3], None, []),
        (("interleaved", True), ("full", True), [1, 3], left_out("0 (shared)"), []),
        (("interleaved", False), ("interleaved", True), [1, 3], f"{fresh('0 (shared)')}; {left_out('1, 3')}", [0]),
        (("all", False), ("interleaved", True), [0, 1, 2, 3], left_out("1, 2, 3"), []),
        (("full", False), ("interleaved", True), [], fresh("0 (shared)"), [0]),
        (("interleaved", True), ("interleaved", True), [], fresh("0 (shared)"), [0]),
        (("interleaved", True), ("interleaved", False), [], fresh("1, 3"), [1, 3]),
    ],
)
def test_rows_that_have_been_trained(there, here, trained, line, scaled):
    there = make_config(there[0], gate="raw", shared_router=there[1])
    here = make_config(here[0], gate="tanh", shared_router=here[1])
    params = {"llama": {"layers": {"expert": {"kernel": jnp.ones((LAYERS, WIDTH))}}}}
    got, said = adapt(params, there, here, trained)
    assert said == line
    factor = router_init_std("tanh", WIDTH) / router_init_std("raw", WIDTH)
    want = np.array([[factor if row in scaled else 1] * WIDTH for row in range(LAYERS)], np.float32)
    np.testing.assert_allclose(experts(got), want, rtol=1e-6)


def test_layers_that_share_no_longer_begin_with_what_they_shared():
    shared, own = make_config("interleaved", shared_router=True), make_config("all", gate="tanh")
    params = make_params(shared)
    got, said = adapt(params, shared, own, [1, 3])
    assert said == "layers 0, 1, 2, 3 begin with the LayerExpert that was shared"
    np.testing.assert_array_equal(experts(got), np.tile(experts(params)[:1], (LAYERS, 1)))
    assert got["llama"]["layers"]["q"] is params["llama"]["layers"]["q"]
