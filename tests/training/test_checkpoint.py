"""Checkpoints hold everything, and give it back bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vmod_jax.errors import UserError
from vmod_jax.training.checkpoint import Checkpoints, load_params, save_params


def _run(seed: int):
    key = jax.random.key(seed)
    params = {
        "llama": {
            "layers": {"q": {"kernel": jax.random.normal(key, (2, 4, 4), jnp.bfloat16)}},
            "norm": {"scale": jnp.ones(4)},
        }
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {"optimizer": optimizer.init(params), "rng": jax.random.key_data(key)}
    return params, state


def test_everything_comes_back(tmp_path):
    params, state = _run(0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, params, state, {"next_index": step})
        checkpoints.wait()
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 3
        other = _run(1)
        got = checkpoints.restore(3, *other)
    assert got[2] == {"next_index": 3}
    assert jax.tree.structure(got[:2]) == jax.tree.structure((params, state))
    for a, b in zip(jax.tree.leaves(got[:2]), jax.tree.leaves((params, state)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_the_best_is_kept_beside_the_latest(tmp_path):
    params, state = _run(0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.best() is None
        for step, val_loss in enumerate((0.5, 0.3, 0.4, None, 0.6, None), 1):
            checkpoints.save(step, params, state, {}, val_loss)
            checkpoints.wait()
        assert checkpoints.best() == (2, 0.3)
    with Checkpoints(tmp_path, keep=2) as checkpoints:  # as a run that goes on would
        assert checkpoints.best() == (2, 0.3)
        checkpoints.save(7, params, state, {}, 0.4)
        checkpoints.wait()
        assert checkpoints.best() == (2, 0.3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "6", "7"]


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path):
    """An unfinished save lies under another name: a reader does not see it, who trains on removes it."""
    params, state = _run(0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, params, state, {})
    left = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "params").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
    assert left.exists()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, params, state, {})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_parameters_alone(tmp_path):
    params, _ = _run(0)
    save_params(tmp_path, params)
    got = load_params(tmp_path)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, got, params)


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        load_params(tmp_path)


def test_another_model(tmp_path):
    params, state = _run(0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params, state, {})
        checkpoints.wait()
        params["llama"]["norm"]["scale"] = jnp.ones(5)
        with pytest.raises(UserError, match="does not fit"):
            checkpoints.restore(1, params, state)
