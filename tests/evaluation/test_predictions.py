"""The file of predictions: killed and run again it ends the same, and what does not fit is refused."""

import json

import pytest

from vmod_jax.errors import UserError
from vmod_jax.evaluation.documents import Document
from vmod_jax.evaluation.predictions import batches, predict

DOCUMENTS = [Document(f"d{i}", f"g{i // 3}", "", i) for i in range(10)]
HEADER = {"format": 1, "model": "m"}


class Killed(Exception):
    pass


def respond(after=None, seen=None):
    """Says the place of the document in its batch; dies after so many batches."""
    calls = []

    def batch(documents):
        if after is not None and len(calls) == after:
            raise Killed
        calls.append(documents)
        if seen is not None:
            seen.extend(document.id for document in documents)
        return [{"said": f"{document.id} {place}"} for place, document in enumerate(documents)]

    return batch


def run(path, *arguments, header=HEADER, final=False, documents=DOCUMENTS):
    return predict(path, header, documents, respond(*arguments), 4, final)


@pytest.fixture
def whole(tmp_path):
    run(tmp_path / "whole.jsonl")
    return (tmp_path / "whole.jsonl").read_bytes()


def test_groups_are_not_cut_where_they_fit():
    assert [[d.id for d in batch] for batch in batches(DOCUMENTS, 4)] == [
        ["d0", "d1", "d2"], ["d3", "d4", "d5"], ["d6", "d7", "d8", "d9"]]  # fmt: skip
    assert [len(batch) for batch in batches(DOCUMENTS, 2)] == [2, 1, 2, 1, 2, 2]
    assert [d for batch in batches(DOCUMENTS, 7) for d in batch] == DOCUMENTS


@pytest.mark.parametrize("cut", [0, 1, 20, 60, 100, 150, 250, 400, -1, -5])
def test_killed_anywhere_it_ends_the_same(tmp_path, whole, cut):
    """Cut at any byte: in the header, in a line, in the middle of a batch."""
    path = tmp_path / "killed.jsonl"
    path.write_bytes(whole[:cut])
    responses = run(path)
    assert path.read_bytes() == whole
    assert [*responses] == [document.id for document in DOCUMENTS]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_killed_between_batches(tmp_path, whole, after):
    path = tmp_path / "killed.jsonl"
    with pytest.raises(Killed):
        run(path, after)
    seen = []
    run(path, None, seen)
    assert path.read_bytes() == whole
    assert len(seen) == 10 - 3 * after


def test_what_is_there_is_not_answered_again(tmp_path):
    path, seen = tmp_path / "a.jsonl", []
    first = run(path)
    assert run(path, None, seen) == first
    assert seen == []


def test_files_of_another_run(tmp_path):
    path = tmp_path / "a.jsonl"
    run(path)
    with pytest.raises(UserError, match="unfinished run of another model"):
        run(path, header={**HEADER, "model": "other"})
    run(path, header={**HEADER, "model": "other"}, final=True)
    assert json.loads(path.read_text().splitlines()[0])["model"] == "other"
    with pytest.raises(UserError, match="predictions for other documents"):
        run(path, header={**HEADER, "model": "other"}, documents=DOCUMENTS[1:])
    path.write_text("no json\n")
    with pytest.raises(UserError, match="not a file of predictions"):
        run(path)
