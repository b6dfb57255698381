"""What every benchmark of questions shares: a question with what is shown, its files read and written, shares of right.

Responses are a mapping from a document's id to what was said (None: nothing), in the order of the results file: some
public scorers depend on it.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vmod_jax.errors import UserError, parse_json

Responses = Mapping[str, Any]
SUFFIX = "\nAnswer the question using a single word or phrase."


class Document(NamedTuple):
    """One annotated question.

    group: the image or video, which questions share; prompt: the user's whole message; gold: what is right
    span: (start, end) of the video in seconds, None: all of it; ask: seconds into a stream at which the question comes
    extra: what this benchmark's own scorer and files need besides
    """

    id: str
    group: str
    prompt: str
    gold: Any
    task: str = ""
    images: tuple[Path, ...] = ()
    video: Path | None = None
    span: tuple[float, float] | None = None
    ask: float | None = None
    options: tuple[str, ...] = ()
    extra: Mapping[str, Any] = {}


# --- shares -----------------------------------------------------------------------------------------------------------

# (document, response) -> whether it is right; None: it cannot be parsed
Judgement = Callable[[Document, Any], bool | None]


def percent(right: Iterable[Any]) -> float:
    """The share of what is true among them, in percent; 0 of nothing."""
    values = [bool(value) for value in right]
    return 100 * sum(values) / len(values) if values else 0.0


def by_task(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Task -> its documents, both in order of appearance."""
    found: dict[str, list[Document]] = {}
    for document in documents:
        found.setdefault(document.task, []).append(document)
    return found


def accuracy(documents: Sequence[Document], responses: Responses, right: Judgement) -> float:
    """Percent of all documents that are right; what has no response is wrong."""
    return percent(right(document, responses.get(document.id)) for document in documents)


def unparsed(documents: Sequence[Document], responses: Responses, right: Judgement) -> float:
    """Percent of all documents whose response is none, or cannot be parsed."""
    return percent(right(document, responses.get(document.id)) is None for document in documents)


def constant(documents: Sequence[Document], response: Any) -> Responses:
    """The same response to every document."""
    return {document.id: response for document in documents}


# --- files ------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """A JSON file. Raises UserError where there is none, and with the line of what is wrong in it."""
    return parse_json(_text(path), str(path))


def read_lines(path: Path) -> list[dict]:
    """A file of one JSON object a line. Raises UserError naming the line."""
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            found.append(parse_json(line, f"{path}: line {number}"))
            if not isinstance(found[-1], dict):
                raise UserError(f"{path}: line {number} is not an object")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error})") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); vmod downloads no data set: check --root"
        ) from error


def field(record: Any, key: str, where: str) -> Any:
    """record[key]. Raises UserError naming the record and the key where it is not there."""
    if not isinstance(record, dict) or key not in record:
        raise UserError(f"{where} has no '{key}'")
    return record[key]


def letter_index(options: Sequence[str], gold: Any, where: str) -> str:
    """The gold letter, from a letter or an index. Raises UserError for under 2 options, or a label that is not one."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
    if not 2 <= len(options) <= 26:
        raise UserError(f"{where} has {len(options)} options: 2 to 26 are needed")
    if isinstance(gold, str) and len(gold) == 1 and gold in letters:
        return gold
    if isinstance(gold, int) and 0 <= gold < len(options):
        return letters[gold]
    raise UserError(f"{where}: the label {gold!r} is none of its {len(options)} options")


def check_ids(documents: Sequence[Document], path: Path) -> list[Document]:
    """The documents, as they are. Raises UserError where an id comes twice."""
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise UserError(f"{path}: the id {document.id} comes twice")
        seen.add(document.id)
    return list(documents)


# --- LLaVA's answers, which five benchmarks of images share -----------------------------------------------------------


def read_llava(path: Path, documents: Sequence[Document]) -> dict[str, str]:
    """A file of {question_id, prompt, text} lines -> responses in its order, joined by question and prompt.

    Raises UserError for a line that belongs to none of the documents.
    """
    by_id: dict[str, list[Document]] = {}
    for document in documents:
        by_id.setdefault(str(document.extra.get("question_id", document.id)), []).append(document)
    responses = {}
    for number, row in enumerate(read_lines(path), 1):
        where = f"{path}: line {number}"
        found = by_id.get(str(field(row, "question_id", where)), [])
        if len(found) > 1:
            found = [document for document in found if same_prompt(document.prompt, field(row, "prompt", where))]
        if len(found) != 1:
            raise UserError(f"{where}: question {row['question_id']} is not in this benchmark's files")
        responses[found[0].id] = field(row, "text", where)
    return responses


def write_llava(path: Path, documents: Sequence[Document], responses: Responses, model: str = "vmod") -> None:
    """Answers as LLaVA writes them, which the public scorers read."""
    rows = (
        {
            "question_id": document.extra.get("question_id", document.id),
            "prompt": document.extra.get("recorded", document.prompt),
            "text": responses[document.id] or "",
            "answer_id": document.id,
            "model_id": model,
            "metadata": {},
        }
        for document in documents
        if document.id in responses
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def same_prompt(one: str, other: str) -> bool:
    """Whether two prompts ask the same question: their first lines, the place of the image left aside."""
    first = lambda text: text.replace("<image>", "").strip().split("\n")[0]  # noqa: E731
    return one == other or first(one) == first(other)
