"""`vmod` as a user types it: what the commands write, and mistakes, each one line and exit code 2."""

import errno
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from vmod_jax.commands import cli
from vmod_jax.data import video
from vmod_jax.evaluation.stream_metrics import SampleMetrics
from vmod_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TINY = f"--config={ROOT / 'configs' / 'tiny.py'}"


@pytest.fixture
def mistake(capsys):
    """Runs a command that must fail with exit code 2 and one line on stderr; -> the line."""

    def run(*arguments):
        capsys.readouterr()
        assert cli.main([*map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert error.endswith("\n")
        return error[:-1]

    return run


@pytest.fixture(scope="module")
def workdir(tiny_run, tmp_path_factory):
    """A copy of the trained run, which commands may write into."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    shutil.copytree(tiny_run[0], folder)
    return folder


@pytest.fixture(scope="module")
def unseen(tiny_config, tiny_run):
    """A generated video of the test split; (path, its frames at 2 a second)."""
    root = Path(tiny_config.data.root)
    (name,) = json.loads((root / "splits.json").read_text())["test"]
    return root / f"{name}.mp4", len(video.read(root / f"{name}.mp4", 2.0, 24).frames)


def same_run(config, **changes):
    """The arguments of `vmod train` that make tiny_config of configs/tiny.py, and further changes."""
    values = {name: config[name] for name in ("steps", "checkpoint_every")}
    names = ("root", "train_videos", "val_videos", "test_videos", "max_frames")
    values |= {f"data.{name}": config.data[name] for name in names} | changes
    return [TINY, *(f"--config.{name}={value}" for name, value in values.items())]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what comes before any command ------------------------------------------------------------------------------------


def test_usage(capsys):
    assert cli.main([]) == 2
    usage = capsys.readouterr().out
    assert cli.main(["--help"]) == cli.main(["help"]) == 0
    assert capsys.readouterr().out == 2 * usage
    for name, command in cli.COMMANDS.items():
        assert f"  {name:<10}{command.about}\n" in usage
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.count(".") == 2


def test_a_command_that_does_not_exist(mistake):
    assert mistake("trian").startswith("vmod trian: unknown command 'trian': use one of demo, train, evaluate")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert f"vmod {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stream"], "arguments are required: video, --workdir; see vmod stream --help"),
        (["stream", "a.mp4", "--workdir", "x", "--threshold", "high"], "--threshold: invalid float value: 'high'"),
        (["evaluate", "--workdir", "x", "--splt", "val"], "unrecognized arguments: --splt val"),
        (["evaluate", "--workdir", "x", "--split", "dev"], "invalid choice: 'dev'"),
        (["bench"], "required: NAME; see vmod bench --help"),
        (["bench", "flops", "--frames", "1.5"], "--frames: invalid int value: '1.5'; see vmod bench flops --help"),
        (["data", "cats"], "invalid choice: 'cats'"),
        (["demo", "--step", "x"], "--steps: invalid int value: 'x'"),
        (["import"], "vmod import --help"),
        (["export"], "vmod export --help"),
    ],
)
def test_arguments_that_do_not_parse(mistake, arguments, message):
    assert message in mistake(*arguments)


def test_from_a_shell(tiny_run, tmp_path):
    """The same in a process of its own: nothing else is on stderr, and no traceback."""
    command = [
        sys.executable,
        "-m",
        "vmod_jax",
        "stream",
        str(tmp_path / "no.mp4"),
        "--workdir",
        str(tiny_run[0]),
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"vmod stream: {tmp_path / 'no.mp4'}: no such file\n"


# --- stream -----------------------------------------------------------------------------------------------------------


def test_stream(workdir, unseen, tmp_path, capsys):
    path, frames = unseen
    out = tmp_path / "said.jsonl"
    asked = ["--ask", "2.2:Where is the circle: left?", "--ask", "1:What do you see?", "--ask", "99:Over?"]
    options = ["--max-reply", "6", "--threshold", "0.3", "--jsonl", str(out)]
    assert cli.main(["stream", str(path), "--workdir", str(workdir), *asked, *options]) == 0
    *turns, summary = read_lines(out)
    assert all(turn.keys() == {"time", "role", "text"} for turn in turns)
    times = [turn["time"] for turn in turns]
    assert times == sorted(times)
    questions = [(turn["time"], turn["text"]) for turn in turns if turn["role"] == "user"]
    assert [time for time, _ in questions] == [0.0, 1.0, 2.2, 99.0]  # the instruction comes first
    assert questions[2][1] == "Where is the circle: left?"
    for turn, reply in pairwise(turns):
        if turn["role"] == "user":
            assert (reply["role"], reply["time"]) == ("assistant", turn["time"])
    assert summary["summary"].keys() == {"frames", "fps", "first_reply_seconds", "cache_bytes"}
    assert summary == {"summary": summary["summary"], **summary["summary"]}
    assert summary["frames"] == frames
    assert summary["fps"] > 0
    assert 0 < summary["first_reply_seconds"] < frames / summary["fps"]
    assert summary["cache_bytes"] > 0
    printed = capsys.readouterr().out
    assert [line.split(":", 1)[1].strip() for line in printed.splitlines() if " you: " in line] == [
        text for _, text in questions
    ]
    assert f"{frames} frames" in printed.splitlines()[-2]
    assert printed.splitlines()[-1] == f"wrote {out}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_stream_to_a_full_disk(workdir, unseen, mistake):
    assert mistake("stream", unseen[0], "--workdir", workdir, "--jsonl", "/dev/full") == (
        "vmod stream: --jsonl /dev/full: cannot be written (No space left on device); "
        "name a file on a disk that has room"
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "runs/a"),
        ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device [path=/x]"),
    ],
)
def test_a_full_disk_under_any_command(error, mistake, monkeypatch):
    def fails(argv):
        raise RuntimeError("while saving") from error

    monkeypatch.setattr("vmod_jax.commands.env.main", fails)
    line = mistake("env")
    assert line.startswith("vmod env: a file cannot be written (")
    assert line.endswith("); make room, then run it again")


def test_a_name_that_no_file_can_have(mistake):
    line = mistake("stream", "x" * 5000, "--workdir", "run")
    assert line.startswith("vmod stream: 'xxx")
    assert line.endswith("File name too long")
    assert len(line) < 200


def test_another_error_is_a_fault_of_ours(monkeypatch):
    def fails(argv):
        raise OSError(errno.EAGAIN, "try again")

    monkeypatch.setattr("vmod_jax.commands.env.main", fails)
    with pytest.raises(OSError, match="try again"):
        cli.main(["env"])


def test_stream_without_a_word_of_its_own(workdir, unseen, tmp_path):
    """No instruction, a threshold that only argmax can beat, several frames a call: the same as one by one."""
    written = []
    for prefill in ("1", "4"):
        out = tmp_path / f"{prefill}.jsonl"
        options = ["--instruction", "", "--threshold", "0", "--max-reply", "6", "--prefill", prefill]
        assert cli.main(["stream", str(unseen[0]), "--workdir", str(workdir), *options, "--jsonl", str(out)]) == 0
        *turns, summary = read_lines(out)
        assert all(turn["role"] == "assistant" for turn in turns)
        written.append((turns, summary["frames"]))
    assert written[0] == written[1]


def test_a_stream_that_reaches_its_end_says_so(workdir, unseen, tmp_path, capsys):
    options = ["--max-frames", "5", "--instruction", "", "--threshold", "0", "--jsonl", str(tmp_path / "a")]
    assert cli.main(["stream", str(unseen[0]), "--workdir", str(workdir), *options]) == 0
    assert read_lines(tmp_path / "a")[-1]["frames"] == 5
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "max_frames" in line]
    assert "the stream ends at max_frames = 5 frames (2 s)" in line


def test_stream_mistakes(mistake, workdir, unseen, tmp_path):
    def stream(*arguments):
        return mistake("stream", *arguments, "--workdir", workdir)

    path, _ = unseen
    assert stream(tmp_path / "no.mp4").endswith("no.mp4: no such file")
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    assert "cannot be read as a video" in stream(tmp_path / "text.mp4")
    with av.open(str(tmp_path / "none.avi"), "w") as container:
        made = container.add_stream("libx264", rate=25)
        made.width, made.height, made.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    assert "has no video frames" in stream(tmp_path / "none.avi")
    for text in ("12", "now:What?", ":What?", "1:", "-1:What?", "nan:What?", "inf:What?", "1: "):
        assert "is not TIME:TEXT" in stream(path, f"--ask={text}")
    assert r"outside [0, 1]" in stream(path, "--threshold", 1.5)
    assert "must be at least 1" in stream(path, "--max-frames", 0)
    assert "no folder" in stream(path, "--jsonl", tmp_path / "missing" / "said.jsonl")
    assert not (tmp_path / "missing").exists()
    assert "Is a directory" in stream(path, "--jsonl", tmp_path)
    assert "no such folder" in mistake("stream", path, "--workdir", tmp_path / "nowhere")
    assert "neither a workdir" in mistake("stream", path, "--workdir", tmp_path)


def test_a_damaged_file(mistake, workdir, clips, tmp_path, capsys):
    path = clips / "video" / "corrupted.mp4"
    options = ["--workdir", str(workdir), "--max-reply", "6", "--jsonl", str(tmp_path / "a")]
    line = mistake("stream", path, *options)
    assert "decoding failed at 2.80 s" in line
    assert "--allow-partial" in line
    assert cli.main(["stream", str(path), *options, "--allow-partial"]) == 0
    assert read_lines(tmp_path / "a")[-1]["frames"] == 6


def test_a_file_without_a_duration(workdir, clips, tmp_path):
    path = clips / "video" / "no_duration.webm"
    options = ["--workdir", str(workdir), "--max-reply", "6", "--jsonl", str(tmp_path / "a")]
    assert cli.main(["stream", str(path), *options]) == 0
    assert read_lines(tmp_path / "a")[-1]["frames"] == 10


def test_a_model_without_a_tower(mistake, goldens, unseen):
    assert "no vision tower" in mistake("stream", unseen[0], "--workdir", goldens / "live")


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate(workdir, capsys):
    assert cli.main(["evaluate", "--workdir", str(workdir), "--threshold", "0.5"]) == 0
    result = json.loads((workdir / "eval" / "narration.json").read_text())
    assert {"metrics", "baselines", "samples", "seconds"} <= result.keys()
    assert result["samples"] == 1
    assert result["baselines"].keys() == {"always_silent", "always_speak", "copy_last"}
    names = {"lm_ppl", "time_diff", "fluency", "lm_correctness", "time_diff_strict", "fluency_strict"}
    for metrics in (result["metrics"], *result["baselines"].values()):
        assert metrics.keys() == names
        assert np.isfinite([*metrics.values()]).all()
        assert metrics["lm_ppl"] >= 1
        assert metrics["fluency_strict"] <= metrics["fluency"] <= 1
    header, prediction = read_lines(workdir / "eval" / "narration.predictions.jsonl")
    assert {"format", "benchmark", "model", "split"} <= header.keys()
    assert {"id", "group", "response"} <= prediction.keys()
    assert {"replies", *SampleMetrics._fields} == prediction["response"].keys()
    assert all(reply.keys() == {"truth", "first_choices"} for reply in prediction["response"]["replies"])
    printed = capsys.readouterr().out
    assert f"wrote {workdir / 'eval' / 'narration.json'}" in printed
    assert f"{result['metrics']['fluency']:.3f}" in printed


def test_evaluate_mistakes(mistake, workdir, tmp_path, tiny_config):
    assert "not a workdir" in mistake("evaluate", "--workdir", tmp_path / "nowhere")
    assert "not a workdir" in mistake("evaluate", "--workdir", tmp_path)
    assert "unknown benchmark 'chess'" in mistake("evaluate", "--workdir", workdir, "--benchmark", "chess")
    assert "no checkpoint of step 7; there are 6, 8" in mistake("evaluate", "--workdir", workdir, "--step", 7)
    assert "nothing.py" in mistake("evaluate", "--workdir", workdir, "--config", tmp_path / "nothing.py")
    other = tmp_path / "other"
    shutil.copytree(workdir, other)
    (other / "config.json").unlink()
    assert "say what to score on with --config" in mistake("evaluate", "--workdir", other)
    (other / "config.json").write_text("{")
    assert "config.json" in mistake("evaluate", "--workdir", other)
    arguments = [*same_run(tiny_config), "--config.data.val_videos=2"]
    assert "name another data.root" in mistake("evaluate", "--workdir", workdir, *arguments)


# --- train ------------------------------------------------------------------------------------------------------------


def test_train_mistakes(mistake, tiny_run, tiny_config, tmp_path):
    """Each is found before the run has left anything behind."""
    new = tmp_path / "new"

    def train(*arguments, workdir=new, **changes):
        return mistake("train", *same_run(tiny_config, **changes), "--workdir", workdir, *arguments)

    assert "keep ratio 1.5 is outside [0, 1]" in train(keep=1.5)
    assert "keep ratio -0.1 is outside [0, 1]" in train(keep=-0.1)
    assert "unknown policy 'sideways': use one of full, early_exit" in train(policy="sideways")
    assert "unknown gate 'relu'" in train(gate="relu")
    assert "llama.hidden_size is 32 there, 64 here" in train("--config.model.hidden_size=64", workdir=tiny_run[0])
    assert "did you mean config.steps" in train("--config.stepz=3")
    assert "keep" in train("--config.keep=most")
    for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
        assert f"config.{name}=0: give at least 1" in train(f"--config.{name}=0")
    assert "data.name='films' is unknown" in train(**{"data.name": "films"})
    narration = {"data.name": "narration", "data.root": tmp_path / "nowhere"}
    assert "no such folder" in train(**narration)
    assert "no prepared data set" in train(**{"data.name": "prepared", "data.path": tmp_path})
    assert "no such file" in mistake("train", "--config", tmp_path / "nothing.py", "--workdir", new)
    assert "needs --config FILE" in mistake("train")
    assert "needs --config FILE" in mistake("train", TINY)
    assert not new.exists()


def test_a_workdir_of_another_program(mistake, tiny_config, tmp_path):
    (tmp_path / "model.json").write_text("[]")
    line = mistake("train", *same_run(tiny_config), "--workdir", tmp_path)
    assert "model.json cannot be read" in line
    (tmp_path / "model.json").unlink()
    (tmp_path / "file").write_text("")
    assert "file" in mistake("train", *same_run(tiny_config), "--workdir", tmp_path / "file")


def test_metrics_that_were_emptied(workdir, tiny_config, capsys):
    """A finished run whose metrics.jsonl was cut: nothing is done again, and nothing fails."""
    (workdir / "metrics.jsonl").write_text("")
    assert cli.main(["train", *same_run(tiny_config), "--workdir", str(workdir)]) == 0
    assert read_metrics(workdir / "metrics.jsonl") == []
    assert "going on from step 8 of 8" in capsys.readouterr().out


# --- data and bench ---------------------------------------------------------------------------------------------------


def test_data_made_prepared_and_trained_on(tiny_config, tmp_path, capsys):
    made, prepared, run = tmp_path / "made", tmp_path / "prepared", tmp_path / "run"
    assert cli.main(["data", "shapes", "--out", str(made), "--train", "8", "--val", "1", "--test", "1"]) == 0
    splits = json.loads((made / "splits.json").read_text())
    assert {name: len(videos) for name, videos in splits.items()} == {"train": 8, "val": 1, "test": 1}
    assert len([*made.glob("*.mp4")]) == 10
    arguments = ["--root", str(made), "--out", str(prepared), "--image-size", "24"]
    assert cli.main(["data", "narration", *arguments]) == 0
    meta = json.loads((prepared / "meta.json").read_text())
    assert (meta["kind"], meta["size"], meta["fps"]) == ("pixels", 24, 2.0)
    assert meta["splits"] == {"train": 8, "val": 1, "test": 1}
    printed = capsys.readouterr().out
    assert f"wrote {made}" in printed
    assert f"--config.data.name=prepared --config.data.path={prepared}" in printed
    changes = {"data.name": "prepared", "data.path": prepared, "data.root": "", "steps": 2}
    assert cli.main(["train", *same_run(tiny_config, **changes), "--workdir", str(run)]) == 0
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2]
    assert cli.main(["evaluate", "--workdir", str(run)]) == 0
    assert json.loads((run / "eval" / "narration.json").read_text())["samples"] == 1


def test_data_mistakes(mistake, tiny_config, tiny_run, tmp_path):
    def narration(root, out=tmp_path / "out"):
        return mistake("data", "narration", "--root", root, "--out", out, "--image-size", 24)

    assert "no such folder" in narration(tmp_path / "nowhere")
    assert "narrations.json" in narration(tmp_path)
    root = tmp_path / "root"
    shutil.copytree(tiny_config.data.root, root)
    narrations = json.loads((root / "narrations.json").read_text())
    name = next(iter(narrations["videos"]))
    del narrations["videos"][name]["narrations"][1]["time"]
    (root / "narrations.json").write_text(json.dumps(narrations))
    line = narration(root)
    assert f"video {name}: narration 1 has no 'time'" in line
    assert not (tmp_path / "out").exists()
    (root / "narrations.json").write_text("{")
    assert "not a JSON file" in narration(root)
    (root / "narrations.json").write_text('{"videos": {}}')
    assert "no narrated stream was found" in narration(root)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    assert "holds other files" in narration(tiny_config.data.root, tmp_path / "full")
    assert "-1 train" in mistake("data", "shapes", "--out", tmp_path / "s", "--train", -1)


def test_bench_flops(tmp_path, capsys):
    assert cli.main(["bench", "flops", "--json", str(tmp_path / "flops.json"), "--quick"]) == 0
    written = json.loads((tmp_path / "flops.json").read_text())
    assert written["policies"]["interleaved"] == pytest.approx(30.74, abs=0.01)
    assert {"machine", "versions", "rows"} <= written.keys()
    assert "interleaved" in capsys.readouterr().out


def test_bench_mistakes(mistake, tmp_path):
    assert "keep ratio 1.5 is outside [0, 1]" in mistake("bench", "flops", "--keep", 1.5)
    assert "no file" in mistake("bench", "flops", "--hf-config", tmp_path / "no.json")
