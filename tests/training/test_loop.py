"""Training as a user runs it: stop and resume, starting from another model, mistakes."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vmod_jax
from vmod_jax import workdir
from vmod_jax.commands.train import main
from vmod_jax.data.pipeline import batches, make_buckets, open_streams
from vmod_jax.errors import UserError
from vmod_jax.models.llama import LoraConfig
from vmod_jax.models.video_lm import VideoLM
from vmod_jax.training import config as configuration
from vmod_jax.training.checkpoint import Checkpoints, load_params, save_params
from vmod_jax.training.flags import parse
from vmod_jax.training.loop import train
from vmod_jax.training.metrics import MetricsLog, read_metrics
from vmod_jax.training.optimizer import flatten
from vmod_jax.training.sharding import make_mesh
from vmod_jax.training.step import State, make_step

TINY = f"--config={Path(__file__).resolve().parents[2] / 'configs' / 'tiny.py'}"


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


def test_stop_and_resume_is_bit_identical(whole, config, tmp_path, monkeypatch):
    saved, save = [], Checkpoints.save

    def look(checkpoints, step, *arguments):
        saved.append((step, [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]))
        return save(checkpoints, step, *arguments)

    monkeypatch.setattr(Checkpoints, "save", look)
    assert train(config, tmp_path, stop_at=4).step == 4
    assert saved  # before a checkpoint, the lines of all steps that it knows are in the file
    assert all(lines == list(range(1, step + 1)) for step, lines in saved)
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
    with pytest.raises(UserError, match="x accumulate = 3"):
        run(accumulate=3)
    with pytest.raises(UserError, match=r"config.profile=\(3, 2\): give \(first, last\)"):
        run(profile=(3, 2))
    with pytest.raises(UserError, match="folder in which that bucket is mounted"):
        train(config, "gs://bucket/run")
    unknown = type(config)(config.to_dict() | {"sead": 1})
    with pytest.raises(UserError, match=r"did you mean config\.seed"):
        train(unknown, tmp_path / "x")
    assert not (tmp_path / "x" / "model.json").exists()


def test_an_imported_folder_is_no_place_to_train(whole, config, tmp_path):
    workdir.write(tmp_path, workdir.read_model(whole[0]), None)
    save_params(tmp_path, load_params(whole[0]))
    with pytest.raises(UserError, match="start a new run from it with init_from"):
        train(config, tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(whole, config, tmp_path, monkeypatch, number, code):
    advance = MetricsLog.advance

    def signalled(log):
        advance(log)
        if log.bar.n == 2:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "advance", signalled)
        summary = train(config, tmp_path)
    assert (summary.step, summary.exit_code) == (2, code)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert signal.getsignal(number) is before
    summary = train(config, tmp_path, stop_at=3)
    assert (summary.step, summary.exit_code) == (3, 0)
    assert _losses(tmp_path) == _losses(whole[0])[:3]


def test_sigterm_before_the_first_step(tmp_path, monkeypatch):
    """Nothing is lost, and the launcher is told to run it again."""
    monkeypatch.setattr("vmod_jax.commands.train.train", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        main([TINY, f"--workdir={tmp_path}"])
    assert end.value.code == 75


def test_what_a_run_may_change_when_it_goes_on(config, tmp_path, capsys):
    train(config, tmp_path, stop_at=1)

    def again(**changes):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(changes)
        return train(other, tmp_path, stop_at=2)

    for key, value in (("seed", 1), ("batch_size", 4), ("data.stream_weight", 0.5), ("data.max_frames", 12)):
        with pytest.raises(UserError, match=rf"began with other batches: {key} is .* there, {value} here"):
            again(**{key: value})
    with pytest.raises(UserError, match=r"data.seed is 0 there, 1 here.*data.max_frames is 16 there, 12 here"):
        again(**{"data.seed": 1, "data.max_frames": 12})
    capsys.readouterr()
    assert again(steps=9, **{"data.prefetch": 1, "optimizer.clip": 2.0}).step == 2
    said = capsys.readouterr().out
    assert "with changes: " in said
    for line in ("steps is 8 there, 9 here", "data.prefetch is 2 there, 1 here", "optimizer.clip is 1.0 there, 2.0"):
        assert line in said
    assert workdir.read_config(tmp_path)["steps"] == 9


def test_evaluation_in_training(whole, config, tmp_path):
    """It changes nothing of the run; its loss is that of the saved parameters; the best checkpoint stays."""
    other = config.copy_and_resolve_references()
    other.eval_every, other.keep_checkpoints = 2, 1
    other.profile = (2, 3)
    train(other, tmp_path, stop_at=5)
    train(other, tmp_path)
    assert _losses(tmp_path) == _losses(whole[0])
    found = {line["step"]: line["val_loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in line}
    assert list(found) == [2, 4, 6, 8]
    best = min(found, key=lambda step: found[step])
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {str(best), "8"}
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))

    # The same number from the model itself: the one stream of the split, as often as a batch has rows.
    lm = vmod_jax.load(tmp_path, step=8)
    streams = open_streams(other.data, "val", 24)
    (bucket,) = make_buckets(other.data.buckets, open_streams(other.data, "train", 24), lm.fmt, other.data.max_frames)
    (batch,) = itertools.islice(batches(streams, lm.fmt, [bucket], 2, seed=0), 1)
    logits = lm.logits(batch["input_ids"], batch["frames"])[0][batch["label_pos"][0] % batch["input_ids"].shape[1]]
    log_p = jax.nn.log_softmax(logits)
    there = batch["label"][0] >= 0
    expected = -log_p[np.arange(len(there)), np.maximum(batch["label"][0], 0)] * batch["label_weight"][0]
    np.testing.assert_allclose(found[8], expected[there].mean(), rtol=1e-5)


def test_accumulation_is_the_whole_batch():
    """Losses and gradient, where labels are spread unevenly over the parts and one part has none."""
    from tiny_models import D_V, VOCAB, make_config, make_params

    config = make_config("all")
    params, (n, rows, frames, text, labels) = make_params(config), (config.tokens_per_frame, 8, 2, 6, 5)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (rows, text + n * frames))
    ids[:, 2 : 2 + n] = ids[:, 4 + n : 4 + 2 * n] = VOCAB
    label = rng.integers(0, VOCAB, (rows, labels))
    label[rng.random(label.shape) < 0.4] = -100
    label[[1, 5]] = -100  # the second of four parts
    batch = {
        "input_ids": ids.astype(np.int32),
        "frames": rng.normal(size=(rows, frames, n, D_V)).astype(np.float32),
        "length": np.full(rows, ids.shape[1], np.int32),
        "label_pos": np.tile(np.arange(labels, dtype=np.int32) * 4, (rows, 1)),
        "label": label.astype(np.int32),
        "label_weight": rng.random(label.shape).astype(np.float32),
        "label_is_stream": rng.random(label.shape) < 0.5,
    }
    keep = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, s, p: (s, g))
    mesh = make_mesh(configuration.defaults().mesh, rows, 8, 2)

    def gradient_and_losses(accumulate):
        state = State(jax.tree.map(jnp.copy, params), keep.init(params), jax.random.key_data(jax.random.key(0)))
        new, losses = make_step(VideoLM(config), keep, state, mesh, accumulate)(state, {}, batch, 0)
        return flatten(new.optimizer), losses

    (expected, losses), (got, in_parts) = gradient_and_losses(1), gradient_and_losses(4)
    for name, value in losses.items():
        np.testing.assert_allclose(in_parts[name], value, rtol=1e-6, err_msg=name)
    for path, x in expected.items():
        assert np.asarray(x).any(), path
        np.testing.assert_allclose(got[path], x, rtol=0, atol=1e-5 * np.abs(x).max(), err_msg=path)


def test_dropout_is_drawn_anew_in_every_step():
    """And again the same for the same step, whatever came before: that is what a resumed run needs."""
    from tiny_models import D_V, VOCAB, make_config, make_params

    config = make_config("full", lora=LoraConfig(rank=4, alpha=8, dropout=0.5))
    params, n, rows, labels = make_params(config), config.tokens_per_frame, 2, 4
    ids = np.tile(np.r_[1, 2, [VOCAB] * n, 3, 4, 5], (rows, 1)).astype(np.int32)
    batch = {
        "input_ids": ids,
        "frames": np.ones((rows, 1, n, D_V), np.float32),
        "length": np.full(rows, ids.shape[1], np.int32),
        "label_pos": np.tile(np.arange(labels, dtype=np.int32) + n, (rows, 1)),
        "label": np.tile(np.arange(labels, dtype=np.int32), (rows, 1)),
        "label_weight": np.ones((rows, labels), np.float32),
        "label_is_stream": np.zeros((rows, labels), bool),
    }
    still = optax.set_to_zero()
    mesh = make_mesh(configuration.defaults().mesh, rows, 8, 2)
    state = State(params, still.init(params), jax.random.key_data(jax.random.key(0)))
    step_function, losses = make_step(VideoLM(config), still, state, mesh), []
    for step in (0, 1, 2, 1):
        state, parts = step_function(state, {}, batch, step)
        losses.append(float(parts["loss"]))
    assert len(set(losses[:3])) == 3
    assert losses[3] == losses[1]


def test_a_process_that_does_not_know_the_others(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID too"):
        main([TINY, f"--workdir={tmp_path}"])


@pytest.mark.slow
@pytest.mark.mesh
def test_eight_devices_train_as_one(whole, config, tmp_path):
    """data x fsdp x tensor = 2 x 2 x 2: the same losses as one device, to rounding."""
    (tmp_path / "config.json").write_text(config.to_json())
    script = (
        "import json, sys; from ml_collections import ConfigDict; from vmod_jax.training.loop import train\n"
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
    from vmod_jax.training.config import defaults
    from vmod_jax.training.sharding import make_mesh
    from vmod_jax.training.step import _starting_params

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


def test_the_keep_ratio_comes_down_in_stages(whole, config, tmp_path):
    """Also across a resume; the workdir's model is that of the end."""
    warmed = config.copy_and_resolve_references()
    warmed.keep_warmup = 0.75  # of 8 steps: 1.0, 0.8, 0.4, two steps each
    train(warmed, tmp_path / "whole")
    train(warmed, tmp_path / "parts", stop_at=3)
    train(warmed, tmp_path / "parts")
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    assert _losses(tmp_path / "whole")[0] != _losses(whole[0])[0]
    assert workdir.read_model(tmp_path / "whole") == workdir.read_model(whole[0])
    everything = config.copy_and_resolve_references()
    everything.keep, everything.steps = 1.0, 8
    train(everything, tmp_path / "all", stop_at=2)
    assert _losses(tmp_path / "all") == _losses(tmp_path / "whole")[:2]
    warmed.keep_warmup = 1.5
    with pytest.raises(UserError, match=r"keep_warmup=1\.5"):
        train(warmed, tmp_path / "none")
