"""Vision towers against transformers' own, adaptive pooling against torch, and the parameter-free encoder by hand."""

import json
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmod_jax.errors import UserError
from vmod_jax.models.vision import (
    VisionConfig,
    VisionTower,
    adaptive_avg_pool,
    frame_tokens,
    num_params,
    parameter_shapes,
)
from vmod_jax.weights.huggingface import TensorReader, read_config, vision_params

# 9 patches a side: 3x3 divides it, 7x7 makes overlapping windows. SigLIP's 75 pixels leave 3 without a patch.
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES = {"siglip": {**TINY, "image_size": 75, "patch_size": 8}, "clip": {**TINY, "image_size": 54, "patch_size": 6}}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
FULL_SIZE = {
    "siglip": {**LARGE, "image_size": 384, "patch_size": 16},
    "clip": {**LARGE, "image_size": 336, "patch_size": 14},
}
MEAN_STD = {
    "siglip": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
}
KINDS = ["siglip", "clip"]


def hf_classes(kind):
    pytest.importorskip("torch")
    import transformers

    name = {"siglip": "Siglip", "clip": "CLIP"}[kind]
    return tuple(getattr(transformers, name + part) for part in ("VisionConfig", "VisionModel", "Config", "Model"))


def randomise(model):
    """Weights at which every term matters: initial biases are zero and initial norms are one."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_scale else noise * 0.7 * (parameter.shape or (1,))[-1] ** -0.5)


def random_frames(config, *lead):
    shape = (*lead, config.image_size, config.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def reference(model, kind, pixels, cls, grid):
    """transformers' outputs as frame tokens: f32[F, n, d]."""
    import torch

    mean, std = (torch.tensor(value)[:, None, None] for value in MEAN_STD[kind])
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        out = model.float().eval()(images)
    hidden = out.last_hidden_state
    summary, cells = (out.pooler_output, hidden) if kind == "siglip" else (hidden[:, 0], hidden[:, 1:])
    tokens = [summary[:, None]] if cls else []
    if all(grid):
        side = round(cells.shape[1] ** 0.5)
        cells = cells.transpose(1, 2).reshape(len(cells), -1, side, side)
        tokens.append(torch.nn.functional.adaptive_avg_pool2d(cells, grid).flatten(2).transpose(1, 2))
    return torch.cat(tokens, 1).numpy()


def ours(folder, pixels, cls, grid, **options):
    config = VisionConfig.from_hf_config(read_config(folder))
    params = vision_params(TensorReader(folder), config)
    return np.asarray(jax.jit(VisionTower(config, cls, grid, **options).apply)({"params": params}, pixels))


# ------------------------------------------------------------------------------------------- against transformers


@pytest.fixture(scope="module", params=KINDS)
def tower(request, tmp_path_factory):
    """(kind, transformers' model, its folder)."""
    make_config, make, _, _ = hf_classes(request.param)
    model = make(make_config(**SIZES[request.param]))
    randomise(model)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


@pytest.mark.parametrize(
    ("cls", "grid"),
    [(True, (3, 3)), (True, (0, 0)), (True, (7, 7)), (False, (2, 5)), (True, (1, 1)), (True, (9, 9))],
)
def test_tokens_equal_transformers(tower, cls, grid):
    kind, model, folder = tower
    pixels = random_frames(VisionConfig.from_hf_config(read_config(folder)), 3)
    want, got = reference(model, kind, pixels, cls, grid), ours(folder, pixels, cls, grid)
    assert got.shape == want.shape == (3, cls + grid[0] * grid[1], 32)
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_any_leading_shape(tower):
    _, _, folder = tower
    pixels = random_frames(VisionConfig.from_hf_config(read_config(folder)), 2, 2)
    got = ours(folder, pixels, True, (3, 3))
    np.testing.assert_allclose(got[1, 0], ours(folder, pixels[1, 0], True, (3, 3)), rtol=0, atol=1e-5)


