"""StreamingBench (arXiv 2411.03628): questions at their time in a stream, and outputs that nobody asks for in time.

    questions_{real,proactive}.json    [{time, questions: [...], video_path}]
    questions_sqa.json                 lists of such, one a video: later questions build on earlier ones
    videos/sample_N_{real,sqa,proactive}.mp4

A response is stored in its question, under the model's name. (The omni questions need sound and are not offered.)
"""

import copy
import json
import re
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
    constant,
    field,
    letter_index,
    percent,
    read_json,
    unparsed,
)

ROLE = (
    "You watch a video stream and answer questions about what it has shown so far. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
BEFORE = "At timestamp {}, the following question and answer occurred: Question: {}; Options: {}; Answer: {}; "
TOLERANCE = 2  # seconds
LONGEST_DELAY = 60  # seconds, of the constant that comes a fixed time after its question


def documents(root: Path, part: str) -> list[Document]:
    """The questions of "real", "sqa" or "proactive"."""
    path = root / f"questions_{part}.json"
    found, before = [], ""
    for number, (video, clip) in enumerate(_clips(read_json(path))):
        where = f"{path}: clip {number}"
        if video != (found[-1].extra["video"] if found else None):
            before = ""
        for i, question in enumerate(field(clip, "questions", where)):
            file = root / "videos" / Path(clip.get("video_path", f"sample_{video}_{part}.mp4")).name
            ask, text = seconds(field(question, "time_stamp", where)), field(question, "question", where)
            if part == "proactive":
                options, gold, prompt = (), str(field(question, "ground_truth_output", where)), text
            else:
                options = labelled(field(question, "options", where))
                gold = letter_index(options, field(question, "answer", where), where)
                lines = [ROLE, f"Question: {text}", "Options:", *options, "The best option is:"]
                prompt = "\n".join([*([before.strip()] if before else []), *lines])
            found.append(
                Document(
                    f"{number}_{i}", file.name, prompt, gold, field(question, "task_type", where),
                    video=file, ask=ask, options=options,
                    extra=question | {"video": video, "time": clip.get("time", "")},
                )
            )  # fmt: skip
            if part == "sqa":
                before += BEFORE.format(question["time_stamp"], text, " ".join(options), question["answer"])
    return found


def _clips(videos: list) -> list[tuple[int, dict]]:
    """(number of the video, clip), in order."""
    return [(i, clip) for i, video in enumerate(videos) for clip in (video if isinstance(video, list) else [video])]


def seconds(stamp: str) -> float:
    """ "HH:MM:SS" -> seconds."""
    try:
        hours, minutes, rest = stamp.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(rest)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{stamp!r} is not a time of the form HH:MM:SS") from error


def labelled(options: Sequence[str]) -> tuple[str, ...]:
    """The options with their letters, which some of the file's lack."""
    if parsers.option_texts(options) != list(options):
        return tuple(options)
    return tuple(f"{letter}. {text}" for letter, text in zip(parsers.LETTERS, options, strict=False))


# --- real and sqa -----------------------------------------------------------------------------------------------------


def official(documents: Sequence[Document], responses: Responses, part: str = "real") -> dict[str, dict[str, float]]:
    """{task type: {total, correct, accuracy}}, shares of 1, and "total" in real alone.

    The first character is compared. A question without a response leaves the denominator. (At an empty one the public
    scorer stops; here it is wrong.)
    """
    said = [one for one in documents if responses.get(one.id) is not None]

    def judged(own: Sequence[Document]) -> dict[str, float]:
        correct = sum(parsers.first_char(responses[one.id], one.gold) for one in own)
        return {"total": len(own), "correct": correct, "accuracy": correct / len(own) if own else 0.0}

    found = {task: judged(own) for task, own in by_task(said).items()}
    return found | ({"total": judged(said)} if part == "real" else {})


def strict(documents: Sequence[Document], responses: Responses) -> dict[str, Any]:
    """{accuracy, tasks, unparsed} in percent of all questions."""
    return {
        "accuracy": accuracy(documents, responses, right),
        "tasks": {task: accuracy(own, responses, right) for task, own in by_task(documents).items()},
        "unparsed": unparsed(documents, responses, right),
    }


def right(document: Document, response: str | None) -> bool | None:
    """Whether the response names the right option; None where it names none."""
    said = parsers.choice(response, document.options)
    return said == document.gold if said else None


def constants(documents: Sequence[Document]) -> dict[str, Responses]:
    """Every letter, and silence."""
    most = max((len(one.options) for one in documents), default=0)
    letters = {name: constant(documents, name) for name in parsers.LETTERS[:most]}
    return {**letters, "silent": constant(documents, None)}


# --- proactive --------------------------------------------------------------------------------------------------------


def proactive_official(documents: Sequence[Document], responses: Responses) -> dict[str, dict[str, float]]:
    """{task type: {total, time_correct, answer_correct, time_accuracy, answer_accuracy}}, shares of 1.

    Responses are {answered: second or False, dialog_history: [{role, content, time}]}: of the history the last entry
    counts. The truth leaks into the run, whose polling ends 4 s after it; and the output may stand anywhere ("3" in
    "13"). Over the questions that have a response.
    """

    def judged(own: Sequence[Document]) -> dict[str, float]:
        times = [(one, _last(responses[one.id])) for one in own]
        in_time = [(one, entry) for one, entry in times if _on_time(one, entry.get("time"))]
        answers = sum(one.gold in str(entry.get("content", "")) for one, entry in in_time)
        counts = {"total": len(own), "time_correct": len(in_time), "answer_correct": answers}
        return counts | {"time_accuracy": len(in_time) / len(own), "answer_accuracy": answers / len(own)}

    said = [one for one in documents if responses.get(one.id) is not None]
    return {task: judged(own) for task, own in by_task(said).items()}


def proactive_strict(documents: Sequence[Document], responses: Responses) -> dict[str, float]:
    """{time_accuracy, answer_accuracy} in percent of all: answered within 2 s; and the very output."""
    given = [(one, responses.get(one.id) or {}) for one in documents]
    in_time = [_on_time(one, said.get("answered") or None) for one, said in given]
    same = [parsers.fold(str(_last(said).get("content", ""))) == parsers.fold(one.gold) for one, said in given]
    return {
        "time_accuracy": percent(in_time),
        "answer_accuracy": percent(a and b for a, b in zip(in_time, same, strict=True)),
    }


def best_constant_delay(documents: Sequence[Document]) -> dict[str, float]:
    """{delay, time_accuracy}: always so many whole seconds after the question; the best of 0 ... 60, the smallest."""
    shares = {
        delay: percent(_on_time(one, (one.ask or 0) + delay) for one in documents) for delay in range(LONGEST_DELAY + 1)
    }
    delay = max(shares, key=lambda delay: (shares[delay], -delay))
    return {"delay": delay, "time_accuracy": shares[delay]}


def end(document: Document) -> float:
    """Seconds at which the record of a question ends, as its `time` says: "[0:00:00 - 0:00:30]"."""
    stamps = re.findall(r"\d+:\d+:\d+", document.extra["time"])
    return seconds(stamps[-1]) if stamps else seconds(document.extra["ground_truth_time_stamp"]) + 4


def always_after(documents: Sequence[Document], delay: float) -> Responses:
    """The right output, always so many seconds after the question: only its time can be wrong."""
    return {
        one.id: {
            "answered": (one.ask or 0) + delay,
            "dialog_history": [{"role": "assistant", "content": one.gold, "time": (one.ask or 0) + delay}],
        }
        for one in documents
    }


def proactive_constants(documents: Sequence[Document]) -> dict[str, Responses]:
    """Silence, and the right output at once and at the best fixed time after its question."""
    best = best_constant_delay(documents)["delay"]
    silent = {"answered": False, "dialog_history": []}
    delays = {f"oracle: after {delay:g} s": always_after(documents, delay) for delay in sorted({0, best})}
    return {"silent": constant(documents, silent), **delays}


def _last(response: dict) -> dict:
    history = response.get("dialog_history") or [{}]
    return history[-1]


def _on_time(document: Document, time: float | None) -> bool:
    truth = seconds(document.extra["ground_truth_time_stamp"])
    return time is not None and abs(time - truth) <= TOLERANCE


# --- files ------------------------------------------------------------------------------------------------------------


def read(path: Path, documents: Sequence[Document], model: str = "vmod") -> dict[str, Any]:
    """Responses stored under a model's name in a file of the questions' form."""
    known, responses = {one.id for one in documents}, {}
    for number, (_, clip) in enumerate(_clips(read_json(path))):
        for i, question in enumerate(field(clip, "questions", f"{path}: clip {number}")):
            if model in question:
                if f"{number}_{i}" not in known:
                    raise UserError(f"{path}: question {number}_{i} is not in this benchmark's files")
                responses[f"{number}_{i}"] = question[model]
    return responses


def write(path: Path, questions: Path, responses: Responses, model: str = "vmod") -> None:
    """The benchmark's questions with our responses in them."""
    videos = copy.deepcopy(read_json(questions))
    for number, (_, clip) in enumerate(_clips(videos)):
        for i, question in enumerate(clip["questions"]):
            if f"{number}_{i}" in responses:
                question[model] = responses[f"{number}_{i}"]
    path.write_text(json.dumps(videos, indent=1, ensure_ascii=False), encoding="utf-8")
