"""Qwen2, Qwen2.5 and Qwen3 against transformers: random models, and the published sizes by their shapes."""

import numpy as np
import pytest

import vmod_jax
from vmod_jax.models.llama import LlamaConfig
from vmod_jax.weights.convert import export_folder, import_folder
from vmod_jax.weights.huggingface import LLAMA_MODULES, TensorReader, llama_shapes

torch = pytest.importorskip("torch")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 90, "bos_token_id": None, "eos_token_id": 5, "max_position_embeddings": 512,
}  # fmt: skip
# Of the published models, without what transformers alone needs.
QWEN_2_5_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
    "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False, "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
}  # fmt: skip
QWEN_2_5_05B = QWEN_2_5_7B | {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
QWEN_3_06B = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6, "attention_bias": False,
    "max_position_embeddings": 40960, "tie_word_embeddings": True, "rope_theta": 1000000.0,
}  # fmt: skip
IDS = np.random.default_rng(0).integers(6, 90, (2, 120))


def random_model(kind, sizes, seed=0):
    """At which every weight matters."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            noise = torch.randn(parameter.shape)
            is_table = "embed" in name and not model.config.tie_word_embeddings
            width = 1 if is_table else parameter.shape[-1]
            plain = 0.5 * noise if "bias" in name else 0.7 * noise * width**-0.5
            parameter.copy_(1 + 0.2 * noise if "norm" in name else plain)
    return model.eval()


def check(folder, model, ids):
    """Opened directly and imported: transformers' logits; exported: the same class and the same bits."""
    from transformers import AutoModelForCausalLM

    model.save_pretrained(folder / "hf")
    with torch.no_grad():
        want = model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(want).max() > 1
    import_folder(folder / "hf", folder / "run")
    for name in ("hf", "run"):
        np.testing.assert_allclose(vmod_jax.load(folder / name).logits(ids), want, atol=1e-4, rtol=0)
    done = export_folder(folder / "run", folder / "out")
    before, after = TensorReader(folder / "hf"), TensorReader(folder / "out")
    assert before.names() == after.names()
    assert all(before.get(name).tobytes() == after.get(name).tobytes() for name in before.names())
    again = AutoModelForCausalLM.from_pretrained(folder / "out").eval()
    assert type(again) is type(model)
    assert type(model).__name__ in done.what
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.from_numpy(ids)).logits.numpy(), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 8}),
        ("Qwen3", {"head_dim": 16}),
        ("Qwen3", {"head_dim": 4, "tie_word_embeddings": True}),
    ],
)
def test_logits_equal_transformers_and_go_out_as_they_came(tmp_path, kind, changes):
    check(tmp_path, random_model(kind, SIZES | changes), IDS)


@pytest.mark.parametrize(("kind", "sizes"), [("Qwen2", QWEN_2_5_05B), ("Qwen3", QWEN_3_06B)])
def test_layers_of_published_width(tmp_path, kind, sizes):
    """Two layers, with a vocabulary cut to what two cores compute in a second."""
    model = random_model(kind, sizes | {"num_hidden_layers": 2, "vocab_size": 500, "max_window_layers": 2})
    check(tmp_path, model, IDS[:1, :60])


@pytest.mark.parametrize(("kind", "sizes"), [("Qwen2", QWEN_2_5_7B), ("Qwen2", QWEN_2_5_05B), ("Qwen3", QWEN_3_06B)])
def test_published_sizes_have_transformers_tensors(kind, sizes):
    """Names and shapes of every tensor, without one of them in memory."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    cfg = LlamaConfig.from_hf_config({"model_type": kind.lower(), **sizes})
    leaf_names = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
    ours = {}
    for path, shape in llama_shapes(cfg).items():
        module, _, leaf = path.rpartition("/")
        stacked = path.startswith("layers")
        for i in range(shape[0] if stacked else 1):
            one = shape[1:] if stacked else shape
            name = f"{LLAMA_MODULES[module].format(i=i)}.{leaf_names[leaf]}"
            ours[name] = one[::-1] if leaf == "kernel" else one
    assert ours == theirs
