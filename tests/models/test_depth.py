"""Depth policies as data: the paper's table, exact kept counts, and the scan's units."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmod_jax.errors import UserError
from vmod_jax.models.depth import (
    FULL,
    POLICIES,
    SKIP,
    LayerSpec,
    doublings_at,
    explicit_policy,
    loosened,
    make_policy,
    num_kept,
    segments,
)


@pytest.mark.parametrize(
    ("n", "keep", "kept"),
    [(10, 0.1, 1), (10, 0.2, 2), (10, 0.3, 3), (50, 0.2, 10), (26, 0.8, 20), (1, 0.2, 1), (1, 0, 0), (10, 1, 10)],
)
def test_num_kept_by_hand(n, keep, kept):
    assert num_kept(n, keep) == kept


@given(st.integers(2, 577), st.integers(1, 99))
def test_num_kept_is_strictly_above_the_interpolated_percentile(n, percent):
    # On the scores 0 .. n-1 the interpolated percentile is (1 - r)(n - 1) itself, here in exact arithmetic.
    threshold = (1 - Fraction(percent, 100)) * (n - 1)
    above = sum(score > threshold for score in range(n))
    assert num_kept(n, percent / 100) == max(1, above)


def routed(policy):
    return [i for i, spec in enumerate(policy) if spec.routed]


def test_the_papers_policies_at_32_layers():
    odd = list(range(1, 32, 2))
    assert routed(make_policy("full", 32)) == []
    assert routed(make_policy("interleaved", 32)) == odd
    assert routed(make_policy("interleaved_deep", 32)) == odd[1:]
    assert len(odd[1:]) == 15
    assert routed(make_policy("all", 32)) == list(range(32))
    assert routed(make_policy("all_deep", 32)) == list(range(2, 32))
    assert make_policy("early_exit", 32) == (FULL, FULL) + (SKIP,) * 30
    assert make_policy("layer_skip", 32) == (FULL, SKIP) * 16
    for name in ("random", "uniform"):
        assert routed(make_policy(name, 32)) == odd
        assert {spec.selector for spec in make_policy(name, 32)} == {None, name}
    assert make_policy("early_exit", 4) == (FULL,) + (SKIP,) * 3


def test_explicit_policy():
    policy = explicit_policy(4, [3, 1], [0.5, 0.25], "uniform")
    assert policy == (FULL, LayerSpec(0.25, "uniform"), FULL, LayerSpec(0.5, "uniform"))


@given(
    st.lists(
        st.sampled_from([FULL, SKIP, LayerSpec(0.2, "learned"), LayerSpec(0.5, "random")]), min_size=1, max_size=20
    )
)
def test_segments_spell_the_policy(layers):
    policy = tuple(layers)
    parts = segments(policy)
    assert sum((part.unit * part.repeats for part in parts), ()) == policy
    assert [part.start for part in parts] == [0, *np.cumsum([len(p.unit) * p.repeats for p in parts])[:-1]]


@pytest.mark.parametrize(
    ("name", "traced", "scans"),
    [("full", 1, 1), ("interleaved", 2, 1), ("layer_skip", 2, 1), ("all_deep", 2, 2), ("interleaved_deep", 3, 2)],
)
def test_segments_trace_few_layers(name, traced, scans):
    parts = segments(make_policy(name, 32))
    assert (sum(len(part.unit) for part in parts), len(parts)) == (traced, scans)


@pytest.mark.parametrize("keep", [-0.1, 1.5])
@pytest.mark.parametrize("name", POLICIES)
def test_keep_outside_its_range(name, keep):
    with pytest.raises(UserError, match="outside"):
        make_policy(name, 4, keep)


def test_wrong_names():
    with pytest.raises(UserError, match="unknown policy 'sparse'"):
        make_policy("sparse", 4)
    with pytest.raises(UserError, match="unknown selector"):
        LayerSpec(0.5, "best")
    with pytest.raises(UserError, match="do not exist"):
        explicit_policy(4, [4])


def test_a_policy_is_tightened_in_equal_stages():
    policy = make_policy("interleaved", 4, 0.2)
    kept = [loosened(policy, doublings_at(step, 60, policy))[1].keep for step in range(0, 80, 10)]
    assert kept == [1.0, 1.0, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    assert loosened(policy, 3)[0] == policy[0]  # a full layer has nothing to loosen
    assert [doublings_at(step, 0, policy) for step in (0, 5)] == [0, 0]
    assert doublings_at(0, 60, make_policy("layer_skip", 4)) == 0
    assert loosened(make_policy("layer_skip", 4), 1) == make_policy("layer_skip", 4)
