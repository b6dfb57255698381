"""ScienceQA: school questions of two to five choices, half of them with an image (ScienceQA-IMG).

problems.json           {id: {question, choices, answer, hint, image, ...}}
pid_splits.json         {split: [ids]}
llava_test_CQM-A.json   LLaVA's prompts; optional
images/test/ID/image.png
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmod_jax.evaluation import parsers
from vmod_jax.evaluation.documents import (
    Document,
    Responses,
    accuracy,
    constant,
    field,
    letter_index,
    percent,
    read_json,
    unparsed,
)

ASKS = "\nAnswer with the option's letter from the given choices directly."


def documents(root: Path, split: str = "test") -> list[Document]:
    """The questions of a split, with an image or without, in its order."""
    path = root / "problems.json"
    problems, recorded = read_json(path), root / "llava_test_CQM-A.json"
    asked = {}
    for number, row in enumerate(read_json(recorded) if recorded.is_file() else []):
        where = f"{recorded}: record {number}"
        asked[str(field(row, "id", where))] = field(row, "conversations", where)[0]["value"]
    found = []
    for key in field(read_json(root / "pid_splits.json"), split, f"{root / 'pid_splits.json'}"):
        where = f"{path}: problem {key}"
        problem = field(problems, str(key), f"{path}")
        question, choices, answer = (field(problem, name, where) for name in ("question", "choices", "answer"))
        image = problem.get("image")
        prompt = asked.get(str(key), ("<image>\n" if image else "") + _prompt(problem, question, choices))
        text = prompt.replace("<image>\n", "").replace("\n<image>", "") + ASKS
        shows = "<image>" in prompt
        found.append(
            Document(
                str(key), str(key), text, letter_index(choices, answer, where), options=tuple(choices),
                images=(root / "images" / split / str(key) / image,) if image else (),
                extra={"shows": shows, "recorded": f"<image>\n{text}" if shows else text},
            )
        )  # fmt: skip
    return found


def official(documents: Sequence[Document], responses: Responses) -> dict[str, Any]:
    """{total, correct, accuracy, img_accuracy (percent), img_total, parsed: {id: index or -1}}.

    An unanswered question with an image leaves the denominator of img_accuracy. "The answer is B" without a full stop,
    "b", "C)" and a sentence said twice are not understood.
    """
    parsed = {one.id: _official_index(responses.get(one.id), one) for one in documents}
    correct = {one.id: parsed[one.id] == parsers.LETTERS.index(one.gold) for one in documents}
    shown = [one for one in documents if one.extra["shows"] and one.id in responses]
    return {
        "total": len(documents),
        "correct": sum(correct.values()),
        "accuracy": percent(correct.values()),
        "img_accuracy": percent(correct[one.id] for one in shown),
        "img_total": len(shown),
        "parsed": parsed,
    }


def strict(documents: Sequence[Document], responses: Responses) -> dict[str, Any]:
    """{accuracy, img_accuracy, unparsed (percent), img_total, parsed}; IMG is every problem that has an image."""
    shown = [one for one in documents if one.images]
    said = {one.id: parsers.choice(responses.get(one.id), one.options) for one in documents}
    return {
        "accuracy": accuracy(documents, responses, right),
        "img_accuracy": accuracy(shown, responses, right),
        "img_total": len(shown),
        "unparsed": unparsed(documents, responses, right),
        "parsed": {key: parsers.LETTERS.index(letter) if letter else -1 for key, letter in said.items()},
    }


def right(document: Document, response: str | None) -> bool | None:
    """Whether the response names the right choice; None where it names none."""
    said = parsers.choice(response, document.options)
    return said == document.gold if said else None


def constants(documents: Sequence[Document]) -> dict[str, Responses]:
    """Every letter, and nothing."""
    most = max((len(one.options) for one in documents), default=0)
    return {name or "empty": constant(documents, name) for name in (*parsers.LETTERS[:most], "")}


def _official_index(response: str | None, document: Document) -> int:
    text, letters = response or "", parsers.LETTERS[:5]
    said = re.findall(r"The answer is ([A-Z]).", text)
    if text in letters and len(text) == 1:
        letter = text
    elif text[:1] in letters and text[1:3] == ". ":
        letter = text[0]
    else:
        letter = said[0] if len(said) == 1 else ""
    within = parsers.LETTERS[: min(5, len(document.options))]
    return within.index(letter) if letter and letter in within else -1


def _prompt(problem: dict, question: str, choices: Sequence[str]) -> str:
    options = " ".join(f"({letter}) {text}" for letter, text in zip(parsers.LETTERS, choices, strict=False))
    return f"Context: {problem.get('hint') or 'N/A'}\nQuestion: {question}\nOptions: {options}"
