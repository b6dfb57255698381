"""MSVD-QA, MSRVTT-QA and ActivityNet-QA: short questions about short videos, whose answers are a word or two.

    test_q.json [{video_name, question, question_id}] and test_a.json [{answer, question_id, type?}]  (ActivityNet-QA)
    test_qa.json [{id, video_id, question, answer}]                                                   (the other two)
    videos/                                                                                           or beside them

Published figures of video language models on these are a judge's (`judge.py`), which no other judge reproduces.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmod_jax.evaluation.documents import Document, Responses, by_task, constant, field, percent, read_json, read_lines
from vmod_jax.evaluation.documents import check_ids as checked
from vmod_jax.evaluation.parsers import fold, vqa_normalise

# ActivityNet-QA's `type`
TYPES = ("motion", "spatial", "temporal", "yes/no", "colour", "object", "location", "number", "other")
ASKS = " Answer the question using a single word or phrase."
ENDINGS = (".mp4", ".mkv", ".webm", ".avi")


def documents(root: Path, split: str = "test") -> list[Document]:
    """The questions of a split, in both of the shapes in which the three are shipped."""
    pairs = root / f"{split}_qa.json"
    if pairs.is_file():
        rows, answers, path = read_json(pairs), {}, pairs
    else:
        path, answered = root / f"{split}_q.json", root / f"{split}_a.json"
        rows = read_json(path)
        answers = {field(row, "question_id", f"{answered}"): row for row in read_json(answered)}
    found = []
    for number, row in enumerate(rows):
        where = f"{path}: record {number}"
        key = field(row, "id" if pairs.is_file() else "question_id", where)
        record = row if pairs.is_file() else field(answers, key, f"{root / f'{split}_a.json'}")
        name = str(row["video_name"] if "video_name" in row else f"video{field(row, 'video_id', where)}")
        kind, text = record.get("type"), field(row, "question", where)
        found.append(
            Document(
                str(key), name, prompt(text), str(field(record, "answer", where)),
                TYPES[int(kind)] if kind is not None else "", video=find_video(root, name),
                extra={"question": text},
            )
        )  # fmt: skip
    return checked(found, path)


def prompt(question: str) -> str:
    """The question as a sentence, and how to answer it."""
    return question[:1].upper() + question[1:].rstrip("?") + "?" + ASKS


def find_video(root: Path, name: str) -> Path:
    """The file of a video: NAME, v_NAME or vidN, under the root or its videos/; whether it is there is not asked."""
    names = [name, f"v_{name}", name.replace("video", "vid", 1)]
    there = [folder / f"{one}{ending}" for folder in (root / "videos", root) for one in names for ending in ENDINGS]
    return next((path for path in there if path.is_file()), there[0])


# --- scores -----------------------------------------------------------------------------------------------------------


def exact(document: Document, response: str | None) -> bool:
    """The very answer, but for case and full stops."""
    return (response or "").strip().lower().rstrip(".") == document.gold.strip().lower().rstrip(".")


def normalised(document: Document, response: str | None) -> bool | None:
    """The same answer as the VQA evaluation compares them; None where nothing is said."""
    return vqa_normalise(response or "") == vqa_normalise(document.gold) if fold(response or "") else None


def holds(document: Document, response: str | None) -> bool:
    """The answer's words anywhere in the response: generous, nothing to rank by."""
    return f" {vqa_normalise(document.gold)} " in f" {vqa_normalise(response or '')} "


def official(documents: Sequence[Document], responses: Responses) -> dict[str, float]:
    """{exact} in percent: ActivityNet-QA's own scorer asks for equality. A sentence around the answer is wrong."""
    return {"exact": percent(exact(one, responses.get(one.id)) for one in documents)}


def strict(documents: Sequence[Document], responses: Responses) -> dict[str, Any]:
    """{exact, normalised, contains, unparsed, types: {type: normalised}} in percent of all questions."""
    judged = {one.id: normalised(one, responses.get(one.id)) for one in documents}
    types = {kind: percent(judged[one.id] for one in own) for kind, own in by_task(documents).items() if kind}
    return {
        **official(documents, responses),
        "normalised": percent(judged.values()),
        "contains": percent(holds(one, responses.get(one.id)) for one in documents),
        "unparsed": percent(value is None for value in judged.values()),
        **({"types": types} if types else {}),
    }


right = normalised


def most_frequent(documents: Sequence[Document]) -> str:
    """The most frequent answer; of equally many the smallest string."""
    answers = Counter(one.gold for one in documents)
    return min(answers, key=lambda answer: (-answers[answer], answer), default="")


def constants(documents: Sequence[Document], train: Sequence[Document] = ()) -> dict[str, Responses]:
    """Yes, no, nothing, and the most frequent answer of the training split or, named so, of these questions."""
    fixed = {name or "empty": constant(documents, name) for name in ("yes", "no", "")}
    best = most_frequent(train or documents)
    return {**fixed, ("most frequent" if train else "oracle") + f": {best}": constant(documents, best)}


# --- files of answers -------------------------------------------------------------------------------------------------


def read(path: Path, documents: Sequence[Document]) -> dict[str, str]:
    """{id, pred} lines, as Video-ChatGPT's judge reads them."""
    known = {one.id for one in documents}
    rows = {str(field(row, "id", f"{path}")): field(row, "pred", f"{path}") for row in read_lines(path)}
    return {key: text for key, text in rows.items() if key in known}


def write(path: Path, documents: Sequence[Document], responses: Responses) -> None:
    """{id, question, answer, pred} lines."""
    rows = (
        {"id": one.id, "question": one.extra["question"], "answer": one.gold, "pred": responses[one.id] or ""}
        for one in documents
        if one.id in responses
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
