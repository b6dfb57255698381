"""The compiled step of a stream: what it may not do beside its arithmetic."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import D_V, LLAMA, make_config

from vmod_jax.models.inference import merge_lora, to_int8, unstack
from vmod_jax.models.video_lm import init_params, make_cache
from vmod_jax.streaming.engine import Programs


@pytest.mark.parametrize("change", [merge_lora, to_int8])
def test_a_frame_copies_neither_weights_nor_cache(change):
    """A step on 10 tokens needs room for one layer's weights (made into floats) at most, and none for its cache."""
    base = make_config(grid=(1, 8))
    llama = dataclasses.replace(LLAMA, hidden_size=256, intermediate_size=1024, head_dim=32, num_hidden_layers=8)
    config = dataclasses.replace(base, llama=llama, policy=2 * base.policy)
    held = {}

    def parameters():
        held["config"], params = change(config, init_params(config, jax.random.key(0)))
        return unstack(params)

    params = jax.eval_shape(parameters)
    cache = jax.eval_shape(lambda: make_cache(held["config"], frames=500, text=700))
    size = lambda tree: sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(tree))  # noqa: E731
    layer = size([leaf for leaf in jax.tree.leaves(params["llama"]["unstacked"][0]) if leaf.ndim == 2])
    ids, frames, one = np.zeros((1, 14), np.int32), np.zeros((1, 1, 9, D_V), np.float32), np.zeros(1, np.int32)
    program = Programs(held["config"]).extend.lower(params, cache, jnp.asarray(ids), frames, one, one).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * size(cache)
    assert memory.temp_size_in_bytes < layer < size(cache) / 2


def test_layers_that_are_alike_are_lowered_once():
    """One function for the full layers and one for the routed, however many there are."""
    config, ids = make_config(grid=(1, 8)), np.zeros((1, 8), np.int32)
    for repeats in (1, 3):
        llama = dataclasses.replace(LLAMA, num_hidden_layers=repeats * len(config.policy))
        deep = dataclasses.replace(config, llama=llama, policy=repeats * config.policy)
        params, cache = jax.eval_shape(lambda c=deep: (unstack(init_params(c, jax.random.key(0))), make_cache(c, 8, 8)))
        text = Programs(deep).extend.lower(params, cache, ids, None, np.ones(1, np.int32), np.zeros(1, np.int32))
        assert text.as_text().count("func.func private @_traced_once") == len(set(config.policy)) == 2
