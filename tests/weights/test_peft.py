"""PEFT adapters in both directions, against PEFT itself."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vmod_jax
from vmod_jax.errors import UserError
from vmod_jax.weights.convert import export_folder, import_folder

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
# How VideoLLM-online writes its targets.
ALL = "model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)|lm_head$"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


def base_model(folder, **changes):
    """A random Llama with a connector, as LiveLlama has one; saved without it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **changes))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.7 if "embed" in name else 0.7 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model


def with_connector(model):
    model.connector = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.GELU(), torch.nn.Linear(32, 32))
    return model


def adapted(base, folder, **options):
    """PEFT's model with random pairs; its adapter is saved into `folder`."""
    torch.manual_seed(1)
    options = {"target_modules": ALL, "modules_to_save": ["connector"], "r": 4, "lora_alpha": 8, **options}
    model = peft.get_peft_model(with_connector(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)).logits.numpy()


IDS = np.random.default_rng(0).integers(0, 50, (2, 17))


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ({}, {}),
        ({}, {"use_rslora": True}),
        ({}, {"target_modules": ["q_proj", "down_proj"]}),
        ({}, {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1], "modules_to_save": None}),
        ({"tie_word_embeddings": True}, {"target_modules": ["k_proj", "lm_head"]}),
    ],
)
def test_merged_logits_equal_pefts(tmp_path, base, options):
    model = adapted(base_model(tmp_path / "base", **base), tmp_path / "adapter", **options)
    import_folder(tmp_path / "base", tmp_path / "run", adapter=tmp_path / "adapter")
    got = np.asarray(vmod_jax.load(tmp_path / "run").logits(IDS))
    unmerged = logits_of(model, IDS)
    np.testing.assert_allclose(got, unmerged, atol=1e-4, rtol=0)
    assert np.abs(got - logits_of(base_model(tmp_path / "again", **base), IDS)).max() > 0.1

    export_folder(tmp_path / "run", tmp_path / "llama")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    # PEFT merges a tied head into the embedding too, which then is another model: ours has a head of its own.
    theirs = unmerged if base else logits_of(model.merge_and_unload(), IDS)
    np.testing.assert_allclose(logits_of(merged, IDS), theirs, atol=1e-4, rtol=0)


def test_an_adapter_goes_out_as_it_came_in_and_peft_opens_it(tmp_path):
    model = adapted(base_model(tmp_path / "base"), tmp_path / "adapter")
    import_folder(tmp_path / "base", tmp_path / "run", adapter=tmp_path / "adapter", policy="interleaved")
    done = export_folder(tmp_path / "run", tmp_path / "out", "peft")
    assert "LayerExperts" in done.what
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    del before["base_model.model.lm_head.base_layer.weight"]  # PEFT's copy of the base's
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "base")

    again = peft.PeftModel.from_pretrained(with_connector(base_model(tmp_path / "base")), tmp_path / "out")
    np.testing.assert_allclose(logits_of(again, IDS), logits_of(model, IDS), atol=1e-6, rtol=0)
    x = torch.randn(3, 6)
    assert torch.equal(again.base_model.model.connector(x), model.base_model.model.connector(x))
    stock = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(logits_of(stock, IDS), logits_of(model, IDS), atol=1e-6, rtol=0)


def test_a_connector_gives_the_feature_size(tmp_path):
    adapted(base_model(tmp_path / "base"), tmp_path / "adapter")
    import_folder(tmp_path / "base", tmp_path / "run", adapter=tmp_path / "adapter")
    lm = vmod_jax.load(tmp_path / "run")
    assert lm.config.vision_hidden_size == 6
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        lm.params["connector"]["in"]["kernel"], stored["base_model.model.connector.0.weight"].T
    )


def test_what_an_adapter_lacks_changes_nothing_and_can_be_trained(tmp_path):
    adapted(base_model(tmp_path / "base"), tmp_path / "adapter", target_modules=["v_proj"], layers_to_transform=[1])
    import_folder(tmp_path / "base", tmp_path / "run", adapter=tmp_path / "adapter")
    layers = vmod_jax.load(tmp_path / "run").params["llama"]["layers"]
    assert not np.asarray(layers["v"]["lora_b"][0]).any()
    assert not np.asarray(layers["q"]["lora_b"]).any()
    assert np.asarray(layers["v"]["lora_b"][1]).any()
    for pair in (layers["v"]["lora_a"][0], layers["q"]["lora_a"][0]):
        assert np.isclose(np.std(pair), 32**-0.5, rtol=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"bias": "all"}, "bias='all'"),
    ],
)
def test_other_adapters_are_refused(tmp_path, options, message):
    adapted(base_model(tmp_path / "base"), tmp_path / "adapter", **options)
    with pytest.raises(UserError, match=message):
        import_folder(tmp_path / "base", tmp_path / "run", adapter=tmp_path / "adapter")
    assert not (tmp_path / "run").exists()


def test_every_misfit_is_named(tmp_path):
    adapted(base_model(tmp_path / "base"), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = "base_model.model.model.layers.0."
    del tensors[f"{prefix}mlp.up_proj.lora_A.weight"]
    tensors[f"{prefix}self_attn.q_proj.lora_B.weight"] = np.zeros((31, 4), np.float32)
    tensors[f"{prefix}self_attn.q_proj.lora_magnitude_vector"] = np.zeros(3, np.float32)
    save_file(tensors, path)
    with pytest.raises(UserError) as error:
        import_folder(tmp_path / "base", tmp_path / "run", adapter=tmp_path / "adapter")
    message = str(error.value)
    assert "missing: model.layers.0.mlp.up_proj.lora_A.weight;" in message
    assert "unexpected: model.layers.0.self_attn.q_proj.lora_magnitude_vector;" in message
    assert "wrong shape: model.layers.0.self_attn.q_proj.lora_B.weight (expected (32, 4), found (31, 4))" in message
    assert "\n" not in message


def test_folders_that_are_no_adapters(tmp_path):
    base_model(tmp_path / "base")
    with pytest.raises(UserError, match="is not a PEFT adapter folder"):
        import_folder(tmp_path / "base", tmp_path / "run", adapter=tmp_path / "base")
    adapted(base_model(tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(UserError, match="--adapter"):
        import_folder(tmp_path / "adapter", tmp_path / "run")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled weights"):
        import_folder(tmp_path / "base", tmp_path / "run", adapter=tmp_path / "adapter")


def test_nothing_to_export_without_lora(tmp_path):
    base_model(tmp_path / "base")
    import_folder(tmp_path / "base", tmp_path / "run")
    with pytest.raises(UserError, match="no LoRA pairs"):
        export_folder(tmp_path / "run", tmp_path / "out", "peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]
