"""POPE, MME, ScienceQA, TextVQA and GQA: what the public scorers say, defects included, and what is so."""

import json

import pytest

from vmod_jax.evaluation import gqa, mme, pope, scienceqa, textvqa
from vmod_jax.evaluation.documents import read_llava, write_llava


@pytest.fixture(scope="module")
def folder(goldens):
    if not (goldens / "benchmarks").is_dir():
        pytest.skip("no goldens of benchmarks")
    return goldens / "benchmarks"


@pytest.fixture(scope="module")
def expected(folder):
    return json.loads((folder / "expected.json").read_text())


@pytest.mark.goldens
def test_pope_is_the_references(folder, expected):
    documents = pope.documents(folder / "pope")
    for name, golden in expected["pope"].items():
        responses = read_llava(folder / "pope" / f"{name}.jsonl", documents)
        official = pope.official(documents, responses)
        assert official["f1"] == pytest.approx(sum(official[c]["f1"] for c in pope.CATEGORIES) / 3)
        for category, scores in golden["official"].items():
            assert official[category] == pytest.approx(scores, abs=1e-9), (name, category)
        strict = pope.strict(documents, responses)
        assert set(strict) == set(golden["strict"])
        for category, scores in golden["strict"].items():
            assert strict[category] == pytest.approx(scores, abs=1e-9), (name, category)


@pytest.mark.goldens
def test_pope_of_constants(folder):
    """Saying nothing gets two thirds by the public scorer, and nothing by ours; all no divides by zero there."""
    documents = pope.documents(folder / "pope")
    always = pope.constants(documents)
    assert pope.official(documents, always["empty"])["f1"] == pytest.approx(2 / 3)
    assert all(scores["accuracy"] == 0 for scores in pope.strict(documents, always["empty"]).values())
    assert pope.official(documents, always["no"])["f1"] is None


@pytest.mark.goldens
def test_mme_is_the_references(folder, expected):
    documents, golden = mme.documents(folder / "mme"), expected["mme"]
    responses = read_llava(folder / "mme" / "answers.jsonl", documents)
    assert len(responses) == len((folder / "mme" / "answers.jsonl").read_text().splitlines())
    for kind, scores in golden["official"].items():
        official = mme.official(documents, responses)[kind]
        assert official["total"] == pytest.approx(scores["total"], abs=1e-9)
        assert set(official["tasks"]) == set(scores["tasks"])
        for task, values in scores["tasks"].items():
            assert official["tasks"][task] == pytest.approx(values, abs=1e-9), task
        strict = mme.strict(documents, responses)[kind]
        assert strict["total"] == pytest.approx(golden["strict"][kind]["total"], abs=1e-9)
        assert strict["tasks"] == pytest.approx(golden["strict"][kind]["tasks"], abs=1e-9)
    constant = golden["constant"]["yes"]
    yes = mme.official(documents, mme.constants(documents)["yes"])
    assert (yes["Perception"]["total"], yes["Cognition"]["total"]) == (constant["perception"], constant["cognition"])
    for kind in yes.values():
        for task in kind["tasks"].values():
            assert (100 * task["acc"], 100 * task["acc_plus"]) == (constant["acc"], constant["acc_plus"])
            assert task["score"] == constant["task_score"]


@pytest.mark.goldens
def test_mme_without_llavas_file(folder, tmp_path):
    """The benchmark's own folders are enough, in both of their layouts."""
    (tmp_path / "MME_Benchmark_release_version").symlink_to(folder / "mme" / "MME_Benchmark_release_version")
    own, recorded = mme.documents(tmp_path), mme.documents(folder / "mme")
    assert {(d.id, d.gold, d.prompt) for d in own} == {(d.id, d.gold, d.prompt) for d in recorded}


@pytest.mark.goldens
def test_scienceqa_is_the_references(folder, expected):
    documents, golden = scienceqa.documents(folder / "scienceqa"), expected["scienceqa"]
    responses = read_llava(folder / "scienceqa" / "answers.jsonl", documents)
    official, strict = scienceqa.official(documents, responses), scienceqa.strict(documents, responses)
    rounded = {key: round(value, 2) if "accuracy" in key else value for key, value in official.items()}
    assert rounded == golden["official"]
    assert strict["parsed"] == golden["strict"].pop("parsed")
    assert {key: strict[key] for key in golden["strict"]} == pytest.approx(golden["strict"], abs=1e-9)
    always = scienceqa.strict(documents, scienceqa.constants(documents)["A"])
    assert {key: always[key] for key in golden["constant_A"]} == pytest.approx(golden["constant_A"], abs=1e-9)
    # LLaVA's prompts can be written from the data set's own files.
    recorded = json.loads((folder / "scienceqa" / "answers.jsonl").read_text().splitlines()[0])
    assert next(d for d in documents if d.id == recorded["question_id"]).prompt == recorded["prompt"]


@pytest.mark.goldens
def test_scienceqa_without_llavas_file(folder, tmp_path):
    for name in ("problems.json", "pid_splits.json"):
        (tmp_path / name).symlink_to(folder / "scienceqa" / name)
    own, recorded = scienceqa.documents(tmp_path), scienceqa.documents(folder / "scienceqa")
    assert [(d.id, d.prompt, d.extra["shows"]) for d in own] == [(d.id, d.prompt, d.extra["shows"]) for d in recorded]


@pytest.mark.goldens
def test_textvqa_is_the_references(folder, expected):
    documents, golden = textvqa.documents(folder / "textvqa"), expected["textvqa"]
    responses = read_llava(folder / "textvqa" / "answers.jsonl", documents)
    official = textvqa.official(documents, responses)
    assert round(official["accuracy"], 2) == golden["official"]["accuracy"]
    assert official["per_question"] == pytest.approx(golden["official"]["per_question"], abs=1e-9)
    always = textvqa.official(documents, textvqa.constants(documents)["unanswerable"])
    assert always["accuracy"] == pytest.approx(golden["constant_unanswerable"], abs=1e-9)


@pytest.mark.goldens
def test_gqa_is_the_references(folder, expected):
    documents, golden = gqa.documents(folder / "gqa"), expected["gqa"]
    responses = read_llava(folder / "gqa" / "answers.jsonl", documents)
    assert gqa.predictions(responses) == golden["predictions"]
    official = gqa.official(documents, responses)
    structural = {task: [round(share, 2), count] for task, (share, count) in official.pop("structural").items()}
    assert structural == golden["official"].pop("structural")
    assert {key: round(value, 2) for key, value in official.items()} == golden["official"]
    assert sum(count for _, count in structural.values()) == golden["balanced"]
    always = gqa.constants(documents)
    for name, share in golden["constant"].items():
        assert gqa.strict(documents, always[name])["accuracy"] == pytest.approx(share, abs=1e-9)
    missing = dict(list(responses.items())[1:])
    assert "accuracy" not in gqa.official(documents, missing)


@pytest.mark.goldens
@pytest.mark.parametrize(("name", "family"), [("pope", pope), ("mme", mme), ("scienceqa", scienceqa), ("gqa", gqa)])
def test_answers_are_written_as_they_are_read_and_their_order_moves_no_strict_score(folder, tmp_path, name, family):
    documents = family.documents(folder / name)
    responses = read_llava(folder / name / "answers.jsonl", documents)
    write_llava(tmp_path / "answers.jsonl", documents, responses)
    assert read_llava(tmp_path / "answers.jsonl", documents) == responses
    backwards = dict(reversed(responses.items()))
    assert family.strict(documents, backwards) == family.strict(documents, responses)
