"""GQA: open and yes/no questions about real images, with the balanced ones of the test-dev split scored.

testdev_balanced_questions.json      {id: {question, answer, imageId, isBalanced, groups, types, ...}}
llava_gqa_testdev_balanced.jsonl     LLaVA's prompts; optional
images/IMAGE.jpg
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmod_jax.evaluation.documents import (
    SUFFIX,
    Document,
    Responses,
    accuracy,
    by_task,
    constant,
    field,
    percent,
    read_json,
    read_lines,
    unparsed,
)
from vmod_jax.evaluation.parsers import fold


def documents(root: Path) -> list[Document]:
    """All questions of the file, those too that are not balanced and enter no score; task: the structural type."""
    path, recorded = root / "testdev_balanced_questions.json", root / "llava_gqa_testdev_balanced.jsonl"
    rows = read_lines(recorded) if recorded.is_file() else []
    asked = {str(field(row, "question_id", f"{recorded}")): field(row, "text", f"{recorded}") for row in rows}
    found = []
    for key, record in read_json(path).items():
        where = f"{path}: question {key}"
        question, answer, image = (field(record, name, where) for name in ("question", "answer", "imageId"))
        structural = field(field(record, "types", where), "structural", where)
        extra = {"balanced": record.get("isBalanced", True), "group": (record.get("groups") or {}).get("global")}
        prompt = asked.get(key, question + SUFFIX)
        found.append(Document(key, image, prompt, answer, structural, (root / "images" / f"{image}.jpg",), extra=extra))
    return found


def predictions(responses: Responses) -> dict[str, str]:
    """What is compared with the answers: the response in lower case without full stops at its end; blanks stay."""
    return {key: (text or "").rstrip(".").lower() for key, text in responses.items()}


def official(documents: Sequence[Document], responses: Responses) -> dict[str, Any]:
    """{accuracy, open, binary, distribution, validity, plausibility, structural: {type: [accuracy, questions]}}.

    Percent, over balanced questions. LLaVA's copy of the scorer leaves validity and plausibility 0 and has no
    consistency: a file that they need is no longer published. A prediction that is missing is refused there; here then
    all that is said is how many are missing.
    """
    own, said = _balanced(documents), predictions(responses)
    if lacking := sum(one.id not in said for one in own):
        return {"missing": lacking}
    correct = {one.id: said[one.id] == one.gold for one in own}
    share = lambda some: percent(correct[one.id] for one in some)  # noqa: E731
    return {
        "accuracy": share(own),
        "open": share([one for one in own if one.task == "query"]),
        "binary": share([one for one in own if one.task != "query"]),
        "validity": 0.0,
        "plausibility": 0.0,
        "distribution": _distribution(own, said),
        "structural": {task: [share(some), len(some)] for task, some in by_task(own).items()},
    }


def strict(documents: Sequence[Document], responses: Responses) -> dict[str, Any]:
    """{accuracy, unparsed, structural: {type: accuracy}}, percent of balanced questions; nothing said is unparsed."""
    own = _balanced(documents)
    by_type = {task: accuracy(some, responses, right) for task, some in by_task(own).items()}
    return {
        "accuracy": accuracy(own, responses, right),
        "unparsed": unparsed(own, responses, right),
        "structural": by_type,
    }


def right(document: Document, response: str | None) -> bool | None:
    """Whether the response is the answer but for case, blanks and full stops; None where nothing is said."""
    said = fold(response or "")
    return said == fold(document.gold) if said else None


def constants(documents: Sequence[Document]) -> dict[str, Responses]:
    """Always yes, always no, always nothing, and always the most frequent answer of these very questions."""
    answers = Counter(one.gold for one in _balanced(documents))
    oracle = min(answers, key=lambda answer: (-answers[answer], answer), default="")
    fixed = {name: constant(documents, name) for name in ("yes", "no")}
    return {**fixed, "empty": constant(documents, ""), f"oracle: {oracle}": constant(documents, oracle)}


def _balanced(documents: Sequence[Document]) -> list[Document]:
    return [one for one in documents if one.extra["balanced"]]


def _distribution(own: Sequence[Document], said: dict[str, str]) -> float:
    """Chi-square of predicted against gold counts of each gold answer, a group's weighted by its questions, / 100."""
    gold: dict[str, Counter] = {}
    predicted: dict[str, Counter] = {}
    for one in own:
        if (group := one.extra["group"]) is not None:
            gold.setdefault(group, Counter())[one.gold] += 1
            predicted.setdefault(group, Counter())[said[one.id]] += 1
    total = sum(counts.total() for counts in gold.values())
    distance = sum(
        counts.total() * sum((predicted[group][answer] - e) ** 2 / e for answer, e in counts.items())
        for group, counts in gold.items()
    )
    return distance / total / 100 if total else 0.0
