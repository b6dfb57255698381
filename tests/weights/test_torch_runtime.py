"""The exported PyTorch model computes what the JAX model does: whole sequences, streams, and what it says when."""

import itertools
import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from tiny_models import D_V, POLICIES, VOCAB, draw_row, make_config, make_params

from vmod_jax.models import layer_expert
from vmod_jax.models.depth import num_kept
from vmod_jax.models.vision import VisionConfig, VisionTower, patches_width
from vmod_jax.weights import export

torch = pytest.importorskip("torch")
CASES = [
    *itertools.product(POLICIES, ["raw"]),
    *itertools.product(["interleaved"], ["tanh", "sigmoid", "straight_through"]),
    ("all", "tanh"),
]
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def runtime():
    from vmod_jax.weights.torch_runtime import modeling_vmod

    torch.set_num_threads(1)
    return modeling_vmod


def exported(runtime, folder, config, params):
    folder.mkdir(exist_ok=True)
    export.vmod_folder(folder, config, params, {})
    return runtime.VideoLM.from_pretrained(folder).eval()


def close(got, want, atol=1e-4):
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(np.asarray(got), want, atol=atol, rtol=0)


@pytest.mark.parametrize(("policy", "gate"), CASES)
def test_whole_sequences_and_streams_equal_jax(runtime, tmp_path, policy, gate):
    config = make_config(policy, gate, always_keep_last=policy == "all_deep", router_seed=3)
    params = make_params(config)
    model = exported(runtime, tmp_path, config, params)
    pieces, ids, features, logits = draw_row(config, params, 0)
    close(model(ids[None], torch.from_numpy(features[None]))[0], logits)

    cache, out = model.new_cache(), []
    for i, (text, frame) in enumerate(pieces):
        chunk = text + [VOCAB] * (config.tokens_per_frame * frame)
        shown = torch.from_numpy(features[i : i + 1]) if frame else None
        if i == 2:  # a wrong turn, taken back
            before = cache.tokens, cache.frames
            model.extend([1, 2, *chunk], 10 * shown, cache)
            cache.roll_back(*before)
        out.append(model.logits(model.extend(chunk, shown, cache)))
    close(torch.cat(out), logits)
    held = {len(position) for position in cache.position.values()}
    text, frames = sum(len(text) for text, _ in pieces), len(features)
    assert held == {text + frames * num_kept(config.tokens_per_frame, spec.keep) for spec in config.policy}


def test_a_batch_with_padding(runtime, tmp_path):
    config = make_config("interleaved")
    params = make_params(config)
    model = exported(runtime, tmp_path, config, params)
    rows = [draw_row(config, params, seed, frames) for seed, frames in ((1, 2), (2, 3))]
    ids, features = np.zeros((2, 60), np.int64), np.zeros((2, 3, 7, D_V), np.float32)
    for b, row in enumerate(rows):
        ids[b, : len(row[1])], features[b, : len(row[2])] = row[1], row[2]
    out = model(ids, torch.from_numpy(features), [len(row[1]) for row in rows])
    for b, row in enumerate(rows):
        close(out[b, : len(row[1])], row[3])


def test_tied_heads_and_no_lora(runtime, tmp_path):
    for rank in (0, 4):
        config = make_config("interleaved")
        llama = config.llama.__class__(**{**vars(config.llama), "tie_word_embeddings": True})
        config = make_config("interleaved", llama=llama, lora=config.lora.__class__(rank, 8.0))
        params = make_params(config)
        model = exported(runtime, tmp_path / str(rank), config, params)
        assert (model.lm_head is None) == (rank == 0)
        _, ids, features, logits = draw_row(config, params, 0)
        close(model(ids[None], torch.from_numpy(features[None]))[0], logits)


def test_bfloat16_is_close(runtime, tmp_path):
    config = make_config("full")
    params = make_params(config)
    model = exported(runtime, tmp_path, config, params).to(torch.bfloat16)
    _, ids, features, logits = draw_row(config, params, 0)
    error = np.abs(np.asarray(model(ids[None], torch.from_numpy(features[None]))[0]) - logits).mean()
    assert 1e-4 < error / np.abs(logits).mean() < 0.05


