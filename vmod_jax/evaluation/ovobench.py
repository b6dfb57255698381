"""OVO-Bench (arXiv 2501.05510): questions about a stream's past, its present, and what has not happened yet.

ovo_bench_new.json            [{id, task, video, realtime, question, options, gt} | {..., test_info: [...]}]
src_videos/VIDEO              or chunked_videos/ID.mp4, ID_I.mp4
constant.py                   the authors' prompts, taken from there where it lies under the root; never run
results/MODEL/*.json          {backward: [...], realtime: [...], forward: [...]}
"""

import ast
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
    read_json,
    unparsed,
)

MODES = {
    "backward": ("EPM", "ASI", "HLD"),
    "realtime": ("OCR", "ACR", "ATR", "STU", "FPD", "OJR"),
    "forward": ("REC", "SSR", "CRR"),
}
MODE_OF = {task: mode for mode, tasks in MODES.items() for task in tasks}

CHOOSES = (
    "\nQuestion: {}\nOptions:\n{}\n\n"
    "Respond only with the letter corresponding to your chosen option (e.g., A, B, C). \n"
    "Do not include any additional text or explanation in your response.\n"
)
COUNTS = "How many times did they {}? Answer with a single number and nothing else."
DOES = "Is this step of a tutorial being carried out right now: {}? Answer only with “Yes” or “No”."
SUFFICES = 'Is what has been seen so far enough to answer the question "{}"? Answer only with “Yes” or “No”.'


def documents(root: Path) -> list[Document]:
    """One document a question: records, and each test_info of a forward record, with `ask` its time in the stream."""
    path, prompts = root / "ovo_bench_new.json", authors_prompts(root)
    found = []
    for number, record in enumerate(read_json(path)):
        where = f"{path}: record {number}"
        if (task := field(record, "task", where)) not in MODE_OF:
            raise UserError(f"{where}: task {task!r} is none of {', '.join(MODE_OF)}")
        key, video = str(field(record, "id", where)), field(record, "video", where)
        forward = MODE_OF[task] == "forward"
        asked = field(record, "test_info", where) if forward else [record]
        for i, info in enumerate(asked):
            name = f"{key}_{i}" if forward else key
            chunk = root / "chunked_videos" / f"{name}.mp4"
            whole = root / "src_videos" / video
            try:
                prompt, gold = _asks(task, record, info, prompts, where)
            except (LookupError, ValueError) as error:
                raise UserError(f"constant.py has a {task} prompt that is not filled in order ({error!r})") from error
            options = () if forward else tuple(map(str, record["options"]))
            found.append(
                Document(
                    name, video, prompt, gold, task, video=chunk if chunk.is_file() and not whole.is_file() else whole,
                    ask=float(field(info, "realtime", where)), options=options, extra={"record": number, "info": i},
                )
            )  # fmt: skip
    return check_ids(found, path)


def authors_prompts(root: Path) -> dict[str, str]:
    """The strings *_PROMPT_TEMPLATE of a constant.py anywhere under the root, read and never run; {} without one."""
    file = next(iter(sorted(root.glob("**/constant.py"))), None)
    if file is None:
        return {}
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            found |= {name: node.value.value for name in names if name.endswith("_PROMPT_TEMPLATE")}
    return found


def _asks(task: str, record: dict, info: dict, prompts: dict[str, str], where: str) -> tuple[str, Any]:
    """(prompt, gold) of a question."""
    theirs = next((text for name, text in sorted(prompts.items()) if name.startswith(task)), None)
    if MODE_OF[task] != "forward":
        theirs = theirs or next((text for name, text in sorted(prompts.items()) if name.startswith("BR")), None)
        options = [str(text) for text in field(record, "options", where)]
        lines = "; ".join(f"{letter}. {text}" for letter, text in zip(parsers.LETTERS, options, strict=False))
        gold = letter_index(options, field(record, "gt", where), where)
        return (theirs or CHOOSES).format(field(record, "question", where), f"{lines};"), gold
    if task == "REC":
        return (theirs or COUNTS).format(field(record, "activity", where)), int(field(info, "count", where))
    about = field(info, "step", where) if task == "SSR" else field(record, "question", where)
    text = (theirs or (DOES if task == "SSR" else SUFFICES)).format(about)
    return text, "Yes" if field(info, "type", where) else "No"


# --- scores -----------------------------------------------------------------------------------------------------------


