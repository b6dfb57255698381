"""Groups of parameters: who is trained, how fast, with which decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vmod_jax.training.config import defaults
from vmod_jax.training.optimizer import decayed, flatten, group, make_optimizer, merge, schedule, split, trained_groups

PATHS = {
    "llama/embed/embedding": "base",
    "llama/layers/input_norm/scale": "base",
    "llama/layers/q/kernel": "base",
    "llama/layers/q/lora_a": "lora",
    "llama/head/lora_b": "lora",
    "llama/layers/expert/kernel": "expert",
    "connector/in/kernel": "connector",
    "connector/out/bias": "connector",
    "vision/layers/q/kernel": "vision",
}


@pytest.fixture
def params():
    from flax.traverse_util import unflatten_dict

    return unflatten_dict({path: jnp.full((2, 3), 0.5) for path in PATHS}, sep="/")


def test_groups_and_decay():
    assert {path: group(path) for path in PATHS} == PATHS
    assert {path for path in PATHS if decayed(path)} == {
        "llama/embed/embedding", "llama/layers/q/kernel", "llama/layers/q/lora_a", "llama/head/lora_b",
        "connector/in/kernel", "vision/layers/q/kernel",
    }  # fmt: skip


def test_split_and_merge(params):
    config = defaults().optimizer
    assert trained_groups(config) == {"lora", "connector", "expert"}
    trained, frozen = split(params, trained_groups(config))
    assert set(flatten(trained)) == {path for path, name in PATHS.items() if name in ("lora", "connector", "expert")}
    assert not flatten(trained).keys() & flatten(frozen).keys()
    assert jax.tree.structure(merge(trained, frozen)) == jax.tree.structure(params)
    config.train_base = config.train_vision = True
    assert not flatten(split(params, trained_groups(config))[1])


def test_no_state_for_frozen_parameters(params):
    config = defaults().optimizer
    trained, _ = split(params, trained_groups(config))
    state = make_optimizer(config, 10).init(trained)
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(trained))


def test_first_step_is_adamw_with_each_groups_rate(params):
    """Adam's first step is the sign of the gradient, whatever its size; so the rates and the decay can be read off."""
    config = defaults().optimizer
    config.rates.expert, config.rates.base, config.weight_decay, config.eps = 5.0, 0.5, 0.1, 1e-30
    steps, warmup = 100, 10
    config.warmup = warmup / steps
    config.train_base = True
    trained, _ = split(params, trained_groups(config))
    optimizer = make_optimizer(config, steps)
    gradient = jax.tree.map(lambda x: 3 * jnp.ones_like(x), trained)
    updates = flatten(optimizer.update(gradient, optimizer.init(trained), trained)[0])
    rate = config.learning_rate / warmup
    for path, update in updates.items():
        factor = {"expert": 5.0, "base": 0.5}.get(group(path), 1.0)
        decay = 0.1 * 0.5 if decayed(path) else 0.0
        np.testing.assert_allclose(update, -rate * factor * (1 + decay), rtol=1e-5)


def test_clipping_by_the_trained_parameters_norm():
    config = defaults().optimizer
    config.clip, config.b1 = 1.0, 0.0
    tree = {"connector": {"in": {"kernel": jnp.zeros((2, 2))}, "out": {"kernel": jnp.zeros((2, 2))}}}
    state = make_optimizer(config, 10).init(tree)
    big = jax.tree.map(lambda x: x + 10.0, tree)
    small = jax.tree.map(lambda x: x + 8**-0.5, tree)  # the same direction at norm 1
    _, after_big = make_optimizer(config, 10).update(big, state, tree)
    _, after_small = make_optimizer(config, 10).update(small, state, tree)
    moments = [[x for x in jax.tree.leaves(s) if x.ndim] for s in (after_big, after_small)]
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_schedule():
    rate = schedule(2.0, 100, 0.05)
    got = np.array([rate(step) for step in range(101)])
    np.testing.assert_allclose(got[:5], 2.0 * np.arange(1, 6) / 5, rtol=1e-6)
    reference = optax.cosine_decay_schedule(2.0, 95)
    np.testing.assert_allclose(got[5:], [reference(step) for step in range(96)], rtol=1e-5, atol=1e-6)
    assert got[100] == 0
