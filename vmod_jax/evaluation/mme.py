"""MME: two questions about each image, one to be answered yes, one no, in 14 tasks.

MME_Benchmark_release_version/TASK/NNNN.{txt,png,jpg}, or TASK/questions_answers_YN/NNNN.txt and TASK/images/NNNN.*
llava_mme.jsonl    LLaVA's prompts and their order; optional
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmod_jax.errors import UserError
from vmod_jax.evaluation import parsers
from vmod_jax.evaluation.documents import SUFFIX, Document, Responses, by_task, check_ids, constant, field, read_lines

ASKS = "Please answer yes or no."
KINDS = {
    "Perception": (
        *("existence", "count", "position", "color", "posters"),
        *("celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}


def documents(root: Path) -> list[Document]:
    """All questions, in LLaVA's order where its file is there, else by task and image."""
    folder = root / "MME_Benchmark_release_version"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check --root")
    labels = {}  # (task/image's stem, question) -> (label, number of the question)
    images = {}
    for task in [task for tasks in KINDS.values() for task in tasks]:
        for path in sorted({*(folder / task).glob("*.txt"), *(folder / task / "questions_answers_YN").glob("*.txt")}):
            stem = f"{task}/{path.stem}"
            images[stem] = _image(path)
            for number, line in enumerate(filter(None, path.read_text(encoding="utf-8").splitlines())):
                question, tab, label = line.rpartition("\t")
                if not tab or label.strip().lower() not in ("yes", "no"):
                    raise UserError(f"{path}: line {number + 1} is not 'question<tab>Yes' or 'question<tab>No'")
                labels[stem, _bare(question)] = (label.strip().lower(), number)
    asked = _recorded(root / "llava_mme.jsonl") or [(stem, question, question + SUFFIX) for stem, question in labels]
    found = []
    for stem, question, prompt in asked:
        if (stem, question) not in labels:
            raise UserError(f"{root / 'llava_mme.jsonl'}: {stem} has no label for {question!r}")
        label, number = labels[stem, question]
        extra = {"question_id": f"{stem}.png"}
        found.append(
            Document(f"{stem}/{number}", stem, prompt, label, stem.split("/")[0], (images[stem],), extra=extra)
        )
    return check_ids(found, folder)


def official(documents: Sequence[Document], responses: Responses) -> dict[str, Any]:
    """{kind: {total, tasks: {task: {score, acc, acc_plus, other}}}}: score = 100 (acc + acc_plus), of shares.

    acc_plus counts *consecutive pairs* of a task's answers, so that one that is missing pairs different images. `other`
    is neither yes nor no by the first four characters. (A line break or a tab in an answer breaks the public file; here
    such an answer is read as it is.)
    """
    order = {document.id: document for document in documents}
    answered = [order[key] for key in responses if key in order]

    def judged(own: Sequence[Document]) -> tuple[list[bool], int]:
        said = [(parsers.mme(responses[one.id] or ""), one.gold) for one in own]
        return [answer == gold for answer, gold in said], sum(answer == "other" for answer, _ in said)

    def score(own: Sequence[Document]) -> dict[str, float]:
        correct, other = judged(own)
        pairs = [all(correct[i : i + 2]) for i in range(0, len(correct), 2)]
        acc, plus = sum(correct) / len(correct), sum(pairs) / len(pairs)
        return {"score": 100 * (acc + plus), "acc": acc, "acc_plus": plus, "other": other}

    tasks = {task: score(own) for task, own in by_task(answered).items()}
    return _kinds(tasks, lambda scores: scores["score"])


def strict(documents: Sequence[Document], responses: Responses) -> dict[str, Any]:
    """{kind: {total, tasks: {task: score}}}, pairs by image."""

    def score(own: Sequence[Document]) -> float:
        by_image: dict[str, list[bool]] = {}
        for one in own:
            by_image.setdefault(one.group, []).append(right(one, responses.get(one.id)) is True)
        correct = [value for values in by_image.values() for value in values]
        return 100 * (sum(correct) / len(correct) + sum(map(all, by_image.values())) / len(by_image))

    return _kinds({task: score(own) for task, own in by_task(documents).items()}, float)


def right(document: Document, response: str | None) -> bool | None:
    """Whether the response is the label; None where it is neither yes nor no."""
    said = parsers.yes_no(response)
    return None if said is None else said == document.gold


def constants(documents: Sequence[Document]) -> dict[str, Responses]:
    """Always yes, always no, always nothing."""
    return {name: constant(documents, text) for name, text in (("yes", "Yes"), ("no", "No"), ("empty", ""))}


def _kinds(tasks: dict[str, Any], value) -> dict[str, Any]:
    found = {}
    for kind, names in KINDS.items():
        own = {task: tasks[task] for task in names if task in tasks}
        found[kind] = {"total": float(sum(map(value, own.values()))), "tasks": own}
    return found


def _bare(question: str) -> str:
    """The question without what it asks for, which has one or two blanks before it."""
    return question.strip().removesuffix(ASKS).rstrip()


def _recorded(path: Path) -> list[tuple[str, str, str]]:
    """(task/image's stem, question, prompt) of each of LLaVA's lines; none where there is no such file."""
    rows = read_lines(path) if path.is_file() else []
    found = []
    for number, row in enumerate(rows, 1):
        question_id, text = (field(row, key, f"{path}: line {number}") for key in ("question_id", "text"))
        found.append((question_id.rpartition(".")[0], text.removesuffix(SUFFIX).rstrip(), text))
    return found


def _image(path: Path) -> Path:
    """The image that a file of questions is about: beside it, or in images/; whether it is there is not asked here."""
    folder = path.parent.parent / "images" if path.parent.name == "questions_answers_YN" else path.parent
    there = [folder / f"{path.stem}{ending}" for ending in (".png", ".jpg", ".jpeg")]
    return next((image for image in there if image.is_file()), there[0])
