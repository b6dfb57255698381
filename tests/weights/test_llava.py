"""Whole multimodal checkpoints against transformers' LLaVAs: logits, what goes back, and the published sizes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import vmod_jax
from vmod_jax.errors import UserError
from vmod_jax.models.connectors import bilinear
from vmod_jax.weights import llava
from vmod_jax.weights.convert import export_folder, import_folder
from vmod_jax.weights.folder import open_folder
from vmod_jax.weights.huggingface import TensorReader, flat, write_tensors

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
VOCAB, IMAGE, VIDEO, SIDE = 100, 98, 97, 5
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB,
}  # fmt: skip
TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
CLIP = {"model_type": "clip_vision_model", **TOWER, "image_size": 7 * SIDE, "patch_size": 7, "projection_dim": 8}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "image_size": 37, "patch_size": 7, "vision_use_head": False}
MEAN_STD = {
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
}
CASES = {
    "llava": ("Llava", CLIP, "llama", {}),
    "full": ("Llava", CLIP, "llama", {"vision_feature_select_strategy": "full", "vision_feature_layer": 2}),
    "llava_next": ("LlavaNext", CLIP, "llama", {}),
    "llava_onevision": ("LlavaOnevision", SIGLIP, "qwen2", {"video_token_index": VIDEO}),
    "tied": ("LlavaOnevision", SIGLIP, "qwen2", {"video_token_index": VIDEO, "tie_word_embeddings": True}),
}


def random_llava(case, dtype="float32"):
    """At which every weight matters."""
    import transformers

    torch.manual_seed(0)
    name, vision, text, more = CASES[case]
    tied = more.get("tie_word_embeddings", False)
    text_config = {"model_type": text, **TEXT, "tie_word_embeddings": tied}
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision, text_config=text_config, image_token_index=IMAGE, **more
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    for key, parameter in model.named_parameters():
        with torch.no_grad():
            noise = torch.randn(parameter.shape)
            is_norm = "norm" in key and key.endswith("weight")
            width = 1 if ("embed_tokens" in key and not tied) or "newline" in key else parameter.shape[-1]
            parameter.copy_(1 + 0.2 * noise if is_norm else 0.7 * noise * width**-0.5)
    return model.to(getattr(torch, dtype))


def sentence(groups, rng):
    """Text around runs of tokens, i64[T]: groups [(id, count)]."""
    parts = [rng.integers(0, 90, 4)]
    for token, count in groups:
        parts += [np.full(count, token), rng.integers(0, 90, 3)]
    return np.concatenate(parts)


def stored(folder):
    reader = TensorReader(folder)
    return {name: reader.get(name) for name in reader.names()}


def same_bits(a, b):
    assert a.keys() == b.keys()
    assert all((a[n].dtype, a[n].shape, a[n].tobytes()) == (b[n].dtype, b[n].shape, b[n].tobytes()) for n in a)


def pixels_of(case, frames):
    kind = CASES[case][1]["model_type"].removesuffix("_vision_model")
    size = CASES[case][1]["image_size"]
    shown = np.random.default_rng(1).integers(0, 256, (frames, size, size, 3), np.uint8)
    mean, std = (torch.tensor(value)[:, None, None] for value in MEAN_STD[kind])
    return shown, (torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 255 - mean) / std


@pytest.mark.parametrize("case", ["llava", "full"])
def test_images_of_llava_are_frames(tmp_path, case):
    model = random_llava(case)
    model.save_pretrained(tmp_path / "hf")
    shown, pixels = pixels_of(case, 2)
    n = SIDE**2 + (case == "full")
    ids = sentence([(IMAGE, n), (IMAGE, n)], np.random.default_rng(0))[None]
    with torch.no_grad():
        want = model(input_ids=torch.from_numpy(ids), pixel_values=pixels).logits.numpy()
    import_folder(tmp_path / "hf", tmp_path / "run")
    lm = vmod_jax.load(tmp_path / "run")
    assert lm.config.tokens_per_frame == n
    got = lm.logits(np.where(ids == IMAGE, lm.config.frame_token_id, ids), shown[None])
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["llava_onevision", "tied"])
def test_videos_of_onevision(tmp_path, case):
    """Its 5 x 5 patches are read at 3 x 3 places behind the connector, and a newline closes the video."""
    model = random_llava(case)
    model.save_pretrained(tmp_path / "hf")
    shown, pixels = pixels_of(case, 3)
    rng = np.random.default_rng(0)
    before, after = rng.integers(0, 90, 4), rng.integers(0, 90, 6)
    theirs = np.concatenate([before, np.full(3 * 9 + 1, VIDEO), after])[None]
    with torch.no_grad():
        want = model(input_ids=torch.from_numpy(theirs), pixel_values_videos=pixels[None]).logits.numpy()
    import_folder(tmp_path / "hf", tmp_path / "run")
    lm = vmod_jax.load(tmp_path / "run")
    assert (lm.config.tokens_per_frame, lm.config.newline_token_id) == (9, IMAGE)
    ours = np.concatenate([before, np.full(3 * 9, lm.config.frame_token_id), [IMAGE], after])[None]
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(lm.logits(ours, shown[None]), want, atol=1e-4, rtol=0)


def test_the_pytorch_runtime_runs_it_under_a_policy(tmp_path):
    """From a LLaVA to a model that skips tokens, and on to PyTorch with the whole function."""
    from vmod_jax.weights.torch_runtime import modeling_vmod

    random_llava("llava_onevision").save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run", policy="interleaved", keep=0.5)
    lm = vmod_jax.load(tmp_path / "run")
    shown, _ = pixels_of("llava_onevision", 2)
    ids = sentence([(lm.config.frame_token_id, 9), (lm.config.frame_token_id, 9), (IMAGE, 1)], np.random.default_rng(0))
    want = lm.logits(ids[None], shown[None])[0]
    export_folder(tmp_path / "run", tmp_path / "out", "vmod")
    model = modeling_vmod.VideoLM.from_pretrained(tmp_path / "out").eval()
    got = model(ids[None], torch.from_numpy(shown[None]))[0]
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    again = import_folder(tmp_path / "out", tmp_path / "again")
    assert "initialised" not in again.what
    np.testing.assert_allclose(vmod_jax.load(tmp_path / "again").logits(ids[None], shown[None])[0], want, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["llava", "llava_next", "llava_onevision", "tied"])
def test_goes_out_as_it_came_in(tmp_path, case, dtype):
    from transformers import AutoModelForImageTextToText

    random_llava(case, dtype).save_pretrained(tmp_path / "hf")
    done = import_folder(tmp_path / "hf", tmp_path / "run")
    assert "initialised what it lacks (expert)" in done.what
    export_folder(tmp_path / "run", tmp_path / "out", "llava")
    same_bits(stored(tmp_path / "out"), stored(tmp_path / "hf"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "out")]
    assert configs[0] == configs[1]
    if dtype == "float32":
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        assert type(again).__name__ == f"{CASES[case][0]}ForConditionalGeneration"


@pytest.mark.parametrize("case", ["llava", "llava_onevision"])
def test_other_spellings_of_the_names(tmp_path, case):
    """As older versions of transformers write them, and newer ones hold them: the same model, the same names back."""
    random_llava(case).save_pretrained(tmp_path / "hf")
    tensors = stored(tmp_path / "hf")
    newer = {
        name.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "model.language_model.")
        if name.startswith("language_model")
        else f"model.{name}": array
        for name, array in tensors.items()
    }
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): array for name, array in tensors.items()}
    want = open_folder(tmp_path / "hf").arrays["vision"]["layers"]["fc1"]["kernel"].read()
    for i, names in enumerate((newer, older)):
        write_tensors(tmp_path / "hf", names.items())
        got = open_folder(tmp_path / "hf")
        np.testing.assert_array_equal(got.arrays["vision"]["layers"]["fc1"]["kernel"].read(), want)
        import_folder(tmp_path / "hf", tmp_path / f"run{i}")
        export_folder(tmp_path / f"run{i}", tmp_path / f"out{i}", "llava")
        same_bits(stored(tmp_path / f"out{i}"), names)


def test_bilinear_reads_as_torch_does():
    for size, places in ((27, 14), (5, 3), (4, 2), (7, 7), (2, 5)):
        square = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 1, size, size)).astype(np.float32))
        want = torch.nn.functional.interpolate(square, (places, places), mode="bilinear")[0, 0].numpy()
        rows = bilinear(size, places)
        # torch works places out in float32: up to 27 they are off by 2e-6, and so are their weights
        np.testing.assert_allclose(rows @ square[0, 0].numpy() @ rows.T, want, atol=2e-7 * size, rtol=0)


# As the published folders have them, of which they leave out what is a default.
LLAVA_1_5_7B = {
    "model_type": "llava", "image_token_index": 32000, "pad_token_id": 32001, "projector_hidden_act": "gelu",
    "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    },
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
}  # fmt: skip
ONEVISION_7B = {
    "model_type": "llava_onevision", "image_token_index": 151646, "video_token_index": 151647,
    "projector_hidden_act": "gelu", "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0, "vocab_size": 152128,
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False,
    },
    "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
}  # fmt: skip


@pytest.mark.parametrize(("raw", "frame"), [(LLAVA_1_5_7B, 576), (ONEVISION_7B, 196)])
def test_published_sizes_have_transformers_tensors(raw, frame, monkeypatch):
    """Every tensor of the model in transformers finds its place, none is left; nothing is in memory."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    values = {key: value for key, value in raw.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(raw["model_type"], **values))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def header(reader, folder, allow_nonfinite=False):
        reader.folder = folder
        reader._tensors = {name: SimpleNamespace(shape=shape, dtype="F16") for name, shape in shapes.items()}

    monkeypatch.setattr(TensorReader, "__init__", header)
    config, arrays, _ = llava.open_llava("published", raw)  # raises where a name or a shape does not fit
    assert config.tokens_per_frame == frame
    ours = sum(array.size for array in flat(arrays).values())
    assert ours == sum(int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu' is not supported"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias=False"),
        ({"vision_feature_layer": [-2, -5]}, "features of several layers"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy='cls'"),
        ({"text_config": {"model_type": "gemma"}}, "text_config.model_type 'gemma'"),
        ({"text_config": {"model_type": ["llama"]}}, "text_config.model_type"),
        ({"text_config": ["llama"]}, "text_config is"),
        ({"vision_config": "clip"}, "vision_config is 'clip'"),
        ({"vision_config": None}, "is not an encoder"),
        ({"vision_feature_layer": True}, "is no number of a layer"),
        ({"vision_feature_layer": None}, "is no number of a layer"),
        ({"projector_hidden_act": ["x"] * 999}, "projector_hidden_act="),
        ({"model_type": "llava_next"}, "a llava_next that lacks image_newline"),
        ({"vision_feature_layer": -9}, "feature_layer -9"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path, changes, message):
    random_llava("llava").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(UserError, match=message) as error:
        open_folder(tmp_path)
    assert len(str(error.value)) < 400


def test_only_a_llava_goes_back_to_one(tmp_path):
    random_llava("llava").save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    (tmp_path / "run" / "import.json").write_text("{}")
    with pytest.raises(UserError, match="was not imported from a LLaVA"):
        export_folder(tmp_path / "run", tmp_path / "out", "llava")
    assert not (tmp_path / "out").exists()
