"""SigLIP 2 (arXiv 2502.14786): of fixed resolution it is a SigLIP; of any resolution (NaFlex) it runs at its own."""

import numpy as np
import pytest

from vmod_jax.errors import UserError
from vmod_jax.models.vision import VisionConfig, frame_tokens, num_params
from vmod_jax.weights.huggingface import TensorReader, read_config, vision_params, vision_tensors, write_tensors

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8}
PUBLISHED = {  # vision_config of google/siglip2-...: what differs from transformers' defaults
    "base-patch16-256": ({"image_size": 256}, 92_930_304),
    "so400m-patch14-384": (
        {
            "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "num_attention_heads": 16,
            "num_hidden_layers": 27, "patch_size": 14,
        },
        428_225_600,
    ),
}  # fmt: skip


def randomise(model):
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_scale else noise * 0.7 * parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_of_fixed_resolution(name):
    torch = pytest.importorskip("torch")
    import transformers

    changes, parameters = PUBLISHED[name]
    raw = {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model", **changes}}
    config = VisionConfig.from_hf_config(raw)
    with torch.device("meta"):
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**changes))
    assert num_params(config) == sum(p.numel() for p in model.parameters()) == parameters
    assert config.side == config.image_size // config.patch_size


def test_any_resolution_runs_at_its_own(tmp_path):
    """Its patches go through a linear layer, and its position table of 5 x 5 is used as it is."""
    torch = pytest.importorskip("torch")
    import transformers

    model = randomise(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**TINY, num_patches=25)))
    model.save_pretrained(tmp_path)
    config = VisionConfig.from_hf_config(read_config(tmp_path))
    assert (config.kind, config.image_size, config.side) == ("siglip", 40, 5)
    params = vision_params(TensorReader(tmp_path), config)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    got = frame_tokens(params, pixels, config, cls=True, grid=(5, 5))

    images = pixels.astype(np.float32) / 127.5 - 1
    patches = images.reshape(2, 5, 8, 5, 8, 3).swapaxes(2, 3).reshape(2, 25, -1)  # as its processor cuts them
    with torch.no_grad():
        out = model(
            torch.from_numpy(patches), pixel_attention_mask=torch.ones(2, 25, dtype=torch.long),
            spatial_shapes=torch.tensor([[5, 5], [5, 5]]),
        )  # fmt: skip
    want = torch.cat([out.pooler_output[:, None], out.last_hidden_state], 1).numpy()
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)

    write_tensors(tmp_path / "out", vision_tensors(params, config))  # goes out as a SigLIP, with a convolution
    again = vision_params(TensorReader(tmp_path / "out"), config)
    np.testing.assert_array_equal(again["embed"]["kernel"], params["embed"]["kernel"])


def test_a_table_that_is_not_square_is_refused():
    with pytest.raises(UserError, match="a table of 24 positions is not square"):
        VisionConfig.from_hf_config({"model_type": "siglip2_vision_model", **TINY, "num_patches": 24})
    for change in ({"num_patches": "25"}, {"num_patches": 1.5}, {"num_patches": None}, {"patch_size": "7"}):
        with pytest.raises(UserError, match="not a"):
            VisionConfig.from_hf_config({"model_type": "siglip2_vision_model", **TINY, "num_patches": 25, **change})
