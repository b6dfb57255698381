"""`vmod.load`, the one door: the goldens' folder as it lies, save and load, other policies, mistakes."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest

import vmod_jax as vmod
from vmod_jax.data.conversation import encode, label_weights
from vmod_jax.errors import UserError
from vmod_jax.evaluation.scorer import Scorer
from vmod_jax.evaluation.stream_metrics import continuations, score
from vmod_jax.lm import LanguageModel
from vmod_jax.models.depth import LayerSpec, make_policy
from vmod_jax.models.llama import LlamaConfig
from vmod_jax.models.video_lm import VideoLMConfig, init_params
from vmod_jax.models.vision import VisionConfig, patches_width
from vmod_jax.training import objective
from vmod_jax.training.checkpoint import save_params

VOCAB, D_V, N = 50, 6, 5
FRAME = VOCAB


def make_lm(**changes):
    llama = LlamaConfig(VOCAB, 16, 24, 4, 2, 1, 8)
    config = VideoLMConfig(llama, make_policy("interleaved", 4, 0.4), FRAME, D_V, grid=(2, 2), **changes)
    return LanguageModel(config, jax.jit(partial(init_params, config))(jax.random.key(0)))


@pytest.fixture(scope="module")
def lm():
    return make_lm()


def draw(frames=(3, 3), text=4, seed=0):
    """A batch of rows of as many frames each, with text around them: (i32[B, T], f32[B, F, n, d_v])."""
    rng, rows = np.random.default_rng(seed), []
    for count in frames:
        row = rng.integers(0, VOCAB, (count + 1, text))
        rows.append(np.concatenate([np.concatenate([part, [FRAME] * N]) for part in row])[: -N or None])
    size = max(map(len, rows))
    ids = np.zeros((len(rows), size), np.int32)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    return ids, rng.normal(size=(len(rows), max(frames), N, D_V)).astype(np.float32)


# --- the goldens ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(goldens):
    """The reference's tiny model, its samples and arrays."""
    with np.load(goldens / "live" / "arrays.npz", allow_pickle=False) as arrays:
        arrays = dict(arrays)
    return vmod.load(goldens / "live"), json.loads((goldens / "live" / "samples.json").read_text()), arrays


@pytest.mark.goldens
def test_logits_and_loss_are_the_references(live):
    """Through `lm.logits`, all samples in one batch, and through the training objective at the labelled positions."""
    lm, samples, arrays = live
    rows = [encode(sample["conversation"], lm.fmt) for sample in samples]
    for row, sample in zip(rows, samples, strict=True):
        assert row.input_ids.tolist() == sample["input_ids"]
        assert row.labels.tolist() == sample["labels"]
    size, frames = max(len(r.input_ids) for r in rows), max(len(arrays[f"frames_{i}"]) for i in range(len(rows)))
    ids = np.zeros((len(rows), size), np.int32)
    features = np.zeros((len(rows), frames, *arrays["frames_0"].shape[1:]), np.float32)
    for i, row in enumerate(rows):
        ids[i, : len(row.input_ids)] = row.input_ids
        features[i, : len(arrays[f"frames_{i}"])] = arrays[f"frames_{i}"]
    logits = np.asarray(lm.logits(ids, features))
    assert logits.shape == (len(rows), size, lm.config.llama.vocab_size)
    for i, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        own = logits[i, : len(row.input_ids)]
        np.testing.assert_allclose(own, arrays[f"logits_{i}"], atol=1e-4, rtol=0)
        weight = label_weights(row, lm.fmt, stream_weight=1.0)
        is_stream = row.input_ids == lm.fmt.frame_token_id
        loss, _ = objective.loss(own[None], row.labels[None], weight[None], is_stream[None])
        assert float(loss) == pytest.approx(sample["loss"], abs=1e-5)


@pytest.mark.goldens
def test_metrics_are_the_references(live):
    """LM-PPL, |frame difference|, Fluency, LM-Correctness at four thresholds, by the scorer of `vmod evaluate`."""
    lm, samples, arrays = live
    scorer = Scorer(lm, batch_size=3)
    frames = [arrays[f"frames_{i}"] for i in range(len(samples))]
    rows = [encode(sample["conversation"], lm.fmt) for sample in samples]
    stats = scorer(list(zip(rows, frames, strict=True)))
    thresholds = [*samples[0]["metrics"]]
    assert sorted(map(float, thresholds)) == [0.0, 0.3, 0.5, 0.7]
    # A silent frame stays silent at any smaller threshold: the continuations of 0 are enough for all.
    more = [(i, c) for i, row in enumerate(rows) for c in continuations(row, stats[i], lm.fmt)]
    assert more
    late = scorer([(c.encoded, frames[i][c.frames]) for i, c in more])
    for i, sample in enumerate(samples):
        continued = {c.turn: s for (j, c), s in zip(more, late, strict=True) if j == i}
        for threshold in thresholds:
            got = score(rows[i], stats[i], lm.fmt, float(threshold), continued)
            assert got[:4] == pytest.approx(sample["metrics"][threshold], abs=1e-4), (i, threshold)


