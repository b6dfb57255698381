"""POPE: is there such a thing in the image? Half of the questions' answers are yes, in each of three settings.

coco/coco_pope_{random,popular,adversarial}.json    {question_id, image, text, label} lines
llava_pope_test.jsonl                               LLaVA's prompts, with the setting as `category`; optional
val2014/IMAGE
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmod_jax.evaluation import parsers
from vmod_jax.evaluation.documents import SUFFIX, Document, Responses, check_ids, constant, field, read_lines
from vmod_jax.evaluation.documents import by_task as by_category

CATEGORIES = ("random", "popular", "adversarial")


def documents(root: Path) -> list[Document]:
    """All questions, category after category, each in the order of its labels. Raises UserError for files that lack."""
    recorded = root / "llava_pope_test.jsonl"
    asked = {}
    for number, row in enumerate(read_lines(recorded) if recorded.is_file() else [], 1):
        where = f"{recorded}: line {number}"
        key = (field(row, "category", where), field(row, "image", where), field(row, "text", where).split("\n")[0])
        asked[key] = (field(row, "question_id", where), row["text"])
    found = []
    for category in CATEGORIES:
        path = root / "coco" / f"coco_pope_{category}.json"
        for number, row in enumerate(read_lines(path), 1):
            image, text, label = (field(row, key, f"{path}: line {number}") for key in ("image", "text", "label"))
            question_id, prompt = asked.get((category, image, text), (len(found), text + SUFFIX))
            found.append(
                Document(
                    f"{category}/{row.get('question_id', number)}", image, prompt, label, category,
                    images=(root / "val2014" / image,), extra={"question_id": question_id},
                )
            )  # fmt: skip
    return check_ids(found, root / "coco")


def official(documents: Sequence[Document], responses: Responses) -> dict[str, Any]:
    """{category: {samples, TP, FP, TN, FN, accuracy, precision, recall, f1, yes_ratio}, f1: their mean}, shares of 1.

    A category's answers, in the order of the results file, are paired with its labels line by line: another order gives
    another score, and one that is missing shifts all others. What is not no counts as yes, so that empty answers get an
    F1 of 2/3. A quotient by zero, at which the public scorer stops, is None here.
    """
    category_of = {document.id: document.task for document in documents}
    found = {}
    for category, own in by_category(documents).items():
        said = [parsers.pope(text or "") for key, text in responses.items() if category_of.get(key) == category]
        found[category] = _counts(said, [document.gold for document in own])
    f1 = [scores["f1"] for scores in found.values()]
    return found | {"f1": None if None in f1 or not f1 else sum(f1) / len(f1)}


def strict(documents: Sequence[Document], responses: Responses) -> dict[str, dict[str, float]]:
    """{category: {accuracy, unparsed}}, shares of 1, answers joined to labels by their question."""
    return {
        category: {
            "accuracy": sum(right(one, responses.get(one.id)) is True for one in own) / len(own),
            "unparsed": sum(right(one, responses.get(one.id)) is None for one in own) / len(own),
        }
        for category, own in by_category(documents).items()
    }


def right(document: Document, response: str | None) -> bool | None:
    """Whether the response is the label; None where it is neither yes nor no."""
    said = parsers.yes_no(response)
    return None if said is None else said == document.gold


def constants(documents: Sequence[Document]) -> dict[str, Responses]:
    """Always yes, always no, always nothing."""
    return {name: constant(documents, text) for name, text in (("yes", "yes"), ("no", "no"), ("empty", ""))}


def _counts(said: Sequence[str | None], labels: Sequence[str]) -> dict[str, Any]:
    pairs = [(answer == "yes", label != "no") for answer, label in zip(said, labels, strict=False)]
    tp, fp, tn, fn = (pairs.count(pair) for pair in ((True, True), (True, False), (False, False), (False, True)))
    share = lambda part, whole: part / whole if whole else None  # noqa: E731
    precision, recall = share(tp, tp + fp), share(tp, tp + fn)
    both = None if precision is None or recall is None else precision + recall
    return {
        "samples": len(said),
        **{"TP": tp, "FP": fp, "TN": tn, "FN": fn},
        "accuracy": share(tp + tn, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": share(2 * (precision or 0) * (recall or 0), both),
        "yes_ratio": share(said.count("yes"), len(said)),
    }
