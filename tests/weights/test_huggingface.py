"""Weights from Hugging Face folders: exact both ways, one file or many, and one line for every broken one."""

import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from vmod_jax.errors import UserError
from vmod_jax.models.llama import LlamaConfig as Shape
from vmod_jax.models.vision import VisionConfig
from vmod_jax.weights.huggingface import (
    TensorReader,
    connector_params,
    connector_tensors,
    llama_params,
    llama_tensors,
    read_config,
    vision_params,
    write_tensors,
)

SHAPE = SimpleNamespace(
    num_hidden_layers=3,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=40,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
)
TIED = SimpleNamespace(**{**vars(SHAPE), "tie_word_embeddings": True})
LIMITS = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1}


def hf_llama(folder, tied=False, dtype="float32", shard_size="5GB"):
    """A random Llama as transformers saves it: SHAPE, head_dim from its default."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {key: value for key, value in vars(SHAPE).items() if "size" in key or "num_" in key or key == "head_dim"}
    sizes.pop("vocab_size")
    model = LlamaForCausalLM(LlamaConfig(**sizes, **LIMITS, tie_word_embeddings=tied)).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def stored(folder):
    return {name: TensorReader(folder).get(name) for name in TensorReader(folder).names()}


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        assert a[name].tobytes() == b[name].tobytes(), name


# ------------------------------------------------------------------------------------------------------ the tree


def test_the_tree_holds_transposed_stacked_weights(tmp_path):
    model = hf_llama(tmp_path)
    params = llama_params(TensorReader(tmp_path), SHAPE)
    theirs = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert params["layers"]["k"]["kernel"].shape == (3, 16, 8)
    np.testing.assert_array_equal(
        params["layers"]["k"]["kernel"][2], theirs["model.layers.2.self_attn.k_proj.weight"].T
    )
    np.testing.assert_array_equal(
        params["layers"]["down"]["kernel"][1], theirs["model.layers.1.mlp.down_proj.weight"].T
    )
    np.testing.assert_array_equal(
        params["layers"]["post_norm"]["scale"][0], theirs["model.layers.0.post_attention_layernorm.weight"]
    )
    np.testing.assert_array_equal(params["embed"]["embedding"], theirs["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"]["kernel"], theirs["lm_head.weight"].T)


@pytest.mark.parametrize(("dtype", "shard_size"), [("float32", "5GB"), ("bfloat16", "5GB"), ("bfloat16", "3KB")])
def test_llama_goes_out_as_it_came_in(tmp_path, dtype, shard_size):
    hf_llama(tmp_path, dtype=dtype, shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "5GB")
    before = stored(tmp_path)
    params = llama_params(TensorReader(tmp_path), SHAPE)
    assert params["layers"]["q"]["kernel"].dtype == (np.float32 if dtype == "float32" else ml_dtypes.bfloat16)

    same_bits(dict(llama_tensors(params)), before)
    for shard_bytes in (3000, 10**9, 3000):  # over one another: nothing stale may stay behind
        write_tensors(tmp_path / "out", llama_tensors(params), shard_bytes)
        files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
        shards = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        assert len(files) > 3 if shard_bytes == 3000 else len(files) == 1
        assert files == (shards if shard_bytes == 3000 else ["model.safetensors"])
        same_bits(stored(tmp_path / "out"), before)


def test_transformers_opens_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    model = hf_llama(tmp_path / "a")
    write_tensors(tmp_path / "b", llama_tensors(llama_params(TensorReader(tmp_path / "a"), SHAPE)), 3000)
    (tmp_path / "b" / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
    again = LlamaForCausalLM.from_pretrained(tmp_path / "b")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_a_tied_head_is_absent(tmp_path):
    hf_llama(tmp_path, tied=True)
    assert "head" not in llama_params(TensorReader(tmp_path), TIED)
    tensors = stored(tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_tensors(tmp_path, tensors.items())
    assert "head" not in llama_params(TensorReader(tmp_path), TIED)  # stored twice, the same: still tied
    tensors["lm_head.weight"][3, 5] += 1
    write_tensors(tmp_path, tensors.items())
    with pytest.raises(UserError, match=r"lm_head.weight is not .*tie_word_embeddings.: false"):
        llama_params(TensorReader(tmp_path), TIED)


def test_a_dtype_can_be_asked_for(tmp_path):
    hf_llama(tmp_path)
    params = llama_params(TensorReader(tmp_path), SHAPE, dtype=ml_dtypes.bfloat16)
    want = stored(tmp_path)["model.layers.1.self_attn.q_proj.weight"].T.astype(ml_dtypes.bfloat16)
    assert params["layers"]["q"]["kernel"][1].tobytes() == np.ascontiguousarray(want).tobytes()


def test_layers_of_two_dtypes_lose_nothing(tmp_path):
    hf_llama(tmp_path, dtype="bfloat16")
    tensors = stored(tmp_path)
    name = "model.layers.2.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(np.float32) * np.float32(1.0001)
    write_tensors(tmp_path, tensors.items())
    kernel = llama_params(TensorReader(tmp_path), SHAPE)["layers"]["q"]["kernel"]
    np.testing.assert_array_equal(kernel[2], tensors[name].T)


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [("float16", "bfloat16", "float32"), ("bfloat16", "float32", "float32"), ("float16", "float16", "float16")],
)
def test_layers_of_any_two_dtypes_lose_nothing(tmp_path, first, second, common):
    hf_llama(tmp_path)
    tensors = stored(tmp_path)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
    for name, dtype in zip(names, (first, second, first), strict=True):
        tensors[name] = tensors[name].astype(dtype)
    write_tensors(tmp_path, tensors.items())
    kernel = llama_params(TensorReader(tmp_path), SHAPE)["layers"]["q"]["kernel"]
    assert kernel.dtype == common
    for i, name in enumerate(names):
        np.testing.assert_array_equal(kernel[i], tensors[name].astype(common).T)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_nan_and_infinity_are_named(tmp_path, value, dtype):
    hf_llama(tmp_path)
    tensors = {name: tensor.astype(dtype) for name, tensor in stored(tmp_path).items()}
    tensors["model.layers.1.input_layernorm.weight"][5] = value
    largest = ml_dtypes.finfo(dtype).max
    tensors["model.norm.weight"][:3] = [largest, -largest, 0]  # which are numbers
    write_tensors(tmp_path, tensors.items())
    with pytest.raises(UserError, match=r"model.layers.1.input_layernorm.weight holds NaN or infinity"):
        llama_params(TensorReader(tmp_path), SHAPE)
    as_it_is = llama_params(TensorReader(tmp_path, allow_nonfinite=True), SHAPE)
    assert not np.isfinite(as_it_is["layers"]["input_norm"]["scale"][1, 5])
    tensors["model.layers.1.input_layernorm.weight"][5] = 1
    write_tensors(tmp_path, tensors.items())
    llama_params(TensorReader(tmp_path), SHAPE)


def test_nan_is_found_at_the_end_of_a_large_tensor(tmp_path):
    array = np.zeros((513, 1025), np.float32)
    array[-1, -1] = np.nan
    write_tensors(tmp_path, [("a", array), ("none", np.zeros((0, 3), np.float32)), ("b", np.float32(np.nan))])
    for name in "ab":
        with pytest.raises(UserError, match=f"{name} holds NaN"):
            TensorReader(tmp_path).get(name)
    assert TensorReader(tmp_path).get("none").shape == (0, 3)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("", ""),  # the decoder's own names beside lm_head
        ("language_model.model.", "language_model."),
        ("module.model.", "module."),
        ("decoder.", ""),
    ],
)
def test_names_that_all_differ_by_a_prefix_are_taken(tmp_path, caplog, inner, outer):
    hf_llama(tmp_path)
    tensors = stored(tmp_path)
    want = llama_params(TensorReader(tmp_path), SHAPE)
    renamed = {
        inner + name.removeprefix("model.") if name.startswith("model.") else outer + name: tensor
        for name, tensor in tensors.items()
    }
    connector = {"connector.0.weight": np.zeros((6, 4), np.float32)}
    write_tensors(tmp_path, (renamed | connector).items())
    got = llama_params(TensorReader(tmp_path), SHAPE)
    assert f"begin with {inner!r} where 'model.' is usual" in caplog.text
    np.testing.assert_array_equal(got["layers"]["q"]["kernel"], want["layers"]["q"]["kernel"])
    np.testing.assert_array_equal(got["head"]["kernel"], want["head"]["kernel"])
    del renamed[f"{outer}lm_head.weight"]
    write_tensors(tmp_path, renamed.items())
    with pytest.raises(UserError, match=r"; missing: lm_head.weight$"):
        llama_params(TensorReader(tmp_path), SHAPE)


def test_lora_must_be_merged_and_experts_stay_behind(tmp_path):
    hf_llama(tmp_path)
    params = llama_params(TensorReader(tmp_path), SHAPE)
    params["layers"]["expert"] = {"kernel": np.ones((3, 16), np.float32)}
    assert set(dict(llama_tensors(params))) == set(TensorReader(tmp_path).names())
    params["layers"]["q"]["lora_a"] = np.ones((3, 16, 2), np.float32)
    with pytest.raises(ValueError, match="merge LoRA"):
        llama_tensors(params)


@pytest.mark.goldens
def test_the_reference_checkpoint(goldens):
    folder = goldens / "live"
    config = read_config(folder)
    shape = Shape.from_hf_config(config)
    reader = TensorReader(folder)
    params, connector = llama_params(reader, shape), connector_params(reader)
    assert connector["in"]["kernel"].shape == (16, config["hidden_size"])  # the goldens' frames are 16 wide
    np.testing.assert_array_equal(connector["in"]["kernel"], reader.get("connector.0.weight").T)
    np.testing.assert_array_equal(connector["out"]["bias"], reader.get("connector.2.bias"))
    same_bits({**dict(llama_tensors(params)), **dict(connector_tensors(connector))}, stored(folder))


# ------------------------------------------------------------------------------------------------- broken folders


def test_every_misfit_is_named(tmp_path):
    hf_llama(tmp_path)
    tensors = stored(tmp_path)
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        del tensors[name]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
    tensors["extra.weight"] = np.zeros(1, np.float32)
    tensors["model.layers.2.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)  # harmless: old files have it
    tensors["lm_head.weight"] = np.zeros((41, 16), np.float32)
    write_tensors(tmp_path, tensors.items())
    with pytest.raises(UserError) as error:
        llama_params(TensorReader(tmp_path), SHAPE)
    message = str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight;" in message
    assert "unexpected: extra.weight, model.layers.0.self_attn.q_proj.bias;" in message
    assert message.endswith("wrong shape: lm_head.weight (expected (40, 16), found (41, 16))")
    assert "\n" not in message


def test_errors_of_many_layers_are_short(tmp_path):
    hf_llama(tmp_path)
    write_tensors(tmp_path, [(f"{'x' * 500}.{name}.old", tensor) for name, tensor in stored(tmp_path).items()])
    with pytest.raises(UserError, match=r"and 27 more; unexpected: .* and 27 more") as error:
        llama_params(TensorReader(tmp_path), SHAPE)
    assert len(str(error.value)) < 1000
    index = {f"model.layers.{i}.gone": "model.safetensors" for i in range(1000)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match=r"lacks .* and 997 more") as error:
        TensorReader(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: n for n in index}}))
    with pytest.raises(UserError, match=r"lacks .* and 997 more") as error:
        TensorReader(tmp_path)
    assert len(str(error.value)) < 1000


def test_connector_misfits(tmp_path):
    good = {
        "connector.0.weight": np.zeros((6, 4), np.float32),
        "connector.0.bias": np.zeros(6, np.float32),
        "connector.2.weight": np.zeros((6, 6), np.float32),
        "connector.2.bias": np.zeros(6, np.float32),
    }
    write_tensors(tmp_path, {**good, "connector.2.weight": np.zeros((6, 5), np.float32)}.items())
    with pytest.raises(UserError, match=r"connector.2.weight \(expected \(6, 6\), found \(6, 5\)\)"):
        connector_params(TensorReader(tmp_path))
    write_tensors(tmp_path, [item for item in good.items() if item[0] != "connector.0.weight"])
    with pytest.raises(UserError, match=r"missing: connector.0.weight"):
        connector_params(TensorReader(tmp_path))


def test_a_folder_without_a_vision_tower(tmp_path):
    hf_llama(tmp_path)
    with pytest.raises(UserError, match=r"missing: vision_model.embeddings.patch_embedding.weight"):
        vision_params(TensorReader(tmp_path), VisionConfig("siglip", 16, 8, 8, 8, 1, 2))


def test_two_vision_towers_are_ambiguous(tmp_path):
    mark = "embeddings.patch_embedding.weight"
    write_tensors(tmp_path, [(f"{side}.{mark}", np.zeros((2, 3, 1, 1), np.float32)) for side in ("left", "right")])
    with pytest.raises(UserError, match=r"2 vision towers \(left., right.\)"):
        vision_params(TensorReader(tmp_path), VisionConfig("siglip", 16, 8, 8, 8, 1, 2))


def test_truncated_files(tmp_path):
    save_file({"a": np.zeros(100, np.float32)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (len(whole) - 1, 40, 3, 0):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model.safetensors is truncated or no safetensors file"):
            TensorReader(tmp_path)


def test_broken_indexes(tmp_path):
    hf_llama(tmp_path, shard_size="3KB")
    index = tmp_path / "model.safetensors.index.json"
    written = json.loads(index.read_text())

    shard = tmp_path / written["weight_map"]["model.norm.weight"]
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match=rf"lacks {shard.name}, which model.safetensors.index.json lists"):
        TensorReader(tmp_path)
    shard.write_bytes(kept)

    index.write_text(json.dumps({"weight_map": {**written["weight_map"], "ghost": shard.name}}))
    with pytest.raises(UserError, match=rf"{shard.name} lacks ghost"):
        TensorReader(tmp_path)
    for file in (None, 3, ["a"], "../elsewhere.safetensors", "/etc/passwd", "", ".", "x" * 5000, "\ud800"):
        index.write_text(json.dumps({"weight_map": {**written["weight_map"], "odd": file}}))
        with pytest.raises(UserError, match=r"does not name a file of its folder for odd: "):
            TensorReader(tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": ' + "[" * 200_000, "\ud800"):
        index.write_text(text, errors="surrogatepass")
        with pytest.raises(UserError, match=r"index.json"):
            TensorReader(tmp_path)


def test_missing_folders_and_configs(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        TensorReader(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no weights"):
        TensorReader(tmp_path)
    with pytest.raises(UserError, match=r"has no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_config(tmp_path) == {"a": 1}
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_config(tmp_path) == {"a": 1}
    (tmp_path / "config.json").write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        read_config(tmp_path)


def test_quantised_weights_are_refused(tmp_path):
    hf_llama(tmp_path)
    tensors = stored(tmp_path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    write_tensors(tmp_path, tensors.items())
    with pytest.raises(UserError, match=r"lm_head.weight is stored as I8"):
        llama_params(TensorReader(tmp_path), SHAPE)


def test_pickles_are_refused_and_the_advice_works(tmp_path):
    """The command in the error message turns a folder of two pickled shards into one that opens."""
    torch = pytest.importorskip("torch")
    model = hf_llama(tmp_path / "a")
    state = model.state_dict()
    names = sorted(state)
    folder = tmp_path / "b c"
    folder.mkdir()
    for i, part in enumerate((names[:9], names[9:])):
        torch.save({name: state[name] for name in part}, folder / f"pytorch_model-{i + 1:05d}-of-00002.bin")
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    with pytest.raises(UserError) as error:
        TensorReader(folder)
    refusal, _, command = str(error.value).partition("convert them: ")
    assert "never loaded" in refusal
    program, *arguments = shlex.split(command)
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    same_bits(stored(folder), stored(tmp_path / "a"))


def test_other_pickles_are_refused_too(tmp_path):
    for name in ("weights.pt", "consolidated.00.pth"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(UserError, match="never loaded"):
            TensorReader(tmp_path)
        (tmp_path / name).unlink()


def test_transposed_views_are_written_in_order(tmp_path):
    """safetensors' save_file alone writes a view's memory, not its values."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_tensors(tmp_path, [("a", array.T)])
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("a"), array.T)