@pytest.mark.goldens
def test_the_goldens_folder_streams_and_becomes_a_workdir(live, tmp_path):
    lm, _, arrays = live
    session = lm.stream(threshold=0.0, max_reply=8)
    session.ask("What is this?")
    assert isinstance(session.push(arrays["frames_0"][0]), str)
    lm.save(tmp_path / "saved")
    again = vmod.load(tmp_path / "saved")
    assert again.config == lm.config
    assert again.fmt.interval_id == lm.fmt.interval_id
    np.testing.assert_array_equal(again.logits(np.array([[1, 5, 9]])), lm.logits(np.array([[1, 5, 9]])))


# --- logits and routing -----------------------------------------------------------------------------------------------


def test_shapes_of_logits_and_routing(lm):
    ids, frames = draw()
    assert lm.logits(ids, frames).shape == (*ids.shape, VOCAB)
    routing = lm.routing(ids, frames)
    assert list(routing) == [1, 3]
    for scores, kept in routing.values():
        assert (scores.shape, scores.dtype) == ((2, 3, N), np.float32)
        assert (kept.shape, kept.dtype) == ((2, 3, 2), np.int32)
        assert (np.diff(kept) > 0).all()
        at_kept = np.take_along_axis(scores, np.asarray(kept), -1)
        assert (np.sort(np.asarray(scores), -1)[..., 3:] == np.sort(at_kept, -1)).all()


def test_text_alone(lm):
    """No frames, and the first tokens of a row whose frames come later, are the same."""
    ids, frames = draw()
    whole = lm.logits(ids, frames)
    np.testing.assert_allclose(lm.logits(ids[:, :4], None), whole[:, :4], atol=1e-5, rtol=0)
    np.testing.assert_allclose(lm.logits(ids[:, :4].tolist()), whole[:, :4], atol=1e-5, rtol=0)


def test_a_row_with_fewer_frames_than_the_batch(lm):
    """A row's own frames come first; what lies behind them, and its neighbours, do not matter."""
    ids, frames = draw(frames=(1, 3), text=9)
    ids[0, 23:] = np.random.default_rng(1).integers(0, VOCAB, ids.shape[1] - 23)  # a long text after its one frame
    together = lm.logits(ids, frames)
    alone = lm.logits(ids[:1], frames[:1, :1])
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5, rtol=0)
    frames[0, 1:] = 1e3
    np.testing.assert_array_equal(lm.logits(ids, frames)[0], together[0])