def test_routers_stay_float32_in_half_precision(runtime, tmp_path):
    config = make_config("interleaved")
    params = make_params(config)
    export.vmod_folder(tmp_path, config, params, {})
    model = runtime.VideoLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.model.layers[1].expert.weight.dtype == torch.float32
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
    want = np.asarray(params["llama"]["layers"]["expert"]["kernel"][1])
    np.testing.assert_array_equal(model.model.layers[1].expert.weight[0].detach().numpy(), want)


def test_random_scores_are_jax_to_the_bit(runtime):
    frames = np.array([[0, 1, 599, 70000]])
    for seed, layer in ((0, 1), (123, 31), (2**31, 0)):
        want = np.asarray(layer_expert.random_scores(seed, layer, frames, 50))[0]
        got = np.stack([runtime.random_scores(seed, layer, int(frame), 50) for frame in frames[0]])
        np.testing.assert_array_equal(got, want)


def test_kept_counts_and_even_indices(runtime):
    for n, r in itertools.product((1, 2, 10, 26, 50, 577), (0, 0.1, 0.2, 0.3, 0.5, 0.8, 1)):
        assert runtime.num_kept(n, r) == num_kept(n, r)


def test_ties_go_to_the_lower_index(runtime):
    scores = np.array([[0.0, -0.0, 1.0, 1.0, 0.0, 1.0], [0, 0, 0, 0, 0, 0]], np.float32)
    for k, last in itertools.product(range(7), (False, True)):
        want = np.asarray(layer_expert.select(jax.numpy.asarray(scores), k, last))
        np.testing.assert_array_equal(runtime.select(torch.from_numpy(scores), k, last), want)


@pytest.mark.parametrize("kind", ["siglip", "clip", "patches"])
def test_pixels_to_features(runtime, tmp_path, kind):
    vision = {
        "siglip": VisionConfig("siglip", 75, 8, **TOWER),
        "clip": VisionConfig("clip", 54, 6, **TOWER, hidden_act="quick_gelu"),
        "patches": VisionConfig("patches", 50, 2, patches_width(2)),
    }[kind]
    config = make_config("interleaved", vision=vision, vision_hidden_size=vision.hidden_size, grid=(2, 4))
    params = make_params(config)
    model = exported(runtime, tmp_path, config, params)
    pixels = np.random.default_rng(0).integers(0, 256, (3, vision.image_size, vision.image_size, 3), dtype=np.uint8)
    tower = VisionTower(vision, grid=(2, 4))
    want = np.asarray(tower.apply({"params": params["vision"]} if "vision" in params else {}, pixels))
    close(model.features(pixels, batch=2), want)


