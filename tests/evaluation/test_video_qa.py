"""MSVD-QA and its like with their judge, Video-MME, MVBench and EgoSchema."""

import http.server
import json
import threading

import pytest

from vmod_jax.errors import UserError
from vmod_jax.evaluation import egoschema, judge, mvbench, videomme, videoqa
from vmod_jax.evaluation.documents import Document


@pytest.fixture(scope="module")
def folder(goldens):
    if not (goldens / "benchmarks").is_dir():
        pytest.skip("no goldens of benchmarks")
    return goldens / "benchmarks"


@pytest.fixture(scope="module")
def expected(folder):
    return json.loads((folder / "expected.json").read_text())


# --- open answers -----------------------------------------------------------------------------------------------------


@pytest.mark.goldens
def test_open_answers_are_the_references(folder, expected, tmp_path):
    documents, golden = videoqa.documents(folder / "videoqa"), expected["videoqa"]
    responses = videoqa.read(folder / "videoqa" / "predictions.jsonl", documents)
    strict = videoqa.strict(documents, responses)
    names = ("exact", "normalised", "contains")
    assert {name: strict[name] for name in names} == pytest.approx({name: golden[name] for name in names}, abs=1e-9)
    best = golden["most_frequent"]
    assert videoqa.most_frequent(documents) == best["answer"]
    always = videoqa.constants(documents)[f"oracle: {best['answer']}"]
    assert videoqa.strict(documents, always)["normalised"] == pytest.approx(best["normalised"], abs=1e-9)
    videoqa.write(tmp_path / "predictions.jsonl", documents, responses)
    assert videoqa.read(tmp_path / "predictions.jsonl", documents) == responses


def test_both_shapes_of_the_files(tmp_path):
    rows = [{"id": 5, "video_id": 7, "question": "what is it?", "answer": "a dog"}]
    (tmp_path / "test_qa.json").write_text(json.dumps(rows))
    (tmp_path / "vid7.avi").touch()
    (document,) = videoqa.documents(tmp_path)
    assert (document.id, document.group, document.video) == ("5", "video7", tmp_path / "vid7.avi")
    assert document.prompt == "What is it? Answer the question using a single word or phrase."
    assert videoqa.right(document, "Dog.") is True
    assert videoqa.right(document, " ") is None
    (tmp_path / "test_qa.json").write_text(json.dumps([{"id": 5, "video_id": 7, "answer": "x"}]))
    with pytest.raises(UserError, match=r"record 0 has no 'question'"):
        videoqa.documents(tmp_path)


# --- the judge --------------------------------------------------------------------------------------------------------


@pytest.mark.goldens
def test_judges_replies_are_read_as_the_references(folder):
    for case in json.loads((folder / "videoqa" / "judge_replies.json").read_text()):
        assert judge.official(case["reply"]) == case["official"], case["reply"]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("{'pred': 'yes', 'score': 4.8}", (True, 4.8)),
        ('Sure: {"pred": "no", "score": 0}.', (False, 0)),
        ("```{'pred': 'yes', 'score': 4}```", (True, 4)),
        ("{'pred': 'maybe', 'score': 2}", None),
        ("{'pred': 'yes', 'score': 7}", None),
        ("{'pred': 'yes'}", None),
        ("{'pred': ['yes'], 'score': 1}", None),
        ("yes, 4", None),
        ("{" * 5000 + "}", None),
        ("", None),
    ],
)
def test_strictly_a_reply_is_one_object(reply, verdict):
    found = judge.strict(reply)
    assert (found and (found.yes, found.score)) == verdict


