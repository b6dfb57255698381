"""Every file of configs/: it is complete, and those for named machines fit them, in shapes alone."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from vmod_jax.errors import UserError
from vmod_jax.models.flops import LLAMA_3_8B
from vmod_jax.models.video_lm import VideoLMConfig
from vmod_jax.performance import aot
from vmod_jax.training.config import complete, method
from vmod_jax.training.flags import parse
from vmod_jax.training.optimizer import make_optimizer, trained_groups
from vmod_jax.training.sharding import AXES, make_mesh
from vmod_jax.training.step import abstract_state

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GIB = 2**30

# rows of configs/llama3_8b.py: chips, GiB of each, tokens a frame, positions of the model that it starts from, the
# compile that the docstring quotes
MACHINES = {
    "v5e_16": (16, 16, 10, 8192, "8b-v5e-16-600x10"),
    "v6e_8": (8, 32, 10, 8192, "8b-v6e-8-600x10"),
    "v5p_8": (4, 95, 50, 131072, "8b-v5p-8-1200x50"),
    "h100_8": (8, 79, 10, 8192, "8b-h100-8-600x10"),
}


def load(name):
    config, _ = parse(["--config", name, "--workdir", "run"])
    return complete(config)


def make_model(config, tokens):
    return VideoLMConfig(
        llama=LLAMA_3_8B,
        frame_token_id=LLAMA_3_8B.vocab_size,
        vision_hidden_size=1024,
        grid=aot.GRIDS[tokens],
        param_dtype="bfloat16",
        **method(config, LLAMA_3_8B.num_hidden_layers),
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_it_is_complete_and_says_how_to_run_it(name):
    rows = [f"{name}:{row}" for row in MACHINES] if name == "llama3_8b" else [name]
    for row in rows:
        assert load(row).steps >= 1
    said = (CONFIGS / f"{name}.py").read_text().split('"""')[1]
    assert re.search(rf"--config configs/{name}\.py(:\w+)? --workdir ", said)


def test_a_bare_name_is_a_file_that_comes_with_the_package(tmp_path, monkeypatch):
    assert load(str(CONFIGS / "tiny.py")) == load("tiny")
    assert load("papers/lta").data.max_frames == 600
    assert parse(["--config=tiny", "--workdir=run"])[0].steps == 40
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a workdir of that name is none
    assert load("tiny").steps == 40
    with pytest.raises(UserError, match="--config nothing: no such file"):
        load("nothing")


@pytest.mark.parametrize("row", ["", ":v4_8"])
def test_a_machine_that_is_none_is_said(row):
    with pytest.raises(UserError, match="is none of v5e_16, v6e_8, h100_8, v5p_8"):
        load(f"llama3_8b{row}")


@pytest.fixture(params=sorted(MACHINES))
def machine(request, monkeypatch):
    """(config, mesh, row of MACHINES), the mesh made as on that machine."""
    chips = MACHINES[request.param][0]
    config = load(f"llama3_8b:{request.param}")
    abstract = lambda sizes, names, **_: AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))  # noqa: E731
    monkeypatch.setattr(jax, "make_mesh", abstract)
    monkeypatch.setattr(jax, "device_count", lambda: chips)
    heads = LLAMA_3_8B.num_attention_heads, LLAMA_3_8B.num_key_value_heads
    return config, make_mesh(config.mesh, config.batch_size, *heads), MACHINES[request.param]


def test_batches_fit(machine):
    """Rows over the devices, in equal parts; buckets that hold every stream and are no longer than the positions."""
    config, mesh, (_, _, tokens, positions, _) = machine
    assert config.batch_size % (mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate) == 0
    frames, text, labels = config.data.buckets[-1]
    assert frames == config.data.max_frames
    assert all(frames * tokens + text <= positions for frames, text, _ in config.data.buckets)
    assert labels <= frames + text
    if mesh.shape["context"] > 1:
        assert frames // (2 * mesh.shape["context"]) >= 1


def test_parameters_and_optimiser_fit(machine):
    """What a device holds before the first batch is less than half its memory, and the base weights are split."""
    config, mesh, (chips, hbm, tokens, _, _) = machine
    model = make_model(config, tokens)
    optimizer = make_optimizer(config.optimizer, config.steps)
    frozen, state = abstract_state(model, trained_groups(config.optimizer), optimizer, mesh)

    def held(tree):
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((frozen, state)))
    assert whole > 18 * GIB  # 8 billion parameters in bf16, 0.36 billion trained ones thrice in float32
    assert whole / chips <= held((frozen, state)) < 1.01 * whole / chips
    assert held((frozen, state)) < hbm * GIB / 2


def test_the_compile_that_it_quotes_is_its_own(machine):
    """Mesh, rows at a time, rematerialisation and the longest stream are those of the case of `vmod bench aot`."""
    config, mesh, (chips, hbm, tokens, _, name) = machine
    case, target = aot.CASES[name], aot.TARGETS[aot.CASES[name].target]
    assert (target.chips, target.hbm_gib) == (chips, hbm)
    assert dict(zip(AXES, case.mesh, strict=True)) == dict(mesh.shape)
    assert case.rows == config.batch_size // config.accumulate
    assert (case.remat, case.tokens) == (config.remat, tokens)
    assert (case.frames, aot.TEXT) == config.data.buckets[-1][:2]
    compiled, mine = aot.model_config(case, "mod"), make_model(config, tokens)
    same = {name: getattr(mine, name) for name in ("policy", "gate", "grid", "dtype", "param_dtype")}
    assert dataclasses.replace(compiled, **same) == compiled
    assert (mine.lora.rank, mine.lora.alpha) == (compiled.lora.rank, compiled.lora.alpha)


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_what_it_quotes_of_the_compile_is_in_the_results(name):
    text = (CONFIGS / "llama3_8b.py").read_text()
    chips, _, tokens, _, case = MACHINES[name]
    (row,) = re.findall(rf"\n    {name} .*", text)
    (path,) = re.findall(rf"aot-(?:quick-)?{case}\.json", text)
    compiles = json.loads((CONFIGS.parent / "docs" / "results" / path).read_text())["compiles"]
    assert {entry["case"] for entry in compiles} == {case}
    total = {entry["policy"]: entry["total_bytes"] / GIB for entry in compiles}
    assert row.split()[-3:] == [f"{total['mod']:.1f}", f"{total['full']:.1f}", f"{compiles[0]['hbm_bytes'] // GIB}"]
    frames = load(f"llama3_8b:{name}").data.max_frames
    assert re.search(rf" {chips}   {frames} x {tokens} ", row)