def test_it_says_the_same_at_the_same_times(tmp_path, clips_of_shapes):
    """Through AutoModel in a process of its own, without JAX: the replies of `lm.stream` on a generated video."""
    lm, frames, tokenizer = clips_of_shapes
    (tmp_path / "model").mkdir()
    export.vmod_folder(tmp_path / "model", lm.config, lm.params, {})
    tokenizer.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "frames.npy", frames)
    session = lm.stream(threshold=0.02, max_reply=8)
    session.ask("What is there?", time=0.0)
    for i, frame in enumerate(frames):
        if i == 5:
            session.ask("And <v>, <|eot_id|> now?", time=2.1)
        session.push(frame)
    session.ask("And at the end?", time=100.0)
    session.finish()
    want = [list(turn) for turn in session.turns]
    script = """
import json, sys
import numpy as np, torch
from transformers import AutoModel, AutoTokenizer
torch.set_num_threads(1)
folder, frames = sys.argv[1], np.load(sys.argv[2])
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
session = model.stream(AutoTokenizer.from_pretrained(folder, trust_remote_code=True), threshold=0.02, max_reply=8)
session.ask("What is there?", time=0.0)
for i, frame in enumerate(frames):
    if i == 5:
        session.ask("And <v>, <|eot_id|> now?", time=2.1)
    session.push(frame)
session.ask("And at the end?", time=100.0)
session.finish()
assert not {name for name in sys.modules if name.split(".")[0] in ("jax", "flax", "vmod_jax")}
print(json.dumps([list(turn) for turn in session.turns]))
"""
    arguments = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "model"), str(tmp_path / "frames.npy")]
    environment = {"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "USE_JAX": "0", "USE_FLAX": "0"}
    run = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    got = json.loads(run.stdout.splitlines()[-1])
    assert got == want
    replies = [turn for turn in want if turn[1] == "assistant"]
    assert len(replies) >= 3
    assert len({turn[2] for turn in replies}) > 1
    assert len(replies) < len(frames)


@pytest.mark.parametrize("name", ["live", "trained"])
def test_contents_are_the_same_text(clips_of_shapes, name, request):
    from vmod_jax.data.conversation import MARK, stream_format
    from vmod_jax.weights.torch_runtime import streaming_vmod

    tokenizer = clips_of_shapes[2] if name == "trained" else request.getfixturevalue("goldens") / "live" / "tokenizer"
    fmt = stream_format(tokenizer, 10)
    model = types.SimpleNamespace(
        video_lm={"fps": 2.0, "interval": ",", "frame_token_id": fmt.frame_token_id}, new_cache=lambda: None
    )
    session = streaming_vmod.Session(model, fmt.tokenizer)
    special = f"{fmt.tokenizer.bos_token}{fmt.tokenizer.eos_token}<v>"
    for content in (special, f"x {special} y{MARK}", f"{MARK}<v>", "What now?"):
        piece = fmt.close_stream + fmt.user_text(content) + fmt.assistant_prefix
        assert session.tokenize(f"]\nUser: {session.plain(content)}\nAssistant:") == fmt.tokenize(piece)
    assert session.tokenize(session.pending_text) == fmt.tokenize(fmt.opening())


@pytest.fixture(scope="module")
def clips_of_shapes(tmp_path_factory):
    """A model with random weights that speaks after some frames, a generated video's frames, and a tokenizer."""
    from vmod_jax.data import video
    from vmod_jax.data.conversation import stream_format
    from vmod_jax.data.sources import shapes
    from vmod_jax.data.tokenizer import train_tokenizer
    from vmod_jax.lm import LanguageModel
    from vmod_jax.models.llama import rms_norm

    folder = tmp_path_factory.mktemp("shapes")
    shapes.generate(folder / "videos", 1, 0, 0)
    frames = video.read(folder / "videos" / "train-0000.mp4", size=24).frames
    tokenizer = train_tokenizer(shapes.sentences()[:50], folder / "tokenizer", vocab_size=400)
    fmt = stream_format(tokenizer, 10)
    vision = VisionConfig("patches", 24, 4, patches_width(4))
    llama = make_config().llama.__class__(**{**vars(make_config().llama), "vocab_size": fmt.frame_token_id})
    config = make_config(
        "interleaved",
        llama=llama,
        vision=vision,
        vision_hidden_size=vision.hidden_size,
        grid=(3, 3),
        frame_token_id=fmt.frame_token_id,
    )
    params = make_params(config)
    lm = LanguageModel(config, params, tokenizer)
    # The interval's column of the head: it wins after most frames.
    ids = np.array([fmt.tokenize(fmt.opening() + fmt.open_stream + fmt.frames(len(frames)))], np.int32)
    hidden, _ = lm.model.apply({"params": params}, ids, frames[None], method="hidden")
    ends = np.flatnonzero(ids[0] == fmt.frame_token_id)[9::10]
    hidden = np.asarray(rms_norm(hidden[0, ends], params["llama"]["norm"]["scale"], llama.rms_norm_eps))
    best = np.delete(np.asarray(lm.logits(ids, frames[None]))[0, ends], fmt.interval_id, axis=1).max(1)
    column = hidden.mean(0)
    pair = params["llama"]["head"]
    factor = np.quantile(best / (hidden @ column), 0.8)
    pair["kernel"] = pair["kernel"].at[:, fmt.interval_id].set(factor * column)
    pair["lora_b"] = pair["lora_b"].at[:, fmt.interval_id].set(0)
    return lm, frames, tokenizer