def official(documents: Sequence[Document], responses: Responses) -> dict[str, float | None]:
    """Percent of each task, each mode (the mean of its tasks) and in total (the mean of the modes).

    Over what the results files hold. A letter counts anywhere in the response: "ABCDE" is always right, and whoever
    begins with "Assistant:" gets the share of gold A. A mode without a response, at which the public scorer stops, is
    None here.
    """

    def judged(document: Document, response: str | None) -> bool:
        if MODE_OF[document.task] != "forward":
            return parsers.contains(response, document.gold)
        if document.task == "REC":
            return parsers.ovo_digits(response) == str(document.gold)
        return parsers.ovo_yes_no(response, document.gold)

    return _averages([one for one in documents if one.id in responses], responses, judged)


def strict(documents: Sequence[Document], responses: Responses) -> dict[str, float | None]:
    """The same averages over all questions, and CRR_balanced, SSR_balanced, unparsed (percent of all).

    balanced: the mean of the accuracies where the gold is yes and where it is no, 50 for any constant.
    """
    found = _averages(documents, responses, right)
    for task in ("CRR", "SSR"):
        halves = [[one for one in documents if (one.task, one.gold) == (task, gold)] for gold in ("No", "Yes")]
        shares = [accuracy(half, responses, right) for half in halves if half]
        found[f"{task}_balanced"] = sum(shares) / len(shares) if shares else None
    return found | {"unparsed": unparsed(documents, responses, right)}


def right(document: Document, response: str | None) -> bool | None:
    """Whether the response is the gold option, count or yes or no; None where it is none of them."""
    if MODE_OF[document.task] != "forward":
        said = parsers.choice(response, document.options) or None
        return None if said is None else said == document.gold
    if document.task == "REC":
        number = parsers.count(response)
        return None if number is None else number == document.gold
    word = parsers.yes_no(response)
    return None if word is None else word == document.gold.lower()


def constants(documents: Sequence[Document]) -> dict[str, Responses]:
    """The answers that see nothing: letter, yes or no, count; VideoLLM-online's prefix; silence."""

    def always(letter: str, word: str, number: str) -> Responses:
        kinds = {"forward": word, "backward": letter, "realtime": letter}
        return {one.id: number if one.task == "REC" else kinds[MODE_OF[one.task]] for one in documents}

    return {
        "A_Yes_1": always("A", "Yes", "1"),
        "B_No_0": always("B", "No", "0"),
        "ABCDE_YesNo_1": always("ABCDE", "YesNo", "1"),
        "assistant_prefix": constant(documents, "(Video Time = 9.5s) Assistant: You do it."),
        "silent": constant(documents, None),
    }


def _averages(own: Sequence[Document], responses: Responses, judged) -> dict[str, float | None]:
    tasks = {task: accuracy(some, responses, judged) for task, some in by_task(own).items()}
    modes: dict[str, float | None] = {}
    for mode, names in MODES.items():
        there = [tasks[name] for name in names if name in tasks]
        modes[mode] = sum(there) / len(there) if there else None
    means = list(modes.values())
    total = None if None in means else sum(value for value in means if value is not None) / len(means)
    return {**tasks, **modes, "total": total}


# --- results files ----------------------------------------------------------------------------------------------------


def read(path: Path, documents: Sequence[Document]) -> dict[str, str | None]:
    """results/MODEL/ (all its files joined) or one file -> responses."""
    known, responses = {one.id for one in documents}, {}
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    for file in files:
        results = read_json(file)
        for mode in MODES:
            for record in results.get(mode, []):
                key = str(field(record, "id", f"{file}: {mode}"))
                said = field(record, "test_info", f"{file}: {mode}") if mode == "forward" else [record]
                names = [f"{key}_{i}" for i in range(len(said))] if mode == "forward" else [key]
                if unknown := set(names) - known:
                    raise UserError(f"{file}: question {min(unknown)} is not in this benchmark's files")
                responses |= {name: one.get("response") for name, one in zip(names, said, strict=True)}
    return responses


def write(path: Path, documents: Sequence[Document], responses: Responses, root: Path) -> None:
    """The authors' results file: {backward, realtime, forward}, of the records that have every response."""
    records = read_json(root / "ovo_bench_new.json")
    by_record: dict[int, list[Document]] = {}
    for one in documents:
        by_record.setdefault(one.extra["record"], []).append(one)
    rows: dict[str, list[dict]] = {mode: [] for mode in MODES}
    for number, own in by_record.items():
        if any(one.id not in responses for one in own):
            continue
        record, said = records[number], [responses[one.id] for one in own]
        mode = MODE_OF[record["task"]]
        if mode == "forward":
            asked = [info | {"response": text} for info, text in zip(record["test_info"], said, strict=True)]
            rows[mode].append(record | {"test_info": asked})
        else:
            kept = {key: record[key] for key in ("id", "video", "task", "question")}
            rows[mode].append(kept | {"response": said[0], "ground_truth": own[0].gold})
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
