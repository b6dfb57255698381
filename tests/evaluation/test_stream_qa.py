"""OVO-Bench and StreamingBench."""

import json
import random

import pytest

from vmod_jax.errors import UserError
from vmod_jax.evaluation import ovobench, streamingbench


@pytest.fixture(scope="module")
def folder(goldens):
    if not (goldens / "benchmarks").is_dir():
        pytest.skip("no goldens of benchmarks")
    return goldens / "benchmarks"


@pytest.fixture(scope="module")
def expected(folder):
    return json.loads((folder / "expected.json").read_text())


def rounded(scores, digits=2):
    return {name: None if value is None else round(value, digits) for name, value in scores.items()}


# --- OVO-Bench --------------------------------------------------------------------------------------------------------


@pytest.mark.goldens
def test_ovobench_is_the_references(folder, expected, tmp_path):
    root, golden = folder / "ovobench", expected["ovobench"]
    documents = ovobench.documents(root)
    (model,) = (root / "results").iterdir()
    responses = ovobench.read(model, documents)
    assert rounded(ovobench.official(documents, responses)) == golden["official"]
    assert ovobench.strict(documents, responses) == pytest.approx(golden["strict"], abs=1e-9)
    always = ovobench.constants(documents)
    assert set(always) == set(golden["constants"])
    for name, scores in golden["constants"].items():
        assert rounded(ovobench.official(documents, always[name])) == scores["official"], name
        assert ovobench.strict(documents, always[name]) == pytest.approx(
            ovobench.strict(documents, always[name]) | scores["strict"], abs=1e-9
        ), name
    ovobench.write(tmp_path / "results.json", documents, responses, root)
    assert ovobench.read(tmp_path / "results.json", documents) == responses


@pytest.mark.goldens
def test_who_says_assistant_gets_the_share_of_gold_a(folder):
    """What VideoLLM-online's adapter got there: exactly the share of A in every task, and nothing that parses."""
    documents = ovobench.documents(folder / "ovobench")
    said = ovobench.constants(documents)["assistant_prefix"]
    official, strict = ovobench.official(documents, said), ovobench.strict(documents, said)
    for task in (*ovobench.MODES["backward"], *ovobench.MODES["realtime"]):
        own = [one for one in documents if one.task == task]
        assert official[task] == pytest.approx(100 * sum(one.gold == "A" for one in own) / len(own))
    assert (strict["total"], strict["unparsed"]) == (0.0, 100.0)
    # "A. Assistant" does name an option.
    plain = ovobench.strict(documents, {one.id: "A. Assistant" for one in documents})
    assert [plain[task] for task in ovobench.MODES["realtime"]] == [official[t] for t in ovobench.MODES["realtime"]]
    assert plain["forward"] == 0.0


@pytest.mark.goldens
def test_options_in_another_order_and_records_in_another_order(folder, tmp_path):
    """Permuting options with their gold moves no strict score of one who knows; nor does the order of records."""
    records = json.loads((folder / "ovobench" / "ovo_bench_new.json").read_text())
    rng = random.Random(0)
    for record in records:
        if "options" in record:
            record["options"] = rng.sample(record["options"], len(record["options"]))
            record["gt"] = record["options"].index(record["answer"])
    rng.shuffle(records)
    (tmp_path / "ovo_bench_new.json").write_text(json.dumps(records))
    documents = ovobench.documents(tmp_path)
    oracle = {one.id: str(one.gold) for one in documents}
    strict = ovobench.strict(documents, oracle)
    assert (strict["total"], strict["unparsed"]) == (100.0, 0.0)


@pytest.mark.goldens
def test_an_empty_mode_has_no_total_and_prompts_are_the_authors(folder, tmp_path):
    documents = ovobench.documents(folder / "ovobench")
    some = {one.id: "A" for one in documents if one.task != "REC" and ovobench.MODE_OF[one.task] != "forward"}
    official = ovobench.official(documents, some)
    assert (official["forward"], official["total"]) == (None, None)
    (tmp_path / "ovo_bench_new.json").symlink_to(folder / "ovobench" / "ovo_bench_new.json")
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "constant.py").write_text(
        'raise SystemExit("run")\nBR_PROMPT_TEMPLATE = "Q {} of {}"\nREC_PROMPT_TEMPLATE = """How often {}?"""\nX = 3\n'
    )
    theirs = {one.task: one.prompt for one in ovobench.documents(tmp_path)}
    assert theirs["EPM"].startswith("Q What happened")
    assert theirs["REC"].startswith("How often ")
    assert theirs["SSR"] == {one.task: one.prompt for one in documents}["SSR"]
    (tmp_path / "utils" / "constant.py").write_text('BR_PROMPT_TEMPLATE = "{question}"\n')
    with pytest.raises(UserError, match=r"constant\.py"):
        ovobench.documents(tmp_path)


