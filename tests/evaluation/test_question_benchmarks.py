"""`vmod evaluate` on benchmarks that ask questions: every row runs, on folders laid out as theirs are."""

import json

import numpy as np
import pytest
from tiny_models import make_params

from vmod_jax.data import stills, video
from vmod_jax.data.conversation import stream_format
from vmod_jax.data.sources import image_qa
from vmod_jax.data.tokenizer import train_tokenizer
from vmod_jax.errors import UserError
from vmod_jax.evaluation.benchmarks import BENCHMARKS, evaluate
from vmod_jax.evaluation.question_benchmarks import QUESTIONS
from vmod_jax.lm import LanguageModel, load
from vmod_jax.models.depth import make_policy
from vmod_jax.models.llama import LlamaConfig
from vmod_jax.models.video_lm import VideoLMConfig
from vmod_jax.models.vision import VisionConfig, patches_width


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A model that knows nothing, with a tower."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["A", "B", "Yes", "No", "red"], folder / "tokenizer", vocab_size=300)
    fmt = stream_format(tokenizer, 4)
    llama = LlamaConfig(fmt.frame_token_id, 16, 24, 2, 2, 1, 8, max_position_embeddings=4096)
    vision = VisionConfig("patches", 8, 2, patches_width(2))
    config = VideoLMConfig(
        llama, make_policy("interleaved", 2, 0.5), fmt.frame_token_id, vision.hidden_size, vision, False, (2, 2)
    )
    LanguageModel(config, make_params(config), tokenizer).save(folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "qa"
    image_qa.generate(root, 2, 2)
    return root


def clip(path, seconds=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    video.write(path, (rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(seconds * 4)), 4)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def scienceqa(root):
    problem = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "", "image": "image.png"}
    write(root / "problems.json", {"1": problem, "2": problem | {"image": None}})
    write(root / "pid_splits.json", {"test": ["1", "2"]})
    (root / "images" / "test" / "1").mkdir(parents=True)
    stills.save(root / "images" / "test" / "1" / "image.png", np.zeros((8, 8, 3), np.uint8))


def textvqa(root):
    write(root / "TextVQA_0.5.1_val.json", {"data": [{"image_id": "a", "question": "What?", "answers": ["x"] * 10}]})
    (root / "train_images").mkdir()
    stills.save(root / "train_images" / "a.jpg", np.zeros((8, 8, 3), np.uint8))


def open_videos(root):
    write(root / "test_q.json", [{"video_name": "v", "question": "what is it", "question_id": "1"}])
    write(root / "test_a.json", [{"answer": "dog", "question_id": "1", "type": 5}])
    clip(root / "videos" / "v_v.mp4")


def videomme(root):
    row = {"video_id": "1", "duration": "short", "domain": "d", "sub_category": "s", "videoID": "y"} | {
        "question_id": "1-1", "task_type": "t", "question": "Q?", "answer": "B",
        "options": ["A. x", "B. y", "C. z", "D. w"],
    }  # fmt: skip
    write(root / "annotations.json", [row, row | {"question_id": "1-2"}])
    clip(root / "data" / "y.mp4")


def mvbench(root):
    row = {"video": "v.mp4", "question": "Q?", "candidates": ["x", "y", "z"], "answer": "x"}
    write(root / "json" / "t.json", [row | {"start": 1, "end": 2}, row | {"video": "frames"}])
    clip(root / "video" / "deep" / "v.mp4")
    (root / "video" / "frames").mkdir()
    for i in (1, 2, 3):
        stills.save(root / "video" / "frames" / f"{i:05d}.png", np.zeros((8, 8, 3), np.uint8))


def egoschema(root):
    write(root / "questions.json", [{"q_uid": "u", "question": "Q?"} | {f"option {i}": f"o{i}" for i in range(5)}])
    write(root / "subset_answers.json", {"u": 3})
    clip(root / "videos" / "u.mp4")


def ovobench(root):
    seen = {"id": 0, "task": "EPM", "video": "a.mp4", "realtime": 1.5, "question": "Q?", "options": ["x", "y"], "gt": 1}
    told = {"id": 2, "task": "REC", "video": "a.mp4", "activity": "do it"}
    asked = {"test_info": [{"realtime": 1, "count": 0}, {"realtime": 3, "count": 2}]}
    write(root / "ovo_bench_new.json", [seen, seen | {"id": 1, "task": "OCR"}, told | asked])
    clip(root / "src_videos" / "a.mp4")


def streamingbench(root):
    asked = {"task_type": "T", "question": "Q?", "time_stamp": "00:00:02"}
    place = {"time": "[0:00:00 - 0:00:04]", "video_path": "./videos/s.mp4"}
    options = {"answer": "B", "options": ["A. x", "B. y", "C. z", "D. w"]}
    write(root / "questions_real.json", [place | {"questions": [asked | options]}])
    write(root / "questions_sqa.json", [[place | {"questions": [asked | options]}] * 2])
    truth = {"ground_truth_time_stamp": "00:00:03", "ground_truth_output": "x"}
    write(root / "questions_proactive.json", [place | {"questions": [asked | truth]}])
    clip(root / "videos" / "s.mp4")


FOLDERS = {
    "scienceqa": scienceqa, "textvqa": textvqa, "msvd": open_videos, "msrvtt": open_videos, "activitynet": open_videos,
    "videomme": videomme, "mvbench": mvbench, "egoschema": egoschema, "ovobench": ovobench,
    "streamingbench": streamingbench, "streamingbench_sqa": streamingbench, "streamingbench_proactive": streamingbench,
}  # fmt: skip


def folder_for(name, world, root):
    if name in FOLDERS:
        root.mkdir(exist_ok=True)
        FOLDERS[name](root)
        return root
    return world / name


def test_every_row_is_in_the_table():
    assert set(QUESTIONS) <= set(BENCHMARKS)
    assert set(QUESTIONS) == {*FOLDERS, "pope", "gqa", "mme"}


SLOW = [name for name in QUESTIONS if name not in ("pope", "videomme")]


@pytest.mark.parametrize("name", ["pope", "videomme", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_row_runs_and_writes_what_it_says(name, workdir, world, tmp_path):
    root = folder_for(name, world, tmp_path / "root")
    result = evaluate(workdir, benchmark=name, root=root, frames=4)
    scores = json.loads((workdir / "eval" / f"{name}.json").read_text())
    assert scores["samples"] == result["samples"] > 0
    assert any(key.startswith("official/") for key in scores["metrics"])
    assert any(key.startswith("strict/") for key in scores["metrics"])
    assert scores["baselines"]
    header, *rows = [json.loads(x) for x in (workdir / "eval" / f"{name}.predictions.jsonl").read_text().splitlines()]
    assert header["benchmark"] == name
    assert len(rows) == scores["samples"]
    again = evaluate(workdir, benchmark=name, root=root, frames=4)  # from the file
    assert again["metrics"] == result["metrics"]


def test_by_likelihood_every_option_parses_and_a_grid_of_its_own(workdir, tmp_path):
    root = folder_for("videomme", None, tmp_path / "root")
    result = evaluate(workdir, benchmark="videomme", root=root, frames=4, by="likelihood", grid=(4, 4))
    assert result["metrics"]["strict/unparsed"] == 0
    with pytest.raises(UserError, match="grid 5x4: its encoder has 4 x 4 patches"):
        evaluate(workdir, benchmark="videomme", root=root, grid=(5, 4))


def test_missing_images_are_refused_or_scored_wrong(workdir, world, tmp_path):
    import shutil

    root = tmp_path / "pope"
    shutil.copytree(world / "pope", root)
    next((root / "val2014").iterdir()).unlink()
    with pytest.raises(UserError, match=r"is not there, nor is what 18 of 36 questions show; --missing skip") as error:
        evaluate(workdir, benchmark="pope", root=root)
    assert "\n" not in str(error.value)
    result = evaluate(workdir, benchmark="pope", root=root, missing="skip")
    assert result["samples"] == 36
    assert result["metrics"]["strict/random/unparsed"] >= 0.5


def test_nothing_after_the_question_is_seen(workdir, tmp_path):
    """A stream's question is answered alike whatever comes later in the video."""
    from vmod_jax.evaluation.question_benchmarks import stream_question
    from vmod_jax.evaluation.table import Task

    ovobench(tmp_path)
    rng = np.random.default_rng(0)
    seen = [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(7)]
    for name, later in (("a", 0), ("b", 255)):
        frames = [*seen, *[np.full((16, 16, 3), later, np.uint8)] * 9]
        video.write(tmp_path / "src_videos" / f"{name}.mp4", frames, 4)
    (document, *_) = QUESTIONS["ovobench"].documents(Task(load(workdir), _data(tmp_path), "test"))
    task = Task(load(workdir), None, "test")
    shown = [
        stream_question(task, document._replace(video=tmp_path / "src_videos" / f"{name}.mp4")).frames()
        for name in "ab"
    ]
    assert len(shown[0]) == 4  # 0, 0.5, 1 and 1.5 s
    np.testing.assert_allclose(shown[0].astype(int), shown[1].astype(int), atol=40)  # the encoder looks ahead a little


def _data(root):
    from vmod_jax.training.config import defaults

    config = defaults()
    config.data.root = str(root)
    return config
