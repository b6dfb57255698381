"""`vmod routing` as a user types it, on a tiny run's own streams and on a file."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vmod_jax.commands import cli
from vmod_jax.data import video
from vmod_jax.data.pipeline import open_streams

FILES = {"routing.json", "strip.png", "positions.png", "overlap.png", "stream.mp4"}


@pytest.fixture(scope="module")
def workdir(tiny_run, tmp_path_factory):
    """A copy of the trained run, which the command may write into."""
    folder = tmp_path_factory.mktemp("routing") / "run"
    shutil.copytree(tiny_run[0], folder)
    return folder


@pytest.fixture
def mistake(capsys):
    def run(*arguments):
        capsys.readouterr()
        assert cli.main(["routing", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("vmod routing:")]
        assert "Traceback" not in error
        assert len(lines) == 1, error
        return lines[0]

    return run


def test_a_split_of_its_own_data(workdir, tiny_config, capsys):
    assert cli.main(["routing", "--workdir", str(workdir), "--split", "train", "--videos", "3"]) == 0
    out = workdir / "routing"
    assert {path.name for path in out.iterdir()} == FILES
    result = json.loads((out / "routing.json").read_text())
    samples = open_streams(tiny_config.data, "train", 24).samples[:3]
    frames = sum(sample.stop - sample.start for sample in samples)
    assert (result["split"], result["streams"], result["frames"]) == ("train", 3, frames)
    assert result["model"]["compared_with"] == "bfloat16"
    boxes = json.loads((Path(tiny_config.data.root) / "boxes.json").read_text())
    shown = [frame for sample in samples for frame in boxes[sample.video][sample.start : sample.stop]]
    assert [*result["layers"]] == ["1", "3"]
    for entry in result["layers"].values():
        assert (entry["kept"], entry["chance"]) == (2, pytest.approx(0.2))
        assert sum(entry["keep_rate"]) == pytest.approx(2)
        objects = [entry for frame in shown for entry in frame if not entry.get("distractor")]
        assert entry["boxes"]["objects"] == len(objects)
        assert 0 <= entry["boxes"]["hit_rate"] <= 1
        assert 0.5 < entry["agreement"]["same_tokens"] <= 1
        gate = entry["gate"]
        assert (
            gate["min"] <= gate["mean"] <= gate["max"] == pytest.approx(entry["mu"]["max"])
        )  # raw; the top one is kept
    assert len(video.read(out / "stream.mp4", 2.0, 64).frames) == samples[0].stop - samples[0].start
    for name in FILES:
        if name.endswith(".png"):
            with Image.open(out / name) as image:
                assert min(image.size) > 100
    printed = capsys.readouterr().out
    assert f"3 streams, {frames} frames of 10 tokens" in printed
    assert "objects hit" in printed
    assert "2 of 10" in printed
    assert f"wrote {out}: " in printed
    assert "next: " in printed


def test_a_file(workdir, tiny_config, tmp_path, capsys):
    (name,) = json.loads((Path(tiny_config.data.root) / "splits.json").read_text())["test"]
    path = Path(tiny_config.data.root) / f"{name}.mp4"
    out = tmp_path / "new" / "out"
    assert cli.main(["routing", "--workdir", str(workdir), "--video", str(path), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == FILES
    result = json.loads((out / "routing.json").read_text())
    assert (result["video"], result["streams"]) == (str(path), 1)
    assert result["frames"] == len(video.read(path, 2.0, 24).frames)
    assert all("boxes" not in entry for entry in result["layers"].values())
    assert "no hit rates" in capsys.readouterr().out


def test_mistakes(mistake, workdir, tiny_config, tmp_path, goldens):
    assert "not a workdir" in mistake("--workdir", tmp_path)
    assert "--videos must be at least 1" in mistake("--workdir", workdir, "--videos", 0)
    assert "no.mp4: no such file" in mistake("--workdir", workdir, "--video", tmp_path / "no.mp4")
    other = tmp_path / "other"
    shutil.copytree(workdir, other)
    (other / "config.json").unlink()
    assert "name a file to watch with --video" in mistake("--workdir", other)
    model = json.loads((other / "model.json").read_text())
    model["policy"] = [{"keep": 1.0, "selector": None}] * 4
    (other / "model.json").write_text(json.dumps(model))
    shutil.copy(workdir / "config.json", other)
    assert "no layer of this model has a LayerExpert" in mistake("--workdir", other)


def test_boxes_of_other_videos(mistake, workdir, tiny_config, tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    shutil.copytree(tiny_config.data.root, root)
    shutil.copytree(workdir, other)
    config = json.loads((other / "config.json").read_text())
    config["data"]["root"] = str(root)
    (other / "config.json").write_text(json.dumps(config))

    def with_world(**changes):
        world = json.loads((Path(tiny_config.data.root) / "world.json").read_text())
        (root / "world.json").write_text(json.dumps(world | changes))
        return mistake("--workdir", other)

    assert "is 96x96, its boxes are in pixels of 48x48" in with_world(side=48)
    assert "boxes.json is for 4 frames a second, data.fps is 2" in with_world(sample_fps=4)
    (root / "boxes.json").write_text("{}")
    assert "boxes.json lacks frames of val-0000" in with_world()
