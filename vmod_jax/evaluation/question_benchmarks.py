"""Rows of the table of benchmarks that ask questions: about images, videos and streams.

Every row reports `official`, what the public scorer makes of the responses, its defects included (each family's file
names them), and `strict`, all annotated questions in the denominator and nothing taken for an answer that is none.

The command's options: frames (of a video, at most), context (seconds of a stream before its question; all of it by
default), by ("text" or "likelihood", where options are asked for), grid (of a frame), missing ("refuse" or "skip" what
is not there: then it is scored wrong), judge and judge_model (of open answers; `judge.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from vmod_jax.data import stills
from vmod_jax.data.sources.table import folder_of
from vmod_jax.errors import UserError
from vmod_jax.evaluation import (
    egoschema,
    gqa,
    mme,
    mvbench,
    ovobench,
    parsers,
    pope,
    scienceqa,
    streamingbench,
    textvqa,
    videomme,
    videoqa,
)
from vmod_jax.evaluation.documents import Document, Responses, write_llava
from vmod_jax.evaluation.table import Benchmark, Respond, Task
from vmod_jax.streaming.questions import Question

SHORT, LONG = 16, 64  # new tokens of a letter, a yes or a count; of an open answer
FRAMES = 64  # of a video, at most


# --- what is shown ----------------------------------------------------------------------------------------------------


def letters(document: Document) -> tuple[str, ...]:
    """The letters of its options."""
    return tuple(parsers.LETTERS[: len(document.options)])


def image_question(task: Task, document: Document) -> Question:
    """The images in order, a frame each; a question without one is asked without frames."""
    return task.lm.question(document.prompt, list(document.images) or None, options=letters(document))


def video_question(task: Task, document: Document) -> Question:
    """Frames spread over the whole video, or its span."""
    options = {"options": letters(document), "frames": task.options.get("frames") or FRAMES, "span": document.span}
    return task.lm.question(document.prompt, video=document.video, **options)


def stream_question(task: Task, document: Document) -> Question:
    """Every frame from the start, or of the last `context` seconds, up to the question's time: nothing after it."""
    fps, context = task.lm.config.fps, task.options.get("context")
    video, ask = document.video, document.ask
    assert video is not None and ask is not None  # noqa: PT018

    def frames() -> np.ndarray:
        return np.stack(list(stills.until(video, fps, ask, task.lm.image_size, context)))

    key = (str(document.video), document.ask, context)
    return Question(document.prompt, frames, key, letters(document))


def respond(ask: Callable[[Task, Document], Question], limit: int) -> Callable[[Task], Respond]:
    """Greedy replies of at most `limit` tokens, or the likeliest option's letter where the command says so."""

    def start(task: Task) -> Respond:
        by = task.options.get("by") or "text"

        def batch(documents: Sequence[Document]) -> Sequence[str | None]:
            there = [one for one in documents if not lacking(one)]
            asked = {one.id: ask(task, one) for one in there}
            said: dict[str, str] = {}
            for way in ("text", "likelihood"):
                own = [one for one in there if (by if one.options else "text") == way]
                answers = task.lm.answers([asked[one.id] for one in own], way, max_reply=limit) if own else []
                said |= {one.id: answer.text for one, answer in zip(own, answers, strict=True)}
            return [said.get(one.id) for one in documents]

        return batch

    return start


def lacking(document: Document) -> list[Path]:
    """What a document shows that is not there."""
    shown = [*document.images, *([document.video] if document.video else [])]
    return [path for path in shown if not path.exists()]


def checked(documents: list[Document], task: Task) -> list[Document]:
    """The documents, whose images and videos are there. Raises UserError otherwise, unless they are to be skipped."""
    missing = [(one, paths[0]) for one in documents if (paths := lacking(one))]
    if missing and task.options.get("missing", "refuse") != "skip":
        raise UserError(
            f"{missing[0][1]} is not there, nor is what {len(missing)} of {len(documents)} questions show; "
            "--missing skip scores those wrong"
        )
    return documents


# --- rows -------------------------------------------------------------------------------------------------------------