@pytest.fixture
def stub():
    """An endpoint on loopback that says what it is told to: (url, replies, requests)."""
    replies, requests = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(
                (self.path, dict(self.headers), json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            )
            reply = replies.pop(0) if replies else None
            self.send_response(200 if reply is not None else 500)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", replies, requests
        server.shutdown()
        thread.join()


def test_a_judges_answers_are_kept_and_never_asked_for_twice(stub, tmp_path, monkeypatch):
    url, replies, requests = stub
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    documents = [Document(str(i), "v", f"what is it {i}?", "a dog") for i in range(4)]
    responses = {"0": "dog", "1": "cat", "2": "", "3": "hound"}
    one, kept = judge.Judge(url, "some-judge"), tmp_path / "judge.jsonl"
    yes, no = '{"pred": "yes", "score": 5}', "{'pred': 'no', 'score': 1}"
    replies += [yes, "hm", no]  # and then nothing: the endpoint fails
    with pytest.raises(UserError, match=r"does not answer.*goes on") as error:
        judge.judge_all(one, documents, responses, kept)
    assert "\n" not in str(error.value)
    assert len(requests) == 4
    replies += ["hm", "hm", "hm", "hm"]
    verdicts = judge.judge_all(one, documents, responses, kept)
    assert len(requests) == 4 + judge.TRIES  # the first two were kept, the third says nothing
    assert [verdicts[str(i)][:2] for i in range(4)] == [(True, 5), (False, 1), (False, 0), (False, 0)]
    assert judge.strict_scores(list(verdicts.values())) == {"accuracy": 25.0, "score": 1.5, "unjudged": 50.0}
    assert judge.judge_all(one, documents, responses, kept) == verdicts
    assert len(requests) == 4 + judge.TRIES
    path, headers, body = requests[0]
    assert (path, headers["Authorization"], body["model"]) == ("/v1/chat/completions", "Bearer a key", "some-judge")
    assert "a key" not in kept.read_text()
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert judge.official_scores(line["reply"] for line in lines) == {"accuracy": 50.0, "score": 3.0}
    assert {"id", "judge", "prompt", "reply", "parsed"} <= lines[0].keys()


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.goldens
def test_videomme_is_the_references(folder, expected, tmp_path):
    documents, golden = videomme.documents(folder / "videomme"), expected["videomme"]
    responses, missing = videomme.read(folder / "videomme" / "results.json", documents)
    assert missing
    official = videomme.official(documents, responses, missing)
    assert set(official) == set(golden["official_skip_missing"])
    for duration, breakdowns in golden["official_skip_missing"].items():
        printed = {
            name: {key: round(value, 1) for key, value in shares.items() if value}
            for name, shares in official[duration].items()
        }
        assert {name: shares for name, shares in printed.items() if shares} == breakdowns, duration
    strict = videomme.strict(documents, responses)
    assert strict == pytest.approx(golden["strict"], abs=1e-9)
    always = videomme.constants(documents)
    for letter, share in golden["constant"].items():
        assert videomme.strict(documents, always[letter])["overall"] == pytest.approx(share, abs=1e-9)
    shown = {key: text for key, text in responses.items() if key.rpartition("-")[0] not in missing}
    videomme.write(tmp_path / "results.json", documents, shown)
    again, marked = videomme.read(tmp_path / "results.json", documents)
    assert marked == missing
    assert videomme.official(documents, again, marked) == official


@pytest.mark.goldens
def test_silence_raises_videommes_official_score_and_not_ours(folder):
    documents = videomme.documents(folder / "videomme")
    half = {one.id: one.gold if i % 2 else "D" if one.gold != "D" else "A" for i, one in enumerate(documents)}
    quiet = {key: text if i % 2 else "" for i, (key, text) in enumerate(half.items())}
    entire = lambda said: videomme.official(documents, said)["entire"]["Overall Performance"]["Overall"]  # noqa: E731
    assert (entire(half), entire(quiet)) == (50.0, 100.0)
    assert videomme.strict(documents, half)["overall"] == videomme.strict(documents, quiet)["overall"] == 50.0


def test_mvbench(tmp_path):
    """Nothing at all is always right by its own scorer; a folder of frames and a span are found."""
    (tmp_path / "json").mkdir()
    (tmp_path / "video" / "star" / "v1").mkdir(parents=True)
    (tmp_path / "video" / "star" / "v0.mp4").touch()
    rows = [
        {
            "video": f"v{i}{'.mp4' * (i == 0)}",
            "question": "What?",
            "candidates": ["one", "two", "three"],
            "answer": "two",
        }
        for i in range(2)
    ]
    (tmp_path / "json" / "some_task.json").write_text(json.dumps([rows[0] | {"start": 1, "end": 2.5}, rows[1]]))
    documents = mvbench.documents(tmp_path)
    assert [one.video for one in documents] == [tmp_path / "video/star/v0.mp4", tmp_path / "video/star/v1"]
    assert (documents[0].span, documents[1].span) == ((1.0, 2.5), None)
    assert documents[0].prompt == "Question: What?\nOptions:\n(A) one\n(B) two\n(C) three\nOnly give the best option."
    always = mvbench.constants(documents)
    assert mvbench.official(documents, always["empty"])["accuracy"] == 100
    assert mvbench.official(documents, always["empty"])["lmms"] == 0
    assert mvbench.strict(documents, always["empty"])["accuracy"] == 0
    assert mvbench.strict(documents, always["B"])["accuracy"] == 100
    (tmp_path / "json" / "some_task.json").write_text(json.dumps([rows[0] | {"answer": "four"}]))
    with pytest.raises(UserError, match="record 0: the answer 'four' is none of its candidates"):
        mvbench.documents(tmp_path)


def test_egoschema(tmp_path):
    options = {f"option {i}": text for i, text in enumerate(("one", "two", "three", "four", "five"))}
    rows = [{"q_uid": key, "question": "Why?"} | options for key in ("a", "b", "c")]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    (tmp_path / "subset_answers.json").write_text(json.dumps({"a": 4, "c": 0}))
    documents = egoschema.documents(tmp_path)
    assert [one.gold for one in documents] == ["E", None, "A"]
    responses = {"a": "five", "b": "B", "c": "who knows"}
    assert egoschema.strict(documents, responses) == {"accuracy": 50.0, "unparsed": 50.0}
    egoschema.write(tmp_path / "server.json", documents, responses)
    assert json.loads((tmp_path / "server.json").read_text()) == {"a": 4, "b": 1, "c": -1}
    (tmp_path / "subset_answers.json").write_text(json.dumps({"a": 5}))
    with pytest.raises(UserError, match="record 0: the label 5 is none of its 5 options"):
        egoschema.documents(tmp_path)
