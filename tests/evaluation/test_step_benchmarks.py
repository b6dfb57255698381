"""Rows about steps, on generated files: an oracle gets everything, constants do not, and a model is trained."""

import json
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from vmod_jax.commands import cli
from vmod_jax.data.sources import coin, shape_steps
from vmod_jax.evaluation.benchmarks import BENCHMARKS, flat_scores
from vmod_jax.evaluation.step_benchmarks import STEPS, show
from vmod_jax.evaluation.table import Task

SCHEMAS = {**{f"coin_{task}": "coin" for task in coin.TASKS}, "keystep": "egoexo4d", "lta": "lta"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """{schema: Task} for a model that takes pictures of 8 pixels; 6 videos for training, 4 held out."""
    lm, made = SimpleNamespace(config=SimpleNamespace(vision=SimpleNamespace(image_size=8))), {}
    for schema in set(SCHEMAS.values()):
        root = tmp_path_factory.mktemp(schema) / "data"
        shape_steps.generate(root, schema, 6, 4)
        data = ConfigDict(
            {"name": "", "root": str(root), "features": "", "fps": 2.0, "seed": 0, "mix": {}, "allow_outside": False}
        )
        made[schema] = Task(lm, ConfigDict({"data": data}), "val" if schema != "coin" else "test")
    return made


def test_every_row_is_in_the_table():
    assert SCHEMAS.keys() == STEPS.keys() <= BENCHMARKS.keys()


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_oracle_beats_every_constant(tasks, name, tmp_path):
    row, task = BENCHMARKS[name], tasks[SCHEMAS[name]]
    documents = row.documents(task)
    assert len(documents) >= 4
    truth = {one.id: one.extra["sample"].conversation[-1]["content"] for one in documents}
    assert len(truth) == len(documents)
    said = {key: [text] * 5 for key, text in truth.items()} if name == "lta" else truth
    best, worst = (0.0, 1.0) if name == "lta" else (100.0, 0.0)
    metrics = flat_scores(row.scores, documents, said)
    assert metrics == pytest.approx(dict.fromkeys(metrics, best))
    constants = row.constants(task, documents)
    assert constants.keys() == {"empty", "most_frequent"}
    for answers in constants.values():
        for key, value in flat_scores(row.scores, documents, answers).items():
            assert value is not None
            assert abs(value - best) > 0.1 * abs(worst - best), key
    if row.write:
        row.write(documents, said, tmp_path)
        submitted = json.loads((tmp_path / "lta_submission.json").read_text())
        assert len(submitted) == len(documents)
        for one in documents:
            assert submitted[one.extra["key"]] == {part: [one.gold[part]] * 5 for part in ("verb", "noun")}


def test_a_model_of_a_mixture_is_asked_one_thing(tasks):
    task = tasks["coin"]
    mixed = task._replace(config=ConfigDict(task.config))
    mixed.config.data.mix = {"coin_step": 1.0, "coin_next": 1.0}
    documents = BENCHMARKS["coin_task"].documents(mixed)
    assert {one.prompt for one in documents} == {one.prompt for one in BENCHMARKS["coin_task"].documents(task)}
    assert len(documents) == 4


def test_a_document_shows_its_question_and_frames_and_not_its_answer(tasks):
    task = tasks["coin"]
    document = BENCHMARKS["coin_step"].documents(task)[1]
    shown = show(task)(document)
    assert [message["role"] for message in shown.conversation] == ["user", "stream"]
    assert len(shown.frames()) == shown.conversation[1]["num_frames"]
    assert document.gold not in str(shown.conversation)


@pytest.mark.slow
def test_from_files_to_a_score_by_commands(tmp_path, monkeypatch):
    """Videos, features, training and score, one command each; killed and run again, the predictions are the same."""
    data, features, work = (str(tmp_path / name) for name in ("data", "features", "run"))
    said = lambda *arguments: cli.main([str(argument) for argument in arguments])  # noqa: E731
    assert said("data", "steps", "--schema", "coin", "--out", data, "--train", 96, "--test", 24) == 0
    assert said("data", "features", f"{data}/videos", "--image-size", 24, "--out", features) == 0
    where = ["--config.data.name=coin_step", f"--config.data.root={data}", f"--config.data.features={features}"]
    assert said("train", "--config", "configs/steps.py", "--workdir", work, *where) == 0
    assert said("evaluate", "--workdir", work, "--benchmark", "coin_step") == 0
    path = tmp_path / "run" / "eval" / "coin_step.json"
    result, predictions = json.loads(path.read_text()), path.with_name("coin_step.predictions.jsonl")
    best = max(scores["nearest"] for scores in result["baselines"].values())
    assert result["metrics"]["nearest"] > best + 25
    whole = predictions.read_bytes()
    predictions.write_bytes(whole[: len(whole) // 2])
    path.unlink()
    assert said("evaluate", "--workdir", work, "--benchmark", "coin_step") == 0
    assert predictions.read_bytes() == whole
    assert json.loads(path.read_text())["metrics"] == result["metrics"]
