"""Which tokens of a frame are computed, and with what factor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmod_jax.errors import UserError
from vmod_jax.models.layer_expert import (
    gate,
    random_scores,
    router_init_std,
    router_scores,
    select,
    straight_through,
    uniform_indices,
)

FEW = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 0.5 + 2**-24, 1.0])  # few values: ties are common
pick = jax.jit(select, static_argnames=("k", "always_keep_last"))


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_highest_scores_stay_and_ties_go_to_the_lower_index(k):
    @settings(deadline=None, max_examples=50)
    @given(st.lists(FEW, min_size=14, max_size=14))
    def check(values):
        scores = np.array(values, np.float32).reshape(1, 2, 7)
        kept = np.asarray(pick(scores, k))
        assert kept.shape == (1, 2, k)
        for f in range(2):
            # -0.0 and 0.0 are one value to a user, whatever their bits.
            order = sorted(range(7), key=lambda i: (-(scores[0, f, i] + 0.0), i))
            assert kept[0, f].tolist() == sorted(order[:k])

    check()


def test_equal_scores_keep_k():
    assert select(jnp.zeros((1, 1, 10)), 3).tolist() == [[[0, 1, 2]]]


def test_a_frame_decides_for_itself():
    """The other frame's scores, however high, change nothing."""
    scores = np.array([[[0.1, 0.3, 0.2], [5.0, 4.0, 6.0]]], np.float32)
    assert select(jnp.asarray(scores), 1).tolist() == [[[1], [2]]]
    scores[0, 1] = [-9.0, -7.0, -8.0]
    assert select(jnp.asarray(scores), 1).tolist() == [[[1], [1]]]


def test_the_last_token_can_be_kept_always():
    scores = jnp.array([[[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]]])
    assert select(scores, 2, always_keep_last=True).tolist() == [[[0, 3], [2, 3]]]
    assert select(scores, 1, always_keep_last=True).tolist() == [[[3], [3]]]


def test_gates():
    mu = np.array([-30.0, -1.0, 0.0, 0.5, 30.0], np.float32)
    np.testing.assert_array_equal(gate("raw", mu), mu)
    np.testing.assert_allclose(gate("tanh", mu), 1 + 0.2 * np.tanh(mu), rtol=1e-6)
    np.testing.assert_allclose(gate("sigmoid", mu), 1 / (1 + np.exp(-mu.astype(np.float64))), rtol=1e-6)
    assert gate("tanh", jnp.float32(0)) == 1  # a pretrained block is unharmed at the first step
    assert (np.abs(np.asarray(gate("tanh", mu)) - 1) <= 0.2 + 1e-6).all()
    with pytest.raises(UserError, match="unknown gate 'relu': use one of raw, tanh, sigmoid, straight_through"):
        gate("relu", mu)


def test_straight_through_scales_nothing_and_learns_which_tokens_are_worth_more_than_the_others():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
    worth = rng.normal(size=(2, 3, 5))
    value, pull = jax.vjp(straight_through, scores)
    assert (value == 1).all()
    (gradient,) = pull(jnp.asarray(worth, jnp.float32))
    share = np.exp(np.asarray(scores, np.float64))
    share /= share.sum(-1, keepdims=True)
    better = worth - (share * worth).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, 5 * share * better, atol=1e-5)

    value, pull = jax.vjp(lambda scores: straight_through(scores, always_keep_last=True), scores)
    assert (value == 1).all()
    (gradient,) = pull(jnp.ones((2, 3, 5)).at[..., 1].set(2.0))
    assert (np.asarray(gradient[..., -1]) == 0).all()
    assert (np.asarray(gradient[..., 1]) > 0).all()
    assert (np.asarray(gradient[..., [0, 2, 3]]) < 0).all()


def test_initial_routers_of_each_gate():
    assert router_init_std("raw", 64) == 1 / 8
    assert router_init_std("tanh", 64) == router_init_std("straight_through", 64) == 0.02 / 8


def test_scores_are_real_float32_also_of_bfloat16_input():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 64)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=64), jnp.float32)
    scores = router_scores(x, weight)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, np.asarray(x, np.float64) @ np.asarray(weight, np.float64), atol=1e-5)
    with pytest.raises(AssertionError):
        router_scores(x, weight.astype(jnp.bfloat16))


def test_random_scores_depend_on_seed_layer_and_frame_alone():
    """A chunk that starts at frame 5 sees what the whole sequence sees there; rows agree with each other."""
    draw = jax.jit(random_scores, static_argnames="n")
    whole = np.asarray(draw(3, 1, np.arange(8)[None], 10))
    chunk = np.asarray(draw(3, 1, np.array([[5, 6], [0, 7]]), 10))
    np.testing.assert_array_equal(chunk[0], whole[0, 5:7])
    np.testing.assert_array_equal(chunk[1], whole[0, [0, 7]])
    assert len(np.unique(whole)) == whole.size
    for seed, layer in ((4, 1), (3, 2)):
        assert not (np.asarray(draw(seed, layer, np.arange(8)[None], 10)) == whole).any()


def test_random_choice_is_fair():
    kept = np.asarray(select(random_scores(0, 0, jnp.arange(4000)[None], 5), 2))
    share = np.bincount(kept.ravel(), minlength=5) / 4000
    np.testing.assert_allclose(share, 2 / 5, atol=0.04)  # five standard deviations


@pytest.mark.parametrize(
    ("n", "k", "expected"),
    [(10, 2, [0, 9]), (10, 3, [0, 4, 9]), (10, 1, [0]), (5, 5, [0, 1, 2, 3, 4]), (1, 1, [0]), (26, 6, None)],
)
def test_uniform_indices_are_spread_and_begin_with_cls(n, k, expected):
    got = uniform_indices(n, k).tolist()
    assert expected is None or got == expected
    assert got[0] == 0
    assert len(set(got)) == k
    assert got == sorted(got)
    assert np.ptp(np.diff(got)) <= 1 if k > 1 else True
