"""TextVQA: what does the text in the image say? Ten people's answers a question.

    TextVQA_0.5.1_val.json                  {data: [{image_id, question, question_id, answers}]}
    llava_textvqa_val_v051_ocr.jsonl        LLaVA's prompts, with the words that OCR found; optional
    train_images/ID.jpg

The published figures of LLaVA are with the OCR's words in the prompt: they do not compare with answers without them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmod_jax.errors import UserError
from vmod_jax.evaluation.documents import (
    SUFFIX,
    Document,
    Responses,
    check_ids,
    constant,
    field,
    percent,
    read_json,
    read_lines,
)
from vmod_jax.evaluation.parsers import vqa_normalise

OCR_LINE = "Reference OCR token:"


def documents(root: Path) -> list[Document]:
    """All questions, in LLaVA's order where its file is there; `extra` says whether a prompt holds OCR's words."""
    path, recorded = root / "TextVQA_0.5.1_val.json", root / "llava_textvqa_val_v051_ocr.jsonl"
    known = {}
    for number, record in enumerate(field(read_json(path), "data", f"{path}")):
        where = f"{path}: record {number}"
        image, question, answers = (field(record, key, where) for key in ("image_id", "question", "answers"))
        known[image, question.lower()] = (str(record.get("question_id", number)), question, tuple(answers))
    asked = {}
    for number, row in enumerate(read_lines(recorded) if recorded.is_file() else [], 1):
        where = f"{recorded}: line {number}"
        image, text = field(row, "question_id", where), field(row, "text", where)
        if (key := (image, asked_question(text).lower())) not in known:
            raise UserError(f"{where}: the question is not in {path.name}")
        asked[key] = text
    return check_ids(
        [
            Document(
                known[key][0], key[0], asked.get(key, known[key][1] + SUFFIX), known[key][2],
                images=(root / "train_images" / f"{key[0]}.jpg",),
                extra={"question_id": key[0], "ocr": OCR_LINE in asked.get(key, "")},
            )
            for key in [*asked, *(key for key in known if key not in asked)]
        ],
        path,
    )  # fmt: skip


def asked_question(prompt: str) -> str:
    """The question of one of LLaVA's prompts: its first line, or the second where the first is the OCR's."""
    lines = prompt.split("\n")
    return lines[1] if prompt.startswith(OCR_LINE) and len(lines) > 1 else lines[0]


def official(documents: Sequence[Document], responses: Responses) -> dict[str, Any]:
    """{accuracy (percent), per_question: shares, in the order of the results file}, over what was answered."""
    known = {document.id: document for document in documents}
    shares = [agreement(known[key], text) for key, text in responses.items() if key in known]
    return {"accuracy": 100 * sum(shares) / len(shares) if shares else 0.0, "per_question": shares}


def strict(documents: Sequence[Document], responses: Responses) -> dict[str, float]:
    """{accuracy, unparsed} in percent: the same over all annotated questions; nothing said is unparsed."""
    shares = [agreement(one, responses.get(one.id)) for one in documents]
    silent = percent(not (responses.get(one.id) or "").strip() for one in documents)
    return {"accuracy": 100 * sum(shares) / len(documents), "unparsed": silent}


def agreement(document: Document, response: str | None) -> float:
    """Over the ten answers, the mean of min(1, how many of the other nine say the same / 3)."""
    said = vqa_normalise(response or "")
    answers = [vqa_normalise(answer) for answer in document.gold]
    same = answers.count(said)
    return sum(min(1.0, (same - (answer == said)) / 3) for answer in answers) / len(answers)


def constants(documents: Sequence[Document]) -> dict[str, Responses]:
    """What annotators write where nothing can be read, and nothing."""
    return {"unanswerable": constant(documents, "unanswerable"), "empty": constant(documents, "")}
