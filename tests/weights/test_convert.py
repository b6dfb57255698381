"""vmod import and vmod export: exact both ways, opened by transformers, and nothing left behind by what fails."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import POLICIES, draw_row, make_config, make_params

import vmod_jax
from vmod_jax.commands.cli import main
from vmod_jax.errors import UserError
from vmod_jax.lm import LanguageModel
from vmod_jax.models.llama import LoraConfig
from vmod_jax.weights.convert import export_folder, import_folder
from vmod_jax.weights.huggingface import TensorReader, write_tensors

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
LLAMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 90, "bos_token_id": 3, "eos_token_id": [4, 5],
    "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
IDS = np.random.default_rng(0).integers(6, 90, (2, 150))


def hf_model(folder, kind="Llama", dtype="float32", shard_size="5GB", **changes):
    """A random Llama or Mistral as transformers saves it, at which every weight matters."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**LLAMA, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            noise = torch.randn(parameter.shape)
            width = 1 if "embed" in name else parameter.shape[-1]
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.7 * noise * width**-0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    return model.eval()


def stored(folder):
    reader = TensorReader(folder)
    return {name: reader.get(name) for name in reader.names()}


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


# ------------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"rope_parameters": LLAMA3}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
        ("Llama", {"tie_word_embeddings": True, "head_dim": 16, "num_key_value_heads": 8}),
        ("Mistral", {"sliding_window": None, "num_key_value_heads": 4}),
    ],
)
def test_logits_equal_transformers_directly_imported_and_exported(tmp_path, kind, changes):
    from transformers import AutoModelForCausalLM

    model = hf_model(tmp_path / "hf", kind, **changes)
    with torch.no_grad():
        want = model(torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(want).max() > 1
    import_folder(tmp_path / "hf", tmp_path / "run")
    for folder in ("hf", "run"):
        np.testing.assert_allclose(vmod_jax.load(tmp_path / folder).logits(IDS), want, atol=1e-4, rtol=0)
    export_folder(tmp_path / "run", tmp_path / "out")
    same_bits(stored(tmp_path / "out"), stored(tmp_path / "hf"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(again).__name__ == "LlamaForCausalLM"
    assert again.generation_config.eos_token_id == LLAMA["eos_token_id"]
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.from_numpy(IDS)).logits.numpy(), want, atol=1e-6, rtol=0)
        prompt = torch.from_numpy(IDS[:, :9])
        assert torch.equal(again.generate(prompt, max_new_tokens=20), model.generate(prompt, max_new_tokens=20))


def test_the_older_spelling_of_rope(tmp_path):
    """transformers 4 writes rope_theta and rope_scaling, 5 writes rope_parameters: the same model."""
    hf_model(tmp_path / "hf", rope_parameters=LLAMA3)
    new = vmod_jax.load(tmp_path / "hf").config
    path = tmp_path / "hf" / "config.json"
    raw = json.loads(path.read_text())
    scaling = raw.pop("rope_parameters")
    raw |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    path.write_text(json.dumps(raw))
    assert vmod_jax.load(tmp_path / "hf").config == new


@pytest.mark.parametrize("policy", POLICIES)
def test_there_and_back_is_bit_identical(tmp_path, policy):
    """HF -> workdir -> HF, and the whole model -> vmod -> workdir -> vmod, from shards, under every policy."""
    hf_model(tmp_path / "hf", dtype="bfloat16", shard_size="20KB", num_hidden_layers=4)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    import_folder(tmp_path / "hf", tmp_path / "run", policy=policy if policy in vmod_jax_policies() else None)
    export_folder(tmp_path / "run", tmp_path / "out")
    same_bits(stored(tmp_path / "out"), stored(tmp_path / "hf"))

    config = make_config(policy, lora=LoraConfig())
    lm = LanguageModel(config, make_params(config))
    lm.save(tmp_path / "whole")
    export_folder(tmp_path / "whole", tmp_path / "vmod", "vmod")
    import_folder(tmp_path / "vmod", tmp_path / "again")
    again = vmod_jax.load(tmp_path / "again")
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    export_folder(tmp_path / "again", tmp_path / "twice", "vmod")
    same_bits(stored(tmp_path / "twice"), stored(tmp_path / "vmod"))


def vmod_jax_policies():
    from vmod_jax.models.depth import POLICIES

    return POLICIES


def test_a_vmod_export_opens_directly(tmp_path):
    config = make_config("interleaved")
    lm = LanguageModel(config, make_params(config))
    lm.save(tmp_path / "run")
    export_folder(tmp_path / "run", tmp_path / "vmod", "vmod")
    _, ids, features, logits = draw_row(config, lm.params, 0)
    again = vmod_jax.load(tmp_path / "vmod")
    assert again.config.lora == LoraConfig()  # merged
    np.testing.assert_allclose(again.logits(ids[None], features[None])[0], logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_a_vision_tower_comes_along(tmp_path, kind):
    import transformers

    from vmod_jax.models.vision import VisionConfig, VisionTower
    from vmod_jax.weights.huggingface import read_config, vision_params

    name = {"siglip": "SiglipVision", "clip": "CLIPVision"}[kind]
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 48, "patch_size": 8,
    }  # fmt: skip
    tower = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tower.save_pretrained(tmp_path / "tower")
    hf_model(tmp_path / "hf")
    assert main(["import", str(tmp_path / "hf"), "--vision", str(tmp_path / "tower"), "--out", str(tmp_path / "run"),
                 "--grid", "2x3", "--policy", "interleaved", "--keep", "0.5", "--gate", "tanh"]) == 0  # fmt: skip
    lm = vmod_jax.load(tmp_path / "run")
    assert lm.config.vision == VisionConfig.from_hf_config(read_config(tmp_path / "tower"))
    assert (lm.config.grid, lm.config.gate, lm.config.vision_hidden_size) == ((2, 3), "tanh", 32)
    assert [spec.keep for spec in lm.config.policy] == [1, 0.5, 1]
    pixels = np.random.default_rng(0).integers(0, 256, (1, 2, 48, 48, 3), dtype=np.uint8)
    ids = np.full((1, 16), lm.config.frame_token_id)
    ids[0, :2] = 7
    params = vision_params(TensorReader(tmp_path / "tower"), lm.config.vision)
    features = VisionTower(lm.config.vision, grid=(2, 3)).apply({"params": params}, pixels[0])
    np.testing.assert_allclose(lm.logits(ids, pixels), lm.logits(ids, np.asarray(features)[None]), atol=1e-5, rtol=0)

    export_folder(tmp_path / "run", tmp_path / "vmod", "vmod")
    inside = {name: array for name, array in stored(tmp_path / "vmod").items() if name.startswith("vision_model.")}
    alone = {f"vision_model.{name.removeprefix('vision_model.')}": x for name, x in stored(tmp_path / "tower").items()}
    same_bits(inside, {name: array for name, array in alone.items() if not name.endswith("position_ids")})


@pytest.mark.goldens
def test_the_reference_checkpoint_keeps_its_tokenizer_and_its_frames(tmp_path, goldens):
    assert main(["import", str(goldens / "live"), "--out", str(tmp_path / "run")]) == 0
    lm, direct = vmod_jax.load(tmp_path / "run"), vmod_jax.load(goldens / "live")
    assert lm.config == direct.config
    assert lm.fmt.frame_token_id == lm.config.frame_token_id == 422
    jax.tree.map(np.testing.assert_array_equal, lm.params, direct.params)
    assert main(["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    for folder in (tmp_path / "run" / "tokenizer", tmp_path / "out"):
        for file in (goldens / "live" / "tokenizer").iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes()
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a man")["input_ids"] == lm.tokenizer("a man")["input_ids"]


def test_a_run_knows_where_its_base_came_from(tmp_path):
    """A run's folder as `vmod train` leaves it: its base and its token ids are those of the import it started from."""
    hf_model(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "base")
    lm = vmod_jax.load(tmp_path / "base")
    config = dataclasses.replace(lm.config, lora=LoraConfig(4, 8.0))
    LanguageModel(config, make_params(config)).save(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"init_from": str(tmp_path / "base")}))
    export_folder(tmp_path / "run", tmp_path / "adapter", "peft")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "hf")
    export_folder(tmp_path / "run", tmp_path / "named", "peft", base="some/model")
    assert "some/model" in (tmp_path / "named" / "adapter_config.json").read_text()
    export_folder(tmp_path / "run", tmp_path / "llama")
    assert json.loads((tmp_path / "llama" / "generation_config.json").read_text())["eos_token_id"] == [4, 5]
    trained = {"init_from": "", "optimizer": {"train_base": True}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(trained))
    with pytest.raises(UserError, match="base weights were trained too"):
        export_folder(tmp_path / "run", tmp_path / "lost", "peft")


