"""ARank against a plain computation in float64, the layers that it chooses, and the command."""

import json
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
from scipy.special import erf
from tiny_models import LAYERS, POLICIES, VOCAB, make_config, make_params

from vmod_jax.commands import cli
from vmod_jax.errors import UserError
from vmod_jax.lm import LanguageModel
from vmod_jax.models.depth import explicit_policy
from vmod_jax.models.llama import rope_frequencies
from vmod_jax.study.arank import attention_ranks, ranked_layers
from vmod_jax.training.config import method
from vmod_jax.training.flags import parse

ROOT = Path(__file__).resolve().parents[2]
ERROR = 1e-4  # of a float32 map's singular values, as a share of its largest


@pytest.fixture(scope="module")
def lm():
    """A model whose attention is sharper in the even layers, so that ranks differ and are not full."""
    config = make_config("interleaved")
    params = make_params(config)
    sharp = np.array([6.0, 2.0, 4.0, 1.0])[:, None, None]
    params["llama"]["layers"]["q"] = {
        name: leaf * (sharp if name != "lora_a" else 1) for name, leaf in params["llama"]["layers"]["q"].items()
    }
    return LanguageModel(config, params)


@pytest.fixture(scope="module")
def rows():
    """Rows of 5 and of 3 frames, the second one padded: (i32[2, T], f32[2, 5, n, d_v], lengths)."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (2, 60)).astype(np.int32)
    for b, frames in enumerate((5, 3)):
        for frame in range(frames):
            ids[b, 3 + 10 * frame : 10 + 10 * frame] = VOCAB
    return ids, rng.normal(size=(2, 5, 7, 12)).astype(np.float32), [57, 36]


def singular_values(config, params, ids, frames):
    """Of all attention maps of one row when every token is computed, largest first: f64[L, H, t]."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    c, lora, connector = config.llama, config.lora, p["connector"]
    vision = np.asarray(ids) == config.frame_token_id
    hidden = frames.reshape(-1, frames.shape[-1]) @ connector["in"]["kernel"] + connector["in"]["bias"]
    hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
    x = np.zeros((len(ids), c.hidden_size))
    x[~vision] = p["llama"]["embed"]["embedding"][ids[~vision]]
    x[vision] = hidden @ connector["out"]["kernel"] + connector["out"]["bias"]
    position, out = np.arange(len(ids)), []
    for layer in range(c.num_hidden_layers):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["llama"]["layers"])
        y = reference._norm(x, one["input_norm"]["scale"], c.rms_norm_eps)
        q, k = (reference._linear(one[name], y, lora).reshape(len(ids), -1, c.head_dim) for name in "qk")
        q, k = (reference._rope(z, position, rope_frequencies(c)) for z in (q, k))
        maps = np.zeros((c.num_attention_heads, len(ids), len(ids)))
        for head, weights in enumerate(maps):
            for t in position:
                logits = k[: t + 1, head * k.shape[1] // q.shape[1]] @ q[t, head] / np.sqrt(c.head_dim)
                e = np.exp(logits - logits.max())
                weights[t, : t + 1] = e / e.sum()
        out.append(np.linalg.svd(maps, compute_uv=False))
        x = x + reference._update(one, x, position, np.ones(len(ids), bool), c, lora)
    return np.stack(out)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-2, 0.1])
def test_ranks_are_those_of_a_plain_computation(lm, rows, tolerance):
    ids, frames, length = rows
    got = attention_ranks(lm, ids, frames, length, tolerance)
    low, high = [], []
    for b, shown in enumerate((5, 3)):
        values = singular_values(lm.config, lm.params, ids[b, : length[b]], frames[b, :shown])
        values /= values[..., :1]
        low.append((values > tolerance + ERROR).sum(-1).mean(-1))
        high.append((values > tolerance - ERROR).sum(-1).mean(-1))
    low, high = np.mean(low, 0), np.mean(high, 0)
    assert (low - 1e-4 <= got).all()
    assert (got <= high + 1e-4).all()
    assert (high - low).max() < 1, "the bounds say something"
    assert np.ptp(got) > 2 * (high - low).max(), "the layers differ by more than that"


def test_the_default_tolerance_is_numpys(lm, rows):
    ids, frames, _ = rows
    exact = [attention_ranks(lm, ids[:1, :57], frames[:1], tolerance=t) for t in (None, 57 * np.finfo(np.float32).eps)]
    np.testing.assert_array_equal(*exact)
    assert exact[0].shape == (LAYERS,)
    assert exact[0].dtype == np.float32


def test_even_attention_has_full_rank(lm, rows):
    ids, frames, _ = rows
    layers = lm.params["llama"]["layers"]
    zero = {**lm.params["llama"], "layers": {**layers, "q": jax.tree.map(np.zeros_like, layers["q"])}}
    even = LanguageModel(lm.config, {**lm.params, "llama": zero})
    np.testing.assert_array_equal(attention_ranks(even, ids[:1, :57], frames[:1]), [57] * LAYERS)
    # Its rows are running means, of which the last differ little: few directions have half of the largest value.
    assert (attention_ranks(even, ids[:1, :57], frames[:1], tolerance=0.5) < 4).all()


def test_the_policy_does_not_matter_and_text_alone_will_do(lm, rows):
    ids, frames, length = rows
    other = LanguageModel(make_config("all"), lm.params)
    both = [attention_ranks(model, ids, frames, length, 1e-2) for model in (lm, other)]
    np.testing.assert_array_equal(*both)
    text = np.random.default_rng(1).integers(0, VOCAB, (1, 20))
    assert (attention_ranks(lm, text, None) <= 20).all()


def test_layers_of_lowest_rank():
    assert ranked_layers([3, 1, 2, 1], 2) == (1, 3)
    assert ranked_layers([3, 1, 2, 1], 3) == (1, 2, 3)
    assert ranked_layers([5, 5, 5, 5], 2) == (0, 1)
    assert ranked_layers(np.array([2.0, 1.0]), 0) == ()
    assert explicit_policy(LAYERS, ranked_layers([3, 1, 2, 1], 2), 0.3) == POLICIES["interleaved"]
    with pytest.raises(UserError, match="give a count from 0 to 4"):
        ranked_layers([3, 1, 2, 1], 5)


def test_the_command_prints_keys_that_train_takes(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run[0], tmp_path / "run")
    arguments = ["arank", "--workdir", str(tmp_path / "run"), "--videos", "2", "--tolerance", "0.01"]
    assert cli.main([*arguments, "--count", "1"]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "arank.json").read_text())
    config, _ = parse([f"--config={ROOT / 'configs' / 'tiny.py'}", "--workdir=x"])
    layers = config.model.num_hidden_layers
    assert len(written["ranks"]) == layers
    assert printed.count("  routed\n") == 1
    assert (written["videos"], written["split"], written["tolerance"]) == (2, "train", 0.01)
    assert tuple(written["routed_layers"]) == ranked_layers(written["ranks"], 1)
    (line,) = [line for line in printed.splitlines() if line.startswith("--config.policy")]
    config, _ = parse([f"--config={ROOT / 'configs' / 'tiny.py'}", "--workdir=x", *shlex.split(line)])
    policy = method(config, layers)["policy"]
    assert [layer for layer, spec in enumerate(policy) if spec.routed] == written["routed_layers"]
    for wrong, message in ((["--count", "99"], "give a count"), (["--videos", "0"], "at least 1")):
        assert cli.main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err
