"""Rows of the table of benchmarks about the steps of a video: COIN's five, Ego-Exo4D's keysteps, Ego4D's
anticipation."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vmod_jax.data.conversation import Sample
from vmod_jax.data.sources import coin, egoexo4d
from vmod_jax.data.sources.lta import COMING, taxonomy
from vmod_jax.data.sources.table import EGO4D_VIDEOS, ego4d_annotations, folder_of, frames_of, lta_windows
from vmod_jax.evaluation.answering import Shown, texts
from vmod_jax.evaluation.documents import Document, Responses, constant
from vmod_jax.evaluation.nearest import Nearest
from vmod_jax.evaluation.steps import (
    Actions,
    judge_anticipation,
    judge_procedure,
    judge_step,
    plain,
    score_anticipation,
    score_procedures,
    score_steps,
)
from vmod_jax.evaluation.table import Benchmark, Score, Task

CANDIDATES = 5  # answers that anticipation may give, of which the best counts


# --- what they share --------------------------------------------------------------------------------------------------


def document(number: int, sample: Sample, gold: Any, read: Callable[[Sample], Any], **extra: Any) -> Document:
    """A sample as a document: its reply is what is to be said."""
    prompt = next(message["content"] for message in sample.conversation if message["role"] == "user")
    name = f"{number} {sample.video} {sample.start}"
    return Document(name, sample.video, prompt, gold, extra={"sample": sample, "read": read, "judged": {}, **extra})


def show(task: Task) -> Callable[[Document], Shown]:
    """The question and the frames of a document's sample, up to its reply."""

    def shown(document: Document) -> Shown:
        sample = document.extra["sample"]
        return Shown(sample.conversation[:-1], partial(document.extra["read"], sample), document.id)

    return shown


def judged(
    judge: Callable[[Document, Any], Mapping[str, Any]],
    score: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, float | None]],
) -> Score:
    """A score of what each response is judged to be; a document remembers it, for it may be drawn again."""

    def verdict(document: Document, response: Any) -> Mapping[str, Any]:
        known, key = document.extra["judged"], json.dumps(response)
        if key not in known:
            known[key] = judge(document, response)
        return known[key]

    return lambda documents, responses: score([verdict(one, responses[one.id]) for one in documents])


def steps_of(sample: Sample) -> list[str]:
    """The steps that a sample's reply names."""
    return [line.rsplit(". ", 1)[-1] for line in sample.conversation[-1]["content"].split("\n")]


def most_frequent(labels: Iterable[str]) -> str:
    """The commonest; ties: the first by the alphabet."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label), default="")


def step_constants(source: str) -> Callable[[Task, Sequence[Document]], Mapping[str, Responses]]:
    """Saying nothing, and the training split's commonest step, as often as steps are asked for."""

    def constants(task: Task, documents: Sequence[Document]) -> Mapping[str, Responses]:
        common = most_frequent(plain(step) for s in task.streams(source, "train").samples for step in steps_of(s))
        often = {
            one.id: coin.numbered([common] * len(one.gold)) if isinstance(one.gold, list) else coin.sentence(common)
            for one in documents
        }
        return {"empty": constant(documents, ""), "most_frequent": often}

    return constants


# --- COIN and Ego-Exo4D -----------------------------------------------------------------------------------------------


def coin_row(name: str) -> Benchmark:
    """A task of COIN. Its categories are those of the split's videos that have frames."""

    def documents(task: Task) -> list[Document]:
        streams, data = task.streams(f"coin_{name}"), task.config.data
        frames, file = frames_of(data, "coin", ("videos",), task.image_size), folder_of(data.root, "coin") / "coin.json"
        nearest = Nearest(coin.categories(file, frames, data.fps, task.split, name))
        gold = steps_of if procedure else lambda sample: steps_of(sample)[0]
        return [document(i, s, gold(s), streams.frames, nearest=nearest) for i, s in enumerate(streams.samples)]

    procedure = name.startswith("procedure")
    judge = judge_procedure if procedure else judge_step
    score = judged(
        lambda one, response: judge(one.gold, response, one.extra["nearest"]),
        score_procedures if procedure else score_steps,
    )
    limit = 128 if procedure else 32
    return Benchmark(documents, texts(show, limit), {"": score}, step_constants(f"coin_{name}"), split="test")


def keystep_documents(task: Task) -> list[Document]:
    """Ego-Exo4D's keysteps of a split; the nearest answer is looked for in the whole vocabulary."""
    streams, root = task.streams("egoexo4d_keystep"), folder_of(task.config.data.root, "egoexo4d")
    nearest = Nearest(sorted({plain(name) for name in egoexo4d.vocabulary(root, task.split)}))
    return [
        document(i, s, plain(steps_of(s)[0]), streams.frames, nearest=nearest) for i, s in enumerate(streams.samples)
    ]


KEYSTEP = Benchmark(
    keystep_documents,
    texts(show, 32),
    {"": judged(lambda one, response: judge_step(one.gold, response, one.extra["nearest"]), score_steps)},
    step_constants("egoexo4d_keystep"),
    split="val",
)


# --- anticipation -----------------------------------------------------------------------------------------------------


def lta_documents(task: Task) -> list[Document]:
    """Windows of eight actions seen and twenty to come; gold: {verb, noun} labels."""
    data = task.config.data
    frames = frames_of(data, "ego4d", EGO4D_VIDEOS, task.image_size)
    actions = Actions(taxonomy(ego4d_annotations(data) / "fho_lta_taxonomy.json"))
    return [
        document(
            number,
            window.sample,
            {"verb": window.verbs, "noun": window.nouns},
            lambda sample: frames.read(sample.video, sample.start, sample.stop),
            actions=actions,
            key=window.key,
        )
        for number, window in enumerate(lta_windows(data, task.split, frames))
    ]


def lta_constants(task: Task, documents: Sequence[Document]) -> Mapping[str, Responses]:
    """Saying nothing (which is read as the taxonomy's most common action), and the training split's commonest
    action."""
    common = most_frequent(plain(s) for one in task.streams("ego4d_lta", "train").samples for s in steps_of(one))
    return {
        "empty": constant(documents, [""] * CANDIDATES),
        "most_frequent": constant(documents, [coin.numbered([common] * COMING)] * CANDIDATES),
    }


def write_submission(documents: Sequence[Document], responses: Responses, folder: Path) -> None:
    """lta_submission.json, as Ego4D's server takes it: {clip_action: {verb, noun: [[20 labels] x 5]}}."""
    said = {}
    for one in documents:
        candidates = [one.extra["actions"](response) for response in responses[one.id]]
        said[one.extra["key"]] = {
            name: [[pair[place] for pair in candidate] for candidate in candidates]
            for place, name in enumerate(("verb", "noun"))
        }
    (folder / "lta_submission.json").write_text(json.dumps(said) + "\n", encoding="utf-8")


LTA = Benchmark(
    lta_documents,
    texts(show, 256, CANDIDATES),
    {
        "": judged(
            lambda one, response: judge_anticipation(
                one.gold["verb"], one.gold["noun"], response, one.extra["actions"]
            ),
            score_anticipation,
        )
    },
    lta_constants,
    write_submission,
    split="val",
)

STEPS = {**{f"coin_{name}": coin_row(name) for name in coin.TASKS}, "keystep": KEYSTEP, "lta": LTA}