def test_a_model_without_an_import_ends_where_its_tokenizer_says(tmp_path):
    from vmod_jax.data.tokenizer import train_tokenizer

    config = make_config("full")
    tokenizer = train_tokenizer(["a man walks"], tmp_path / "tokenizer", vocab_size=300)
    LanguageModel(config, make_params(config), tokenizer).save(tmp_path / "run")
    export_folder(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id == 1


# ------------------------------------------------------------------------------------------------- another policy


def test_what_a_policy_adds_is_said_and_is_the_documented_initialisation(tmp_path, caplog):
    hf_model(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    written = json.loads((tmp_path / "run" / "model.json").read_text())
    assert written["format"] == {"version": 1, "layers": "stacked"}
    assert written["policy"] == [{"keep": 1.0, "selector": None}] * 3
    with caplog.at_level(logging.WARNING):
        assert vmod_jax.load(tmp_path / "run").config.policy[1].keep == 1
        assert not caplog.records
        for path in ("run", "hf"):
            for gate, scale in (("raw", 1), ("tanh", 0.02)):
                layers = vmod_jax.load(tmp_path / path, policy="all", gate=gate).params["llama"]["layers"]
                assert np.isclose(np.std(layers["expert"]["kernel"]), scale * 64**-0.5, rtol=0.2)
    assert len(caplog.records) == 4
    assert all("LayerExperts of layers 0, 1, 2 are at their initialisation" in r.getMessage() for r in caplog.records)


def test_what_a_policy_leaves_out_is_said(tmp_path, caplog):
    config = make_config("interleaved")
    LanguageModel(config, make_params(config)).save(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        kept = vmod_jax.load(tmp_path / "run")
        more = vmod_jax.load(tmp_path / "run", policy="all", gate="tanh")
        vmod_jax.load(tmp_path / "run", policy="full")
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "LayerExperts of layers 0, 2 are at their initialisation",
        "trained LayerExperts of layers 1, 3 are left out",
    ]
    rows = [np.asarray(lm.params["llama"]["layers"]["expert"]["kernel"]) for lm in (kept, more)]
    np.testing.assert_array_equal(rows[1][1::2], rows[0][1::2])
    np.testing.assert_allclose(rows[1][::2], rows[0][::2] * 0.02, rtol=1e-6)


def test_another_format_is_refused(tmp_path):
    hf_model(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    path = tmp_path / "run" / "model.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(UserError, match=r"format .*2"):
        vmod_jax.load(tmp_path / "run")


# ------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, *arguments):
    """The one line that the command says, with exit code 2."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.count("\n") == 1
    return out.err


def test_broken_checkpoints_leave_nothing(tmp_path, capsys):
    folder, out = tmp_path / "hf", tmp_path / "made" / "run"
    hf_model(folder)
    good = stored(folder)

    def attempt(expected):
        line = refused(capsys, "import", folder, "--out", out)
        assert expected in line
        assert not out.parent.exists() or not list(out.parent.iterdir())

    tensors = dict(good)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    tensors["lm_head.weight"] = np.zeros((91, 64), np.float32)
    write_tensors(folder, tensors.items())
    attempt("missing: model.norm.weight; unexpected: model.layers.0.self_attn.q_proj.bias; wrong shape: lm_head.weight")
    write_tensors(folder, good.items())
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])
    attempt("truncated")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    attempt("never loaded; convert them: python -c")
    (folder / "pytorch_model.bin").rename(folder / "consolidated.pt")
    attempt("never loaded; convert them: python -c")
    (folder / "consolidated.pt").rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for kind in ("gpt2", "qwen2_moe", "siglip"):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        attempt(f"model_type '{kind}' is not supported")
    for kind in (["llama"], {}, None, 3):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        attempt("is not supported: bring one of")
    (folder / "config.json").unlink()
    attempt("has no config.json")


def test_single_files_and_wrong_places(tmp_path, capsys):
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    assert "convert them: python -c" in refused(capsys, "import", tmp_path / "model.pt", "--out", tmp_path / "run")
    assert "no such folder" in refused(capsys, "import", tmp_path / "no", "--out", tmp_path / "run")
    hf_model(tmp_path / "hf")
    assert "--grid 3" in refused(capsys, "import", tmp_path / "hf", "--out", tmp_path / "run", "--grid", "3")
    assert "already exists" in refused(capsys, "import", tmp_path / "hf", "--out", tmp_path / "hf")
    assert "no config.json" in refused(capsys, "import", tmp_path / "hf", "--out", tmp_path / "x", "--vision", tmp_path)
    line = refused(capsys, "import", tmp_path / "hf", "--out", tmp_path / "x", "--vision", tmp_path / "hf")
    assert "not an encoder" in line
    assert "not a workdir" in refused(capsys, "export", "--workdir", tmp_path / "hf", "--out", tmp_path / "y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model.pt"]


def test_a_tokenizer_that_cannot_be_made(tmp_path, capsys):
    hf_model(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"no sentencepiece model")
    assert "no tokenizer can be made" in refused(capsys, "import", tmp_path / "hf", "--out", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    from vmod_jax.weights import lazy

    hf_model(tmp_path / "hf")
    save = lazy.save

    def broken(folder, tree):
        save(folder, tree)
        raise OSError("disk full")

    monkeypatch.setattr(lazy, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# ------------------------------------------------------------------------------------------- real sizes and memory


def write_checkpoint(folder, config, dtype, shard_bytes, seed=0):
    """Random weights under Hugging Face's names, one shard in memory at a time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    made = LlamaConfig(**config)
    made.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in LlamaForCausalLM(made).state_dict().items()}
    if made.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    rng = np.random.default_rng(seed)

    def tensors():
        for name, shape in shapes.items():
            noise = rng.standard_normal(shape, np.float32)
            width = shape[-1]
            yield name, (1 + 0.1 * noise if "norm" in name else 0.7 * noise * width**-0.5).astype(dtype)

    write_tensors(folder, tensors(), shard_bytes)


LLAMA_3_2_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 128000, "eos_token_id": 128001,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_3_2_1b_equals_transformers(tmp_path, request, dtype):
    """Its exact config. float32: 1e-4. bfloat16: as close to the float32 logits as transformers' own bfloat16."""
    import ml_dtypes
    from transformers import AutoModelForCausalLM

    request.addfinalizer(lambda: shutil.rmtree(tmp_path))
    write_checkpoint(tmp_path / "hf", LLAMA_3_2_1B, ml_dtypes.bfloat16, 10**9)
    ids = np.random.default_rng(0).integers(0, 128000, (1, 24))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(ids)).logits.numpy()
        theirs = model.to(torch.bfloat16)(torch.from_numpy(ids)).logits.float().numpy()
    del model
    got = np.asarray(vmod_jax.load(tmp_path / "hf", dtype=dtype).logits(ids))
    error = np.abs(got - want).max()
    print(f"\nLlama-3.2-1B, {dtype}: max abs difference {error:.2e} of logits up to {np.abs(want).max():.1f}")
    if dtype == "float32":
        assert error <= 1e-4
    else:
        print(f"transformers' own bfloat16: {np.abs(theirs - want).max():.2e}")
        assert np.abs(got - want).mean() <= 1.5 * np.abs(theirs - want).mean()


MEMORY = """
import json, sys
import vmod_jax.weights.convert, jax, orbax.checkpoint, vmod_jax.weights.lazy
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
if sys.argv[1] == "import":
    print(vmod_jax.weights.convert.import_folder(sys.argv[2], sys.argv[3]).measured, file=sys.stderr)
else:
    import time
    start = time.perf_counter()
    jax.block_until_ready(vmod_jax.load(sys.argv[2]).params)
    print(f"loaded in {time.perf_counter() - start:.1f} s", file=sys.stderr)
print(json.dumps({"before": before, "peak": peak()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_import_stays_within_its_memory(tmp_path, request):
    """Peak resident memory <= arrays that live on the host + the largest shard + 2 GiB.

    VMOD_IMPORT_LAYERS=32 writes an 8B-shaped checkpoint (16 GB, as much again for the workdir; loading it is left out
    where memory does not allow it); the default has 4 of its layers.
    """
    layers = int(os.environ.get("VMOD_IMPORT_LAYERS", "4"))
    config = {
        **LLAMA_3_2_1B, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128, "num_hidden_layers": layers,
        "tie_word_embeddings": False,
    }  # fmt: skip
    import ml_dtypes

    request.addfinalizer(lambda: shutil.rmtree(tmp_path))  # gigabytes
    write_checkpoint(tmp_path / "hf", config, ml_dtypes.bfloat16, 10**9)
    files = [path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors")]
    largest_leaf = layers * 4096 * 14336 * 2
    meminfo = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2]
    free = int(meminfo.split()[0]) * 1024
    for how, on_host in (("import", largest_leaf), ("load", sum(files))):
        if on_host + 4 * 2**30 > free:
            pytest.skip(f"{how}: {free / 2**30:.1f} GiB of memory are free")
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEMORY, how, str(tmp_path / "hf"), str(tmp_path / "run")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peak = json.loads(run.stdout.splitlines()[-1])["peak"]
        bound = on_host + max(files) + 2 * 2**30
        print(f"\n{how}: {sum(files) / 1e9:.1f} GB, largest shard {max(files) / 1e9:.2f} GB; {run.stderr.strip()}; "
              f"peak {peak / 2**30:.2f} GiB, bound {bound / 2**30:.2f} GiB")  # fmt: skip
        assert peak <= bound