def test_what_does_not_fit_is_one_line(lm):
    ids, frames = draw()
    for call, message in (
        (lambda: lm.logits(ids, frames[:, :2]), "a row has 15 frame tokens, but 2 frames of 5 tokens were given"),
        (lambda: lm.logits(ids), "a row has 15 frame tokens, but 0 frames"),
        (lambda: lm.logits(ids[:, :7], frames), "whole frames of 5 tokens"),
        (lambda: lm.logits(ids[0], frames), r"input_ids has shape \[31\]"),
        (lambda: lm.logits(ids, frames[:1]), "2 rows of input_ids, but frames for 1"),
        (lambda: lm.logits(ids, frames[:, :, :4]), r"shape \[4, 6\], but the model takes \[5, 6\]"),
        (
            lambda: lm.logits(ids, np.zeros((2, 3, 8, 8, 3), np.uint8)),
            r"shape \[8, 8, 3\], but the model takes \[5, 6\]",
        ),
        (lambda: lm.logits([[3, VOCAB + 1]]), r"token 51 \(row 0, place 1\) is not in the vocabulary of 50"),
        (lambda: lm.routing([[-100, 2]], None), "token -100"),
        (lambda: lm.stream(), "no tokenizer"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_pixels_and_features_are_one_model(lm):
    """A model with a tower takes both; what the tower makes of the pixels, given as features, gives the same."""
    vision = VisionConfig("patches", image_size=8, patch_size=2, hidden_size=patches_width(2))
    config = dataclasses.replace(lm.config, vision=vision, vision_hidden_size=vision.hidden_size)
    kernel = np.random.default_rng(1).normal(size=(vision.hidden_size, 16)).astype(np.float32)
    into = lm.params["connector"]["in"] | {"kernel": kernel}
    lm = LanguageModel(config, lm.params | {"connector": lm.params["connector"] | {"in": into}})
    ids, _ = draw()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
    features = jax.jit(partial(lm.model.apply, method="features"))({"params": lm.params}, pixels)
    np.testing.assert_allclose(lm.logits(ids, pixels), lm.logits(ids, features), atol=1e-5, rtol=0)
    wide = np.asarray(features, np.float64)
    np.testing.assert_array_equal(lm.logits(ids, wide), lm.logits(ids, features))
    with pytest.raises(UserError, match=r"\[9, 9, 3\], but the model takes \[8, 8, 3\] pixels or \[5, \d+\] features"):
        lm.logits(ids, np.zeros((2, 3, 9, 9, 3), np.uint8))
    with pytest.raises(UserError, match="float32 pixels: give uint8"):
        lm.logits(ids, pixels.astype(np.float32))


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    lm.save(folder)
    return folder


def test_save_and_load_change_no_bit(lm, saved):
    ids, frames = draw()
    again = vmod.load(saved)
    assert again.config == lm.config
    np.testing.assert_array_equal(again.logits(ids, frames), lm.logits(ids, frames))
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    with pytest.raises(UserError, match="already holds a model"):
        lm.save(saved)


def test_load_under_another_policy(lm, saved, caplog):
    """The parameters do not know the policy; what they compute does."""
    ids, frames = draw()
    plain = np.asarray(lm.logits(ids, frames))
    full = vmod.load(saved, policy="full")
    assert full.routing(ids, frames) == {}
    assert not np.allclose(full.logits(ids, frames), plain, atol=1e-3)
    assert "trained LayerExperts of layers 1, 3 are left out" in caplog.text

    every = vmod.load(saved, policy="all", keep=0.6)
    assert {layer: routed.kept.shape for layer, routed in every.routing(ids, frames).items()} == dict.fromkeys(
        range(4), (2, 3, 3)
    )
    more = vmod.load(saved, keep=0.8)
    assert [spec.keep for spec in more.config.policy] == [1.0, 0.8, 1.0, 0.8]

    own = vmod.load(saved, policy=(LayerSpec(), LayerSpec(0.4, "uniform"), LayerSpec(0.0), LayerSpec()))
    assert own.routing(ids, frames)[1].kept[0, 0].tolist() == [0, 4]

    gated = vmod.load(saved, gate="sigmoid")
    assert gated.config.gate == "sigmoid"
    assert not np.allclose(gated.logits(ids, frames), plain, atol=1e-3)
    assert vmod.load(saved, remat="full").config.remat == "full"


def test_what_cannot_be_loaded_is_one_line(saved, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.json").write_text('{"llama": {}}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model.json").write_text((saved / "model.json").read_text())
    for call, message in (
        (lambda: vmod.load(tmp_path / "nowhere"), "nowhere: no such folder"),
        (lambda: vmod.load(saved / "model.json"), "no such folder"),
        (lambda: vmod.load(tmp_path), "neither a workdir .* nor a Hugging Face folder"),
        (lambda: vmod.load(tmp_path / "broken"), r"model\.json cannot be read"),
        (lambda: vmod.load(tmp_path / "empty"), "has no checkpoint"),
        (lambda: vmod.load(saved, step=7), "no checkpoint of step 7; there are 0"),
        (lambda: vmod.load(saved, policy="sideways"), "unknown policy 'sideways': use one of full, "),
        (lambda: vmod.load(saved, policy=(LayerSpec(),)), "a policy of 1 layers for a model of 4"),
        (lambda: vmod.load(saved, keep=1.5), r"keep ratio 1.5 is outside \[0, 1\]"),
        (lambda: vmod.load(saved, policy="full", keep=-1), r"keep ratio -1 is outside"),
        (lambda: vmod.load(saved, gate="relu"), "unknown gate 'relu'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_keep_needs_something_to_act_on(lm, tmp_path):
    config = dataclasses.replace(lm.config, policy=make_policy("full", 4))
    LanguageModel(config, lm.params).save(tmp_path / "full")
    with pytest.raises(UserError, match=r"keep=0\.2 has no layer to act on"):
        vmod.load(tmp_path / "full", keep=0.2)
    assert vmod.load(tmp_path / "full", policy="interleaved", keep=0.2).config.policy[1].keep == 0.2


def test_a_step_is_chosen(lm, saved, tmp_path):
    lm.save(tmp_path / "run")
    doubled = jax.tree.map(lambda x: 2 * x, lm.params)
    save_params(tmp_path / "run", doubled, step=5)
    jax.tree.map(np.testing.assert_array_equal, vmod.load(tmp_path / "run").params, doubled)
    jax.tree.map(np.testing.assert_array_equal, vmod.load(tmp_path / "run", step=0).params, lm.params)
