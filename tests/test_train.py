"""Training as a user runs it: stop and resume, starting from another model, mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vmod_jax import workdir
from vmod_jax.errors import UserError
from vmod_jax.train import main, parse, train
from vmod_jax.training.checkpoint import load_params, save_params
from vmod_jax.training.metrics import read_metrics
from vmod_jax.training.optimizer import flatten

TINY = f"--config={Path(__file__).resolve().parents[1] / 'configs' / 'tiny.py'}"


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config


@pytest.fixture(scope="module")
def whole(tiny_run):
    """A run without interruptions, and its summary."""
    return tiny_run


def _losses(folder):
    names = ("step", "loss", "lm_loss", "stream_loss", "grad_norm")
    return [tuple(line[name] for name in names) for line in read_metrics(folder / "metrics.jsonl")]


def test_what_a_run_leaves(whole, config):
    folder, summary = whole
    assert summary.step == 8
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert {"loss", "lm_loss", "stream_loss", "step_seconds", "tokens_per_second"} <= lines[0].keys()
    assert lines[-1]["loss"] == summary.loss < lines[0]["loss"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["6", "8"]
    assert workdir.read_config(folder) == json.loads(config.to_json())
    assert workdir.read_model(folder).llama.hidden_size == 32
    assert (folder / "tokenizer" / "tokenizer.json").is_file()
    assert list((folder / "tensorboard").iterdir())


def test_stop_and_resume_is_bit_identical(whole, config, tmp_path):
    assert train(config, tmp_path, stop_at=4).step == 4
    assert len(_losses(tmp_path)) == 4
    # As if it had been killed after two more steps, of which no checkpoint knows.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 0.0}\n{"step": 6, "lo')
    assert train(config, tmp_path).step == 8
    folder, _ = whole
    assert _losses(tmp_path) == _losses(folder)
    expected, got = flatten(load_params(folder)), flatten(load_params(tmp_path))
    assert expected.keys() == got.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(got[path], array, err_msg=path)


def test_a_finished_run_is_left_alone(whole, config):
    folder, _ = whole
    before = (folder / "metrics.jsonl").read_text()
    assert train(config, folder).step == 8
    assert (folder / "metrics.jsonl").read_text() == before


def test_another_model_in_the_workdir(whole, config):
    other = config.copy_and_resolve_references()
    other.model.intermediate_size, other.gate = 96, "tanh"
    with pytest.raises(UserError) as error:
        train(other, whole[0])
    assert "llama.intermediate_size is 64 there, 96 here" in str(error.value)
    assert 'gate is "raw" there, "tanh" here' in str(error.value)


def test_lora_from_a_trained_model(whole, config, tmp_path):
    """The base stays as it was bit for bit, LoRA, experts and the connector move, and the whole tree is saved."""
    other = config.copy_and_resolve_references()
    other.init_from, other.steps, other.policy = str(whole[0]), 1, "all"
    other.optimizer.train_base = False
    other.model.lora.rank, other.model.lora.dropout = 4, 0.1
    summary = train(other, tmp_path)
    before, after = flatten(load_params(whole[0])), flatten(load_params(tmp_path))
    assert {path for path in after if path not in before} == {path for path in after if "lora" in path}
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path in before if "expert" in path or "connector" in path}
    assert summary.frozen_params == sum(x.size for path, x in before.items() if path not in moved)
    assert any(np.asarray(after[path]).any() for path in after if path.endswith("lora_b"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.learning_rat=1"], "did you mean config.optimizer.learning_rate?"),
        (["--config.mesh.fspd=1"], "did you mean config.mesh.fsdp?"),
        (["--config.steps=many"], "steps"),
        (["steps=3"], "unexpected steps=3"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    with pytest.raises(UserError) as error:
        parse([TINY, "--workdir", "x", *arguments])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_configuration_files(tmp_path):
    config, folder = parse([TINY, "--workdir=runs/x", "--config.mesh.data=1", "--config.keep=0.5"])
    assert (config.mesh.data, config.keep, folder.name) == (1, 0.5, "x")
    with pytest.raises(UserError, match="needs --config FILE"):
        parse(["--workdir", "x"])
    with pytest.raises(UserError, match=r"nothing\.py"):
        parse(["--config", "nothing.py", "--workdir", "x"])
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from vmod_jax.training.config import defaults\ndef get_config():\n    c = defaults()\n    c.stepz = 3\n"
    )
    with pytest.raises(UserError, match="stepz"):
        parse(["--config", str(wrong), "--workdir", "x"])


def test_mistakes_in_a_configuration(config, tmp_path):
    def run(**changes):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(changes)
        return train(other, tmp_path / "x")

    with pytest.raises(UserError, match="unknown policy 'sideways'"):
        run(policy="sideways")
    with pytest.raises(UserError, match=r"keep ratio 1.5 is outside"):
        run(keep=1.5)
    with pytest.raises(UserError, match="not a workdir"):
        run(init_from=str(tmp_path))
    with pytest.raises(UserError, match=r"longer than the model's 64 positions"):
        run(**{"model.max_position_embeddings": 64})
    unknown = type(config)(config.to_dict() | {"sead": 1})
    with pytest.raises(UserError, match=r"did you mean config\.seed"):
        train(unknown, tmp_path / "x")
    assert not (tmp_path / "x" / "model.json").exists()


def test_an_imported_folder_is_no_place_to_train(whole, config, tmp_path):
    workdir.write(tmp_path, workdir.read_model(whole[0]), None)
    save_params(tmp_path, load_params(whole[0]))
    with pytest.raises(UserError, match="start a new run from it with init_from"):
        train(config, tmp_path)


@pytest.mark.slow
@pytest.mark.mesh
def test_eight_devices_train_as_one(whole, config, tmp_path):
    """data x fsdp x tensor = 2 x 2 x 2: the same losses as one device, to rounding."""
    (tmp_path / "config.json").write_text(config.to_json())
    script = (
        "import json, sys; from ml_collections import ConfigDict; from vmod_jax.train import train\n"
        "config = ConfigDict(json.load(open(sys.argv[1])))\n"
        "config.mesh = dict(data=2, fsdp=2, context=1, tensor=2)\n"
        "train(config, sys.argv[2])\n"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-c", script, str(tmp_path / "config.json"), str(tmp_path / "run")]
    subprocess.run(arguments, check=True, env=environment)
    got, expected = _losses(tmp_path / "run"), _losses(whole[0])
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got, expected, rtol=5e-3)  # rounding, grown over eight steps of Adam
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert all(x.sharding == one for x in jax.tree.leaves(load_params(tmp_path / "run")))


def test_main_takes_its_arguments(whole, config, tmp_path, capsys):
    """The finished run again, through the command line."""
    changes = [f"--config.{name}={value}" for name, value in (("steps", 8), ("checkpoint_every", 3))]
    changes += [f"--config.data.{name}={config.data[name]}" for name in ("root", "train_videos", "val_videos")]
    changes += [f"--config.data.{name}={config.data[name]}" for name in ("test_videos", "max_frames")]
    assert main([TINY, f"--workdir={whole[0]}", *changes]) == 0
    assert "going on from step 8 of 8" in capsys.readouterr().out


def test_experts_that_were_never_trained_start_at_the_scale_of_this_runs_gate(tmp_path, capsys):
    from tiny_models import make_config, make_params

    from vmod_jax.lm import LanguageModel
    from vmod_jax.train import _starting_params
    from vmod_jax.training.config import defaults
    from vmod_jax.training.sharding import make_mesh

    there, here = make_config("full", "raw"), make_config("interleaved", "tanh")
    params = make_params(there)
    (tmp_path / "tokenizer").mkdir()
    workdir.write(tmp_path, there, None)
    save_params(tmp_path, params)
    assert LanguageModel(there, params).config == workdir.read_model(tmp_path)
    mesh = make_mesh(defaults().mesh, 8, 8, 2)
    got = flatten(_starting_params(tmp_path, here, mesh))
    for path, x in flatten(params).items():
        if path == "llama/layers/expert/kernel":
            factor = np.array([1, 0.02, 1, 0.02])[:, None]  # interleaved: layers 1 and 3 are routed
            np.testing.assert_allclose(got[path], x * factor, rtol=1e-5)
        else:
            np.testing.assert_array_equal(got[path], x)
    assert "layers 1, 3" in capsys.readouterr().out
