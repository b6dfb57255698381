"""COIN as questions about the steps of instructional videos: step, next, task, procedure, procedure with its goal.

    coin.json   {"database": {video: {"class", "start", "end", "subset", "annotation": [{"segment": [s, e], "label"}]}}}

A sample shows one segment (task: the whole of start to end) and answers a question that stands before it. There is no
third split: "val" and "test" both are the subset "testing". (The tasks are VideoLLM-online's, CVPR 2024, section 4.)
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vmod_jax.data.conversation import Sample
from vmod_jax.data.sources.annotations import NUMBER, get, is_time, read_json
from vmod_jax.errors import UserError, short

SUBSETS = {"train": "training", "val": "testing", "test": "testing"}
MOST_STEPS = 5  # that a procedure asks for
CONCISE = "Format your answer concisely. No extra text output."
NUMBERED = "Format your answer concisely, listing each action on a new line with a number prefix. No extra text output."
STEP_PROMPT = f"What is the action in the video? {CONCISE}"
# A label that names its verbs in brackets, as a sentence.
REWORDED = {"process (crop, fold) paper": "crop and fold paper"}
WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class Video(NamedTuple):
    """One entry of the file, its times in frames: [first, stop) of each step and of the whole activity."""

    name: str
    task: str  # "make paper wind mill", "wash TV"
    whole: tuple[int, int]
    steps: list[tuple[str, tuple[int, int]]]  # label, frames


def samples(file: str | Path, durations: Mapping[str, float], fps: float, split: str, task: str) -> list[Sample]:
    """The samples of one of `TASKS`, of the videos that `durations` (seconds) knows, in the file's order.

    Raises UserError for a file that is not COIN's, naming video and key.
    """
    return [sample for video in videos(file, durations, fps, split) for sample in TASKS[task](video)]


def categories(file: str | Path, durations: Mapping[str, float], fps: float, split: str, task: str) -> list[str]:
    """What the nearest answer is looked for among, sorted: the split's step labels, or its activities, lower case."""
    found = videos(file, durations, fps, split)
    if task == "task":
        return sorted({video.task.lower() for video in found})
    return sorted({label.lower() for video in found for label, _ in video.steps})


def videos(file: str | Path, durations: Mapping[str, float], fps: float, split: str) -> Iterator[Video]:
    """The split's videos that have a duration."""
    file = Path(file)
    if split not in SUBSETS:
        raise UserError(f"split {split!r}: COIN has {', '.join(SUBSETS)}")
    for name, entry in get(read_json(file), "database", dict, str(file)).items():
        where = f"{file.name}: video {name}"
        if get(entry, "subset", str, where) != SUBSETS[split] or name not in durations:
            continue
        last = math.floor(durations[name] * fps + 1e-9)
        steps = []
        for number, step in enumerate(get(entry, "annotation", list, where)):
            label = get(step, "label", str, f"{where}: step {number}")
            steps.append(
                (REWORDED.get(label, " ".join(label.split())), span(step, f"{where}: step {number}", fps, last))
            )
        start, end = (get(entry, key, NUMBER, where) for key in ("start", "end"))
        yield Video(name, task_words(get(entry, "class", str, where)), frames(start, end, fps, last), steps)


def frames(start: float, end: float, fps: float, last: int) -> tuple[int, int]:
    """[first, stop) of seconds start to end: times go up to a frame, and not beyond the video's last one."""
    first, final = (min(max(math.ceil(time * fps - 1e-9), 0), last) for time in (start, end))
    return first, max(first, final) + 1


def span(step: Any, where: str, fps: float, last: int) -> tuple[int, int]:
    """The frames of a step's `segment`."""
    segment = get(step, "segment", list, where)
    if len(segment) != 2 or not all(is_time(t) for t in segment):
        raise UserError(f"{where}: 'segment' is {short(segment)}, not [start, end] in seconds")
    return frames(segment[0], segment[1], fps, last)


def task_words(name: str) -> str:
    """ "MakePaperWindMill" -> "make paper wind mill"; an abbreviation stays one: "WashTV" -> "wash TV"."""
    return " ".join(word if len(word) > 1 and word.isupper() else word.lower() for word in WORD.split(name))


def sentence(label: str) -> str:
    return f"{label.capitalize()}."


def numbered(labels: list[str]) -> str:
    """A list of actions as it is answered: "1. Open the lid.", and so on, a line each."""
    return "\n".join(f"{number}. {sentence(label)}" for number, label in enumerate(labels, 1))


# --- tasks ------------------------------------------------------------------------------------------------------------


def ask(question: str, answer: str, video: str, shown: tuple[int, int]) -> Sample:
    """The question, the frames, the answer."""
    conversation: list[dict[str, Any]] = [
        {"role": "user", "content": question},
        {"role": "stream", "num_frames": shown[1] - shown[0], "learn": True},
        {"role": "assistant", "content": answer, "learn": True},
    ]
    return Sample(conversation, video, *shown)


def _step(video: Video) -> Iterator[Sample]:
    return (ask(STEP_PROMPT, sentence(label), video.name, shown) for label, shown in video.steps)


def _next(video: Video) -> Iterator[Sample]:
    for (_, shown), (label, _) in zip(video.steps, video.steps[1:], strict=False):
        yield ask(f"What is the next action for the video? {CONCISE}", sentence(label), video.name, shown)


def _task(video: Video) -> Iterator[Sample]:
    question = f"What is the overall activity in the video? {CONCISE}"
    yield ask(question, sentence(video.task), video.name, video.whole)


def _procedure(video: Video, goal: str = "What") -> Iterator[Sample]:
    labels = [label for label, _ in video.steps]
    for number, (_, shown) in enumerate(video.steps[:-1], 1):
        coming = labels[number : number + MOST_STEPS]
        if len(coming) == 1:
            yield ask(f"{goal} is the next action for the video? {CONCISE}", sentence(coming[0]), video.name, shown)
        else:
            question = f"{goal} is the next {len(coming)} actions for the video? {NUMBERED}"
            yield ask(question, numbered(coming), video.name, shown)


# name -> video -> its samples
TASKS: dict[str, Callable[[Video], Iterator[Sample]]] = {
    "step": _step,
    "next": _next,
    "task": _task,
    "procedure": _procedure,
    "procedure_goal": lambda video: _procedure(video, f"To {video.task}, what"),
}
