"""Scores of steps: the reference's, by hand, and what must hold of any answers."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmod_jax.data.sources import lta
from vmod_jax.evaluation import steps
from vmod_jax.evaluation.documents import Document
from vmod_jax.evaluation.intervals import intervals
from vmod_jax.evaluation.nearest import Nearest, edit_distance


@pytest.fixture(scope="module")
def expected(goldens):
    return json.loads((goldens / "sources" / "expected.json").read_text())


def golds(samples):
    return [[x.rsplit(". ", 1)[-1] for x in s["conversation"][-1]["content"].split("\n")] for s in samples]


@pytest.mark.goldens
@pytest.mark.parametrize("task", ["step", "next", "task", "procedure", "procedure_goal"])
def test_coins_accuracy_is_the_references(expected, task):
    given = expected[f"coin_{task}_score"]
    nearest = Nearest(given["categories"])
    answers = list(zip(golds(expected[f"coin_{task}_test"]), given["predictions"], strict=True))
    if task.startswith("procedure"):
        scores = steps.score_procedures([steps.judge_procedure(gold, said, nearest) for gold, said in answers])
        assert scores["accuracy"] == pytest.approx(given["accuracy"], abs=1e-9)
        assert scores["strict"] <= scores["accuracy"]
    else:
        scores = steps.score_steps([steps.judge_step(gold[0], said, nearest) for gold, said in answers])
        assert scores["nearest"] == pytest.approx(given["accuracy"], abs=1e-9)
        assert scores["exact"] <= scores["nearest"]


@pytest.mark.goldens
def test_anticipation_is_the_references(goldens, expected):
    given, folder = expected["lta_score"], goldens / "sources" / "ego4d" / "v2" / "annotations"
    actions = steps.Actions(lta.taxonomy(folder / "fho_lta_taxonomy.json"))
    rows = [
        steps.judge_anticipation(one["verbs"], one["nouns"], said, actions)
        for one, said in zip(expected["lta_val"], given["predictions"], strict=True)
    ]
    assert [row["verb"] for row in rows] == given["verb_ids"]
    assert [row["noun"] for row in rows] == given["noun_ids"]
    scores = steps.score_anticipation(rows)
    for name in [name for name in given if name.endswith(("AUED", "ED20"))]:
        assert scores[name.lower()] == pytest.approx(given[name], abs=1e-9)


@pytest.mark.goldens
def test_keystep_accuracy_is_the_expected_one(goldens):
    folder = goldens / "benchmarks"
    given = json.loads((folder / "expected.json").read_text())["egoexo4d"]
    names = json.loads((folder / "egoexo4d" / "annotations" / "keystep_val.json").read_text())["vocabulary"].values()
    nearest = Nearest(sorted({steps.plain(name) for name in names}))
    answers = zip(given["val"], given["predictions"], strict=True)
    scores = steps.score_steps([steps.judge_step(one["label"], said, nearest) for one, said in answers])
    assert scores == pytest.approx({"nearest": given["nearest_accuracy"], "exact": given["exact_accuracy"]}, abs=1e-9)


def test_procedures_by_hand():
    nearest = Nearest(["cut", "dry", "wash"])
    judged = steps.judge_procedure(["Wash.", "Dry.", "Cut."], "1. Wash.\n2. cut", nearest)
    assert judged == {"right": 1, "compared": 2, "steps": 3}
    assert steps.judge_procedure(["Wash."], "", nearest)["compared"] == 1
    assert steps.score_procedures([judged]) == pytest.approx({"accuracy": 50, "strict": 100 / 3})
    assert steps.score_procedures([]) == {"accuracy": None, "strict": None}


TEXT = st.text(max_size=8)


@given(st.lists(TEXT, min_size=1, max_size=6), TEXT)
def test_distances_in_numpy_are_those_of_the_plain_loop(texts, text):
    plain = [edit_distance(text, other) for other in texts]
    assert Nearest(texts).distances(text).tolist() == plain
    assert Nearest(texts)(text) == (texts.index(text) if text in texts else int(np.argmin(plain)))


@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abc")))
def test_edit_distance_is_a_distance(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@given(TEXT, TEXT)
def test_no_answer_is_too_odd_to_judge(gold, said):
    nearest = Nearest(sorted({steps.plain(gold), "wash", ""}))
    assert steps.judge_step(gold, gold, nearest)["nearest"]
    steps.judge_step(gold, said, nearest)
    steps.judge_procedure([gold], said, nearest)
    steps.Actions(lta.Taxonomy(["take", "put"], ["cup"]))(said)


def test_the_order_of_candidates_does_not_matter():
    actions = steps.Actions(lta.Taxonomy(["take", "put"], ["cup", "pan"]))
    said = ["1. take cup", "1. put pan\n2. put cup", ""]
    scores = [steps.judge_anticipation([0, 1], [0, 1], order, actions) for order in (said, said[::-1])]
    assert steps.score_anticipation(scores[:1]) == steps.score_anticipation(scores[1:])


# --- intervals --------------------------------------------------------------------------------------------------------


def share(documents):
    return {"right": 100 * np.mean([one.gold for one in documents]), "none": None}


def test_intervals_of_400_questions_half_right():
    documents = [Document(str(i), str(i), "", i % 2) for i in range(400)]
    low, high = intervals(documents, share)["right"]
    assert [50 - low, high - 50] == pytest.approx([4.9, 4.9], abs=0.5)
    assert intervals(documents, share) == intervals(documents, share)
    assert intervals(documents, share)["none"] is None


def test_what_shares_a_video_is_drawn_together():
    alone = [Document(str(i), str(i), "", i % 2) for i in range(40)]
    together = [one._replace(group=str(int(one.id) // 8)) for one in alone]
    wide = [Document(str(i), str(i // 8), "", (i // 8) % 2) for i in range(40)]
    spread = lambda documents: np.ptp(intervals(documents, share)["right"])  # noqa: E731
    assert spread(together) < spread(alone) < spread(wide)
    assert intervals([one._replace(group="x") for one in alone], share)["right"] is None
