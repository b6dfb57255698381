"""LoRA merged, weights of 8 bits and layers with arrays of their own, as streams use them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import VOCAB, draw_row, make_config, make_params

from vmod_jax.models.inference import merge_lora, stack, to_int8, unstack
from vmod_jax.models.video_lm import VideoLM


def logits(config, params, ids, features):
    return np.asarray(VideoLM(config).apply({"params": params}, ids[None], features[None]).logits[0])


@pytest.mark.parametrize("tied", [False, True])
def test_merged_is_the_same_model(tied):
    config = make_config()
    config = dataclasses.replace(config, llama=dataclasses.replace(config.llama, tie_word_embeddings=tied))
    params = make_params(config)
    _, ids, features, expected = draw_row(config, params, seed=1)
    merged = merge_lora(config, params)
    assert merged[0].lora.rank == 0
    assert not [path for path, _ in jax.tree_util.tree_leaves_with_path(merged[1]) if "lora" in path[-1].key]
    got = logits(*merged, ids, features)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    without = make_params(config)
    without["llama"]["layers"]["q"]["lora_b"] *= 0
    assert np.abs(logits(*merge_lora(config, without), ids, features) - expected).max() > 1e-3  # adapters do matter
    assert merge_lora(*merged) == merged


@pytest.mark.parametrize("change", [lambda *model: model, merge_lora, to_int8])
def test_layers_with_arrays_of_their_own_are_the_same_model(change):
    config, params = change(make_config(), make_params(make_config()))
    apart = unstack(params)
    assert "layers" not in apart["llama"]
    assert {leaf.shape for leaf in jax.tree.leaves([layer["q"] for layer in apart["llama"]["unstacked"]])} == {
        leaf.shape[1:] for leaf in jax.tree.leaves(params["llama"]["layers"]["q"])
    }
    assert unstack(apart) is apart
    if change is merge_lora:  # what is apart already can be made smaller, too
        jax.tree.map(np.testing.assert_array_equal, to_int8(config, apart)[1], unstack(to_int8(config, params)[1]))
    jax.tree.map(np.testing.assert_array_equal, stack(apart), params)
    jax.tree.map(np.testing.assert_array_equal, stack(params), params)
    _, ids, features, _ = draw_row(config, params, seed=1)
    np.testing.assert_allclose(logits(config, apart, ids, features), logits(config, params, ids, features), atol=1e-5)


def test_one_router_for_all_layers_survives_being_unstacked():
    config = dataclasses.replace(make_config(), shared_router=True)
    params = make_params(config)
    _, ids, features, expected = draw_row(config, params, seed=1)
    np.testing.assert_allclose(logits(config, unstack(params), ids, features), expected, atol=1e-5)


def test_int8_weights_are_within_half_a_step():
    config = make_config()
    exact, params = merge_lora(config, make_params(config))[1], to_int8(config, make_params(config))[1]
    pairs = [(exact["llama"]["layers"][name], params["llama"]["layers"][name]) for name in ("q", "o", "up", "down")]
    for before, after in [*pairs, (exact["llama"]["head"], params["llama"]["head"])]:
        kernel = before["kernel"]
        assert after["kernel"].dtype == jnp.int8
        np.testing.assert_allclose(after["scale"] * 127, np.abs(kernel).max(-2), rtol=1e-6)
        error = np.abs(after["kernel"] * after["scale"][..., None, :] - kernel)
        assert (error <= 0.5001 * after["scale"][..., None, :]).all()
    for same in ("embed", "norm"):
        jax.tree.map(np.testing.assert_array_equal, params["llama"][same], exact["llama"][same])
    zero = to_int8(config, jax.tree.map(jnp.zeros_like, make_params(config)))[1]
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(zero))


def test_int8_logits_are_within_three_percent():
    """The stated error: 3% of the logits' spread, root mean square, of a random model of width 32, without routing."""
    config = make_config("full")
    params = make_params(config)
    _, ids, features, expected = draw_row(config, params, seed=2)
    error = logits(*to_int8(config, params), ids, features) - expected
    assert expected.shape[-1] == VOCAB
    assert np.sqrt(np.mean(error**2)) < 0.03 * expected.std()
    assert np.abs(error).max() > 0
