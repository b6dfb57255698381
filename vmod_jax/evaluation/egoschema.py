"""EgoSchema: one question of five options about each of 5,031 three-minute clips of egocentric video.

questions.json         [{q_uid, question, option 0 ... option 4}]
subset_answers.json    {q_uid: 0-4}, of the 500 whose answers are public; a server scores all
videos/Q_UID.mp4
"""

import json
from collections.abc import Sequence
from pathlib import Path

from vmod_jax.evaluation import parsers
from vmod_jax.evaluation.documents import (
    Document,
    Responses,
    accuracy,
    check_ids,
    constant,
    field,
    letter_index,
    read_json,
    unparsed,
)

ASKS = "Answer with the option's letter from the given choices directly."


def documents(root: Path) -> list[Document]:
    """All questions; `gold` is None for those whose answers only the server knows."""
    path = root / "questions.json"
    public = read_json(root / "subset_answers.json")
    found = []
    for number, row in enumerate(read_json(path)):
        where = f"{path}: record {number}"
        key, question = field(row, "q_uid", where), field(row, "question", where)
        options = [str(row[name]) for name in sorted(row) if name.startswith("option ")]
        gold = letter_index(options, public[key], where) if key in public else None
        lines = [f"{letter}. {text}" for letter, text in zip(parsers.LETTERS, options, strict=False)]
        prompt = "\n".join([question, *lines, ASKS])
        video = root / "videos" / f"{key}.mp4"
        found.append(Document(key, key, prompt, gold, video=video, options=tuple(options)))
    return check_ids(found, path)


def official(documents: Sequence[Document], responses: Responses) -> dict[str, float]:
    """{subset} in percent: the server compares indices, and what does not parse is wrong (lmms-eval guesses there)."""
    return {"subset": accuracy(_known(documents), responses, right)}


def strict(documents: Sequence[Document], responses: Responses) -> dict[str, float]:
    """{accuracy, unparsed} in percent of the questions whose answers are public."""
    own = _known(documents)
    return {"accuracy": accuracy(own, responses, right), "unparsed": unparsed(own, responses, right)}


def right(document: Document, response: str | None) -> bool | None:
    """Whether the response names the right option; None where it names none."""
    said = parsers.choice(response, document.options)
    return said == document.gold if said else None


def constants(documents: Sequence[Document]) -> dict[str, Responses]:
    """Every letter, and nothing."""
    most = max((len(one.options) for one in documents), default=0)
    return {name or "empty": constant(documents, name) for name in (*parsers.LETTERS[:most], "")}


def write(path: Path, documents: Sequence[Document], responses: Responses) -> None:
    """{q_uid: index} for the server, of all questions; -1 where a response names no option."""
    said = {one.id: parsers.choice(responses.get(one.id), one.options) for one in documents}
    rows = {key: parsers.LETTERS.index(letter) if letter else -1 for key, letter in said.items()}
    path.write_text(json.dumps(rows), encoding="utf-8")


def _known(documents: Sequence[Document]) -> list[Document]:
    return [one for one in documents if one.gold is not None]
