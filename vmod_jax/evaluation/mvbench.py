"""MVBench: 20 tasks of about 200 short videos, each with a question of two to five options.

json/TASK.json    [{video, question, candidates, answer: one of them, start?, end?}]
video/...         anywhere below; one task's videos are folders of frames at 3 a second
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmod_jax.errors import UserError
from vmod_jax.evaluation import parsers
from vmod_jax.evaluation.documents import (
    Document,
    Responses,
    accuracy,
    by_task,
    check_ids,
    constant,
    field,
    letter_index,
    percent,
    read_json,
    unparsed,
)

ASKS = "\nOnly give the best option."


def documents(root: Path) -> list[Document]:
    """All questions, task after task."""
    files = sorted((root / "json").glob("*.json"))
    if not files:
        raise UserError(f"{root / 'json'}: no TASK.json there; check --root")
    videos = {path.name: path for path in sorted((root / "video").rglob("*"))}
    found = []
    for path in files:
        for number, row in enumerate(read_json(path)):
            where = f"{path}: record {number}"
            candidates = [str(text) for text in field(row, "candidates", where)]
            answer = str(field(row, "answer", where))
            if answer not in candidates:
                raise UserError(f"{where}: the answer {answer!r} is none of its candidates")
            name, question = field(row, "video", where), field(row, "question", where)
            lines = [f"({letter}) {text}" for letter, text in zip(parsers.LETTERS, candidates, strict=False)]
            span = (float(row["start"]), float(row["end"])) if {"start", "end"} <= row.keys() else None
            found.append(
                Document(
                    f"{path.stem}/{number}", f"{name}", "\n".join([f"Question: {question}", "Options:", *lines]) + ASKS,
                    letter_index(candidates, candidates.index(answer), where), path.stem, options=tuple(candidates),
                    video=videos.get(Path(name).name, root / "video" / name), span=span,
                )
            )  # fmt: skip
    return check_ids(found, root)


def official(documents: Sequence[Document], responses: Responses) -> dict[str, Any]:
    """{accuracy, average, tasks, lmms} in percent: over all, mean of the tasks, each task; lmms-eval's over all.

    The first word is compared with "(x)" by whether either holds the other, so that saying nothing is always right.
    lmms-eval takes the first lone letter, and leaves what is empty out of its denominator.
    """

    def judged(own: Sequence[Document]) -> float:
        return percent(parsers.mvbench_official(responses.get(one.id), one.gold) for one in own)

    tasks = {task: judged(own) for task, own in by_task(documents).items()}
    spoken = [one for one in documents if responses.get(one.id)]
    return {
        "accuracy": judged(documents),
        "average": sum(tasks.values()) / max(1, len(tasks)),
        "tasks": tasks,
        "lmms": percent(parsers.mvbench_lmms(responses.get(one.id)) == one.gold for one in spoken),
    }


def strict(documents: Sequence[Document], responses: Responses) -> dict[str, Any]:
    """{accuracy, average, tasks, unparsed} in percent of all questions."""
    tasks = {task: accuracy(own, responses, right) for task, own in by_task(documents).items()}
    return {
        "accuracy": accuracy(documents, responses, right),
        "average": sum(tasks.values()) / max(1, len(tasks)),
        "tasks": tasks,
        "unparsed": unparsed(documents, responses, right),
    }


def right(document: Document, response: str | None) -> bool | None:
    """Whether the response names the right option; None where it names none."""
    said = parsers.choice(response, document.options)
    return said == document.gold if said else None


def constants(documents: Sequence[Document]) -> dict[str, Responses]:
    """Every letter, and nothing."""
    most = max((len(one.options) for one in documents), default=0)
    return {name or "empty": constant(documents, name) for name in (*parsers.LETTERS[:most], "")}


def write(path: Path, documents: Sequence[Document], responses: Responses) -> None:
    """{task: [{pred, gt}]} as the public notebook keeps its answers."""
    rows = {
        task: [{"pred": responses.get(one.id) or "", "gt": f"({one.gold})"} for one in own]
        for task, own in by_task(documents).items()
    }
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