# --- StreamingBench ---------------------------------------------------------------------------------------------------


@pytest.mark.goldens
@pytest.mark.parametrize("part", ["real", "sqa"])
def test_streamingbench_is_the_references(folder, expected, tmp_path, part):
    path, golden = folder / "streamingbench" / f"questions_{part}.json", expected["streamingbench"][part]
    documents = streamingbench.documents(folder / "streamingbench", part)
    responses = streamingbench.read(path, documents)
    official = streamingbench.official(documents, responses, part)
    assert set(official) == set(golden["official"])
    for task, scores in golden["official"].items():
        assert official[task] == pytest.approx(scores, abs=1e-9), task
    strict = streamingbench.strict(documents, responses)
    assert strict["accuracy"] == pytest.approx(golden["strict"]["accuracy"], abs=1e-9)
    assert strict["tasks"] == pytest.approx(golden["strict"]["tasks"], abs=1e-9)
    always = streamingbench.constants(documents)
    for letter, share in golden["strict"]["constant"].items():
        assert streamingbench.strict(documents, always[letter])["accuracy"] == pytest.approx(share, abs=1e-9)
    streamingbench.write(tmp_path / "out.json", path, responses, "other")
    assert streamingbench.read(tmp_path / "out.json", documents, "other") == responses


@pytest.mark.goldens
def test_streamingbenchs_proactive_output_is_the_references(folder, expected):
    golden = expected["streamingbench"]["proactive"]
    documents = streamingbench.documents(folder / "streamingbench", "proactive")
    responses = streamingbench.read(folder / "streamingbench" / "questions_proactive.json", documents)
    official = streamingbench.proactive_official(documents, responses)
    assert set(official) == set(golden["official"])
    for task, scores in golden["official"].items():
        assert official[task] == pytest.approx(scores, abs=1e-9)
    strict = streamingbench.proactive_strict(documents, responses)
    best = golden["strict"].pop("best_constant_delay")
    assert strict == pytest.approx(golden["strict"], abs=1e-9)
    assert streamingbench.best_constant_delay(documents) == pytest.approx(best, abs=1e-9)


@pytest.mark.goldens
def test_ovobenchs_defect_is_not_streamingbenchs(folder):
    documents = streamingbench.documents(folder / "streamingbench", "real")
    prefix = {one.id: "(Video Time = 9.5s) Assistant: A" for one in documents}
    assert streamingbench.official(documents, prefix)["total"]["accuracy"] == 0
    assert streamingbench.strict(documents, prefix)["unparsed"] == 100


def test_later_questions_hold_the_earlier_ones_with_their_answers(tmp_path):
    def clip(question, options=("one", "two")):
        asked = {
            "task_type": "SQA",
            "question": question,
            "time_stamp": "00:01:02",
            "answer": "B",
            "options": [*options],
        }
        return {"time": "", "questions": [asked], "video_path": "./videos/sample_0_sqa.mp4"}

    (tmp_path / "questions_sqa.json").write_text(json.dumps([[clip("First?"), clip("Second?")], [clip("Other?")]]))
    first, second, other = streamingbench.documents(tmp_path, "sqa")
    assert (first.ask, first.options) == (62.0, ("A. one", "B. two"))
    assert "First?" in second.prompt
    assert "Answer: B;" in second.prompt
    assert second.prompt.endswith("Question: Second?\nOptions:\nA. one\nB. two\nThe best option is:")
    assert "First?" not in other.prompt
    (tmp_path / "questions_sqa.json").write_text(json.dumps([[clip("First?", ["one"])]]))
    with pytest.raises(UserError, match="has 1 options: 2 to 26 are needed"):
        streamingbench.documents(tmp_path, "sqa")
    (tmp_path / "questions_sqa.json").write_text("[{")
    with pytest.raises(UserError, match="is not JSON"):
        streamingbench.documents(tmp_path, "sqa")