def test_bfloat16_compute_is_close_and_leaves_as_float32(tower):
    _, _, folder = tower
    pixels = random_frames(VisionConfig.from_hf_config(read_config(folder)), 2)
    exact, rough = ours(folder, pixels, True, (3, 3)), ours(folder, pixels, True, (3, 3), dtype=jnp.bfloat16)
    assert rough.dtype == np.float32
    error = np.abs(rough - exact).mean() / np.abs(exact).mean()
    assert 1e-5 < error < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_two_tower_checkpoints_in_bfloat16(kind, tmp_path):
    torch = pytest.importorskip("torch")
    _, _, make_config, make = hf_classes(kind)
    text = {
        **TINY,
        "vocab_size": 30,
        "max_position_embeddings": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    model = make(make_config(text_config=text, vision_config=SIZES[kind])).to(torch.bfloat16)
    randomise(model)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / "model.safetensors").exists()
    config = VisionConfig.from_hf_config(read_config(tmp_path))
    stored = vision_params(TensorReader(tmp_path), config)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(stored)} == {"bfloat16"}
    pixels = random_frames(config, 2)
    want = reference(model.vision_model, kind, pixels, True, (7, 7))
    np.testing.assert_allclose(ours(tmp_path, pixels, True, (7, 7)), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("act", ["gelu", "quick_gelu", "gelu_pytorch_tanh"])
def test_the_config_chooses_the_activation(act, tmp_path):
    make_config, make, _, _ = hf_classes("clip")
    model = make(make_config(**SIZES["clip"], hidden_act=act))
    randomise(model)
    model.save_pretrained(tmp_path)
    pixels = random_frames(VisionConfig.from_hf_config(read_config(tmp_path)), 1)
    want = reference(model, "clip", pixels, True, (0, 0))
    np.testing.assert_allclose(ours(tmp_path, pixels, True, (0, 0)), want, rtol=0, atol=1e-4)


def test_a_siglip_without_its_head(tmp_path):
    make_config, make, _, _ = hf_classes("siglip")
    model = make(make_config(**SIZES["siglip"], vision_use_head=False))
    randomise(model)
    model.save_pretrained(tmp_path)
    pixels = random_frames(VisionConfig.from_hf_config(read_config(tmp_path)), 1)
    want = reference(model, "siglip", pixels, False, (3, 3))
    np.testing.assert_allclose(ours(tmp_path, pixels, False, (3, 3)), want, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="no pooling head"):
        ours(tmp_path, pixels, True, (3, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_misfit_weights_are_named(kind, tmp_path):
    make_config, make, _, _ = hf_classes(kind)
    make(make_config(**SIZES[kind])).save_pretrained(tmp_path)
    config = VisionConfig.from_hf_config({**read_config(tmp_path), "num_hidden_layers": 2, "intermediate_size": 50})
    with pytest.raises(UserError) as error:
        vision_params(TensorReader(tmp_path), config)
    assert "unexpected: encoder.layers.2.layer_norm1.bias, " in str(error.value)
    assert "encoder.layers.1.mlp.fc1.weight (expected (50, 32), found (48, 32))" in str(error.value)
    assert "layers.0.self_attn" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_full_size_towers_equal_transformers(kind):
    """SigLIP-L/16-384 and CLIP ViT-L/14-336 with random weights: 1.3 GB, deleted at once, and a minute each."""
    make_config, make, _, _ = hf_classes(kind)
    model = make(make_config(**FULL_SIZE[kind]))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        pixels = random_frames(VisionConfig.from_hf_config(read_config(folder)), 1)
        got = ours(folder, pixels, True, (7, 7))
    np.testing.assert_allclose(got, reference(model, kind, pixels, True, (7, 7)), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------- shapes, counts


@pytest.mark.parametrize("kind", KINDS)
def test_full_size_counts_and_shapes(kind):
    """The whole tower, traced but not run, has as many parameters as transformers' module."""
    torch = pytest.importorskip("torch")
    make_config, make, _, _ = hf_classes(kind)
    with torch.device("meta"):
        theirs = sum(parameter.numel() for parameter in make(make_config(**FULL_SIZE[kind])).parameters())
    config = VisionConfig.from_hf_config(make_config(**FULL_SIZE[kind]).to_dict())
    assert num_params(config) == theirs

    pixels = jax.ShapeDtypeStruct((2, 5, config.image_size, config.image_size, 3), jnp.uint8)
    tower = VisionTower(config, cls=True, grid=(7, 7), dtype=jnp.bfloat16)
    variables = jax.eval_shape(tower.init, jax.random.key(0), pixels)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == theirs
    out = jax.eval_shape(tower.apply, variables, pixels)
    assert (out.shape, out.dtype) == ((2, 5, 50, 1024), jnp.float32)


def test_the_tree_is_the_declared_one():
    config = VisionConfig("siglip", **SIZES["siglip"])
    params = jax.jit(VisionTower(config).init)(jax.random.key(0), random_frames(config, 1))["params"]
    shapes = parameter_shapes(config)
    assert jax.tree.map(jnp.shape, params) == shapes
    assert shapes["layers"]["fc1"] == {"kernel": (3, 32, 48), "bias": (3, 48)}
    assert len({float(leaf.ravel()[0]) for leaf in jax.tree.leaves(params)}) > 10  # every kernel has its own key


def test_pixels_must_fit():
    config = VisionConfig("patches", 32, 4, 56)
    with pytest.raises(AssertionError):
        frame_tokens({}, jnp.zeros((1, 32, 32, 3), jnp.float32), config, True, (2, 2))
    with pytest.raises(AssertionError):
        frame_tokens({}, jnp.zeros((1, 32, 24, 3), jnp.uint8), config, True, (2, 2))


@pytest.mark.parametrize(
    ("cls", "grid", "message"),
    [
        (True, (9, 9), "9x9 tokens does not fit; use 0x0 or 1x1 up to 8x8"),
        (True, (0, 3), "0x3 tokens does not fit"),
        (True, (-1, -1), "does not fit"),
        (False, (0, 0), "at least one token"),
    ],
)
def test_impossible_grids(cls, grid, message):
    config = VisionConfig("patches", 32, 4, 56)
    with pytest.raises(UserError, match=message):
        frame_tokens({}, jnp.zeros((1, 32, 32, 3), jnp.uint8), config, cls, grid)


# ------------------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((24, 24), (3, 3)),
        ((24, 24), (7, 7)),
        ((24, 24), (24, 24)),
        ((24, 16), (5, 11)),
        ((9, 4), (1, 3)),
        ((3, 5), (7, 8)),
    ],
)
def test_pooling_has_torchs_windows(size, grid):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(1).normal(size=(2, *size, 6)).astype(np.float32)
    want = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x).permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
    np.testing.assert_allclose(adaptive_avg_pool(jnp.asarray(x), *grid), want.numpy(), rtol=0, atol=1e-6)


def test_overlapping_windows_by_hand():
    """5 -> 3: rows 0-1, 1-3, 3-4; row 1 and row 3 count twice."""
    x = jnp.asarray([0.0, 1, 2, 3, 10]).reshape(5, 1, 1)
    np.testing.assert_allclose(adaptive_avg_pool(x, 3, 1).ravel(), [0.5, 2.0, 6.5], rtol=1e-6)


# ------------------------------------------------------------------------------------------------------- patches


# sin, cos of a quarter turn and of a half turn each way: what `patches` says of the first, middle and last of 3 cells.
AXIS = ((-1, 0, 0, -1), (0, 1, 0, 1), (1, 0, 0, -1))


def test_patches_are_shrunk_cells_row_major():
    """Cells of 8x8 pixels shrink to 2x2: each value is the mean of 4x4 pixels; a code of the place follows."""
    config = VisionConfig("patches", 24, 2, 20)
    pixels = random_frames(config, 1)
    got = np.asarray(VisionTower(config, cls=True, grid=(3, 3)).apply({}, pixels))[0]
    scaled = pixels[0].astype(np.float64) / 127.5 - 1
    cells = [
        [*scaled[r : r + 8, c : c + 8].reshape(2, 4, 2, 4, 3).mean((1, 3)).ravel(), *AXIS[r // 8], *AXIS[c // 8]]
        for r in (0, 8, 16)
        for c in (0, 8, 16)
    ]
    np.testing.assert_allclose(got[1:], cells, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got[0], np.mean(cells, 0), rtol=0, atol=1e-6)


def test_patches_at_full_resolution_are_the_pixels():
    config = VisionConfig("patches", 8, 4, 56)
    pixels = random_frames(config, 2)
    got = np.asarray(VisionTower(config, cls=False, grid=(2, 2)).apply({}, pixels))
    np.testing.assert_allclose(
        got[1, 1], [*(pixels[1, :4, 4:].ravel() / 127.5 - 1), *AXIS[0], *AXIS[2]], rtol=0, atol=1e-6
    )


def test_patches_of_a_cls_only_frame():
    """The whole image is the one cell; there is nothing to initialise."""
    config = VisionConfig("patches", 12, 4, 56)
    tower = VisionTower(config, cls=True, grid=(0, 0))
    pixels = random_frames(config, 2)
    assert not jax.tree.leaves(tower.init(jax.random.key(0), pixels))
    want = (pixels.astype(np.float64) / 127.5 - 1).reshape(2, 4, 3, 4, 3, 3).mean((2, 4)).reshape(2, 1, 48)
    np.testing.assert_allclose(
        tower.apply({}, pixels),
        np.concatenate([want, np.broadcast_to([*AXIS[1], *AXIS[1]], (2, 1, 8))], axis=-1),
        rtol=0,
        atol=1e-6,
    )


# ------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("kind", KINDS)
def test_configs_of_one_and_two_towers(kind):
    make_config, _, make_both, _ = hf_classes(kind)
    alone = VisionConfig.from_hf_config(make_config(**FULL_SIZE[kind]).to_dict())
    assert alone == VisionConfig.from_hf_config(make_both(vision_config=FULL_SIZE[kind]).to_dict())
    assert (alone.kind, alone.side, alone.hidden_size) == (kind, 24, 1024)
    assert VisionConfig.from_dict(json.loads(json.dumps(alone.to_dict()))) == alone
    assert VisionConfig.from_hf_config({"model_type": kind, "vision_config": {}}) == VisionConfig.from_hf_config(
        make_config().to_dict()
    )


def test_published_config_files():
    """As siglip-large-patch16-384 and clip-vit-large-patch14-336 write them: sparse, or said twice."""
    siglip = VisionConfig.from_hf_config(
        {"model_type": "siglip", "vision_config": {**LARGE, "image_size": 384, "model_type": "siglip_vision_model"}}
    )
    assert (siglip.patch_size, siglip.hidden_act, siglip.layer_norm_eps) == (16, "gelu_pytorch_tanh", 1e-6)
    clip = VisionConfig.from_hf_config(
        {
            "model_type": "clip",
            "vision_config": {"model_type": "clip_vision_model", **FULL_SIZE["clip"], "image_size": 224},
            "vision_config_dict": {**FULL_SIZE["clip"]},
        }
    )
    assert (clip.image_size, clip.hidden_act, clip.layer_norm_eps) == (336, "quick_gelu", 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "resnet"}, "'resnet' is not an encoder"),
        ({"hidden_act": "mish"}, "unknown hidden_act 'mish'"),
        ({"num_channels": 1}, "not RGB"),
        ({"image_size": [32, 64]}, "not square"),
        ({"num_attention_heads": 5}, "multiple of the 5 heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps is '1e-6'"),
        ({"image_size": "384"}, "image_size is '384'"),
        ({"image_size": [[384]]}, "image_size is"),
        ({"image_size": []}, "not square"),
        ({"patch_size": 16.0}, "patch_size is 16.0"),
        ({"hidden_act": ["gelu"]}, "unknown hidden_act"),
        ({"model_type": ["siglip"]}, "not an encoder"),
        ({"vision_config": "siglip"}, "vision_config is 'siglip'"),
        ({"vision_use_head": "no"}, "vision_use_head is 'no'"),
        ({"patch_size": 100}, "patch_size 100"),
    ],
)
def test_configs_that_do_not_run(change, message):
    with pytest.raises(UserError, match=message):
        VisionConfig.from_hf_config({"model_type": "siglip_vision_model", **SIZES["siglip"], **change})


def test_configs_of_our_own_that_do_not_run():
    with pytest.raises(UserError, match="hidden_size 56"):
        VisionConfig("patches", 32, 4, 47)
    with pytest.raises(UserError, match="unknown encoder 'vit'"):
        VisionConfig.from_dict({"kind": "vit", "image_size": 32, "patch_size": 4, "hidden_size": 48})
    with pytest.raises(UserError, match="unknown fields heads"):
        VisionConfig.from_dict({"kind": "patches", "heads": 4})
    with pytest.raises(UserError, match="unknown fields a0, a1, a10 and 97 more"):
        VisionConfig.from_dict({"kind": "patches", **{f"a{i}": i for i in range(100)}})