def row(
    name: str,
    family: Any,
    ask: Callable[[Task, Document], Question],
    limit: int,
    read: Callable[[Path], list[Document]] | None = None,
    scores: Mapping[str, Any] | None = None,
    write: Callable[[Sequence[Document], Responses, Path], None] | None = None,
    constants: Callable[[Task, Sequence[Document]], Mapping[str, Responses]] | None = None,
) -> Benchmark:
    """A row of one family's file: its documents, scorers and constants, and how its questions are shown."""
    return Benchmark(
        lambda task: checked((read or family.documents)(folder_of(task.config.data.root, name)), task),
        respond(ask, limit),
        scores or {"official": family.official, "strict": family.strict},
        constants or (lambda task, documents: family.constants(documents)),
        write,
        split="test",
        batch=32,
    )


def answers_file(name: str, write: Callable[..., None]) -> Callable[[Sequence[Document], Responses, Path], None]:
    """The results file that the public scorer reads, beside the scores."""
    return lambda documents, responses, folder: write(folder / name, documents, responses)


def image_row(name: str, family: ModuleType, limit: int = SHORT) -> Benchmark:
    return row(name, family, image_question, limit, write=answers_file(f"{name}_answers.jsonl", write_llava))


def open_row(name: str) -> Benchmark:
    """Open answers about videos, beside the most frequent answer of the training split where its files are there."""

    def constants(task: Task, documents: Sequence[Document]) -> Mapping[str, Responses]:
        folder = folder_of(task.config.data.root, name)
        there = (folder / "train_q.json").is_file() or (folder / "train_qa.json").is_file()
        return videoqa.constants(documents, videoqa.documents(folder, "train") if there else ())

    write = answers_file(f"{name}_results.jsonl", videoqa.write)
    return row(name, videoqa, video_question, LONG, write=write, constants=constants)


def video_row(name: str, family: ModuleType) -> Benchmark:
    return row(name, family, video_question, SHORT, write=answers_file(f"{name}_results.json", family.write))


def streaming_row(part: str) -> Benchmark:
    """A part of StreamingBench whose questions have options."""
    scores = {"official": partial(streamingbench.official, part=part), "strict": streamingbench.strict}
    read = partial(streamingbench.documents, part=part)
    return row("streamingbench", streamingbench, stream_question, SHORT, read, scores)


# --- output that nobody asks for in time ------------------------------------------------------------------------------


def watch(task: Task) -> Respond:
    """A stream to the end of its record, into which the request comes at its time.

    A response is {answered: second or False, dialog_history}; the answer is the first reply that nobody asked for, at
    the frame after which it was said. (The public script asks every second whether it is time yet, and stops asking 4 s
    after the truth: what is watched here does not depend on it.)
    """
    lm, fps = task.lm, task.lm.config.fps

    def one(document: Document) -> dict[str, Any] | None:
        if document.video is None or lacking(document):
            return None
        end, ask = streamingbench.end(document), document.ask or 0.0
        session = lm.stream(task.threshold, max_frames=max(64, int(end * fps) + 2), max_reply=LONG)
        session.ask(document.prompt, ask)
        answered: float | bool = False
        for frame in stills.until(document.video, fps, end, lm.image_size):
            before = len(session.turns)
            session.push(frame)
            told = session.turns[before:]
            if told and told[0].role == "assistant" and session.frames > ask * fps + 1:
                answered = told[0].time
                break
        history = [{"role": turn.role, "content": turn.text, "time": turn.time} for turn in session.turns]
        return {"answered": answered, "dialog_history": history}

    return lambda documents: [one(document) for document in documents]


PROACTIVE = Benchmark(
    lambda task: checked(
        streamingbench.documents(folder_of(task.config.data.root, "streamingbench"), "proactive"), task
    ),
    watch,
    {"official": streamingbench.proactive_official, "strict": streamingbench.proactive_strict},
    lambda task, documents: streamingbench.proactive_constants(documents),
    split="test",
)

QUESTIONS: dict[str, Benchmark] = {
    "gqa": image_row("gqa", gqa),
    "mme": image_row("mme", mme),
    "pope": image_row("pope", pope),
    "scienceqa": image_row("scienceqa", scienceqa),
    "textvqa": image_row("textvqa", textvqa, LONG),
    "msvd": open_row("msvd"),
    "msrvtt": open_row("msrvtt"),
    "activitynet": open_row("activitynet"),
    "videomme": video_row("videomme", videomme),
    "mvbench": video_row("mvbench", mvbench),
    "egoschema": video_row("egoschema", egoschema),
    "ovobench": row("ovobench", ovobench, stream_question, SHORT),
    "streamingbench": streaming_row("real"),
    "streamingbench_sqa": streaming_row("sqa"),
    "streamingbench_proactive": PROACTIVE,
}
