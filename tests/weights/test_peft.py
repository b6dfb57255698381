"""PEFT adapters in both directions, against PEFT itself."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vmod_jax
from vmod_jax.errors import UserError
from vmod_jax.models.llama import LlamaConfig
from vmod_jax.weights import peft as ours
from vmod_jax.weights.convert import export_folder, import_folder
from vmod_jax.weights.huggingface import read_all, read_config
from vmod_jax.weights.peft import open_adapter

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


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["model.embed_tokens", "lm_head"]])
def test_a_saved_matrix_unties_a_tied_base(tmp_path, saved):
    tied = {"tie_word_embeddings": True}
    torch.manual_seed(2)
    options = {"target_modules": ["q_proj"], "modules_to_save": saved, "r": 4}
    model = peft.get_peft_model(base_model(tmp_path / "base", **tied), peft.LoraConfig("CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(tmp_path / "adapter")
    import_folder(tmp_path / "base", tmp_path / "run", adapter=tmp_path / "adapter")
    lm = vmod_jax.load(tmp_path / "run")
    assert not lm.config.llama.tie_word_embeddings
    np.testing.assert_allclose(np.asarray(lm.logits(IDS)), logits_of(model, IDS), atol=1e-4, rtol=0)


def test_the_copy_of_a_tied_matrix_beside_a_pair_replaces_both(tmp_path):
    model = adapted(
        base_model(tmp_path / "base", tie_word_embeddings=True), tmp_path / "adapter", target_modules=["lm_head"]
    )
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.base_layer.weight"] *= 1.5
    save_file(tensors, path)
    again = with_connector(base_model(tmp_path / "base", tie_word_embeddings=True))
    model = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    import_folder(tmp_path / "base", tmp_path / "run", adapter=tmp_path / "adapter")
    lm = vmod_jax.load(tmp_path / "run")
    assert lm.config.llama.tie_word_embeddings
    np.testing.assert_allclose(np.asarray(lm.logits(IDS)), logits_of(model, IDS), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a Llama and its plain adapter, and the Llama's config."""
    folder = tmp_path_factory.mktemp("plain")
    options = {"modules_to_save": None, "target_modules": ["q_proj", "v_proj"]}
    adapted(base_model(folder / "base"), folder / "adapter", **options)
    return folder, LlamaConfig.from_hf_config(read_config(folder / "base"))


def rewritten(plain, tmp_path, change):
    """A copy of the plain adapter whose config says something else; ...: without the field."""
    shutil.copytree(plain[0] / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}, default=str))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"init_lora_weights": name}, name) for name in ("pissa", "pissa_niter_4", "olora", "OLoRA", "loftq")),
        *(({"init_lora_weights": name}, name) for name in ("corda", "mica", "lora_ga", "of tomorrow")),
        ({"init_lora_weights": 1}, "init_lora_weights=1 "),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens=\[5, 6\]"),
        ({"of_a_later_peft": 3}, "of_a_later_peft=3"),
        ({"of_a_later_peft": {"a": 1}}, "of_a_later_peft"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"r": ...}, "lacks r"),
        ({"lora_alpha": ...}, "lacks lora_alpha"),
        *(({"r": value}, "r is") for value in (None, "4", 4.0, True, 0, -4, [4])),
        *(({"lora_alpha": value}, "lora_alpha is") for value in (None, "8", True, float("nan"))),
        ({"lora_dropout": "0"}, "lora_dropout is '0'"),
        ({"use_rslora": "no"}, "use_rslora is 'no'"),
        ({"target_modules": ["q_proj"]}, r"leaves out model.layers.0.self_attn.v_proj.lora_A.weight, .* and 1 more"),
        ({"target_modules": "model.*q_proj"}, "leaves out"),
        ({"target_modules": None}, "lacks target_modules"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": "(q_proj"}, "cannot be read"),
        ({"exclude_modules": ["v_proj"]}, "leaves out"),
        ({"layers_to_transform": [1]}, "leaves out model.layers.0.self_attn.q_proj.lora_A.weight"),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, "leaves out model.layers.1"),
        ({"modules_to_save": ["v_proj"]}, "leaves out"),
        ({"modules_to_save": 3}, "modules_to_save is 3"),
    ],
)
def test_configs_that_say_more_or_less_than_plain_lora_are_refused(plain, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        open_adapter(rewritten(plain, tmp_path, change), plain[1])
    assert len(str(error.value)) < 800


@pytest.mark.parametrize(
    "change",
    [
        {"rank_pattern": None, "alpha_pattern": None, "bias": None, "use_dora": None, "lora_dropout": None},
        {"init_lora_weights": "gaussian", "loftq_config": None, "init": None},
        {"rank_pattern": ..., "use_rslora": ..., "layers_pattern": ..., "init_lora_weights": ...},
        {"of_a_later_peft": None, "another": False, "more": {}, "base_model_name_or_path": 3},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj", "layers_to_transform": [0]},  # which PEFT then does not look at
        {"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
    ],
)
def test_configs_that_say_plain_lora_in_another_way_are_read(plain, tmp_path, change):
    same = open_adapter(rewritten(plain, tmp_path, change), plain[1])
    assert same.lora == open_adapter(plain[0] / "adapter", plain[1]).lora


def test_every_field_of_pefts_config_is_known():
    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    assert fields.keys() == ours._PLAIN.keys() | {*ours._READ, *ours._FREE}
    for name, (default, *_) in ours._PLAIN.items():
        assert getattr(peft.LoraConfig(), name) in (default, "LORA", None), name


def test_nan_in_an_adapter_is_named(plain, tmp_path):
    folder = rewritten(plain, tmp_path, {})
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][3, 1] = np.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter: model.layers.1.self_attn.v_proj.lora_B.weight holds NaN"):
        read_all(open_adapter(folder, plain[1]).pairs)
    assert np.isnan(read_all(open_adapter(folder, plain[1], True).pairs)["layers"]["v"]["lora_b"]).sum() == 1


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
