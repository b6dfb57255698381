"""Video-MME: 900 short, medium and long videos with three questions of four options each.

annotations.json (or *.parquet)    rows {video_id, duration, domain, sub_category, videoID, question_id, task_type, ...}
data/VIDEOID.mp4, subtitle/VIDEOID.srt
"""

import json
from collections.abc import Callable, Collection, Sequence
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

DURATIONS = ("short", "medium", "long")
ASKS = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
# what the public scorer breaks its scores down by -> the key of a row
BREAKDOWNS = {"Video Categories": "domain", "Video Sub Categories": "sub_category", "Task Categories": "task_type"}


def documents(root: Path) -> list[Document]:
    """All questions; `task` is the video's duration class."""
    rows, path = _rows(root)
    found = []
    for number, row in enumerate(rows):
        where = f"{path}: row {number}"
        options = tuple(field(row, "options", where))
        video = root / "data" / f"{field(row, 'videoID', where)}.mp4"
        there = [video.with_suffix(ending) for ending in (".mp4", ".MP4", ".mkv")]
        found.append(
            Document(
                field(row, "question_id", where), str(field(row, "video_id", where)),
                "\n".join([ASKS, field(row, "question", where), *options, "The best answer is:"]),
                letter_index(options, field(row, "answer", where), where), field(row, "duration", where),
                video=next((file for file in there if file.is_file()), video), options=options, extra=row,
            )
        )  # fmt: skip
    return check_ids(found, path)


def _rows(root: Path) -> tuple[list[dict], Path]:
    path = root / "annotations.json"
    if path.is_file() or not (tables := sorted(root.rglob("*.parquet"))):
        return read_json(path), path
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{tables[0]}: to read it, pip install pyarrow, or put {path.name} beside it") from error
    return [row for table in tables for row in parquet.read_table(table).to_pylist()], tables[0]


def official(documents: Sequence[Document], responses: Responses, missing: Collection[str] = ()) -> dict[str, Any]:
    """{short, medium, long, entire: {breakdown: {name: percent}}} as the public script prints them, unrounded.

    missing: videos that a results file marks so, which are skipped. Only responses that parse enter a denominator: to
    say nothing where one is not sure raises the score. Lower case and full texts do not parse.
    """
    shown = [one for one in documents if one.group not in missing]
    found = {duration: _breakdowns(own, responses, BREAKDOWNS) for duration, own in by_task(shown).items()}
    names = {"Video Domains": "domain", **{name: BREAKDOWNS[name] for name in list(BREAKDOWNS)[1:]}}
    return {duration: found[duration] for duration in DURATIONS if duration in found} | {
        "entire": _breakdowns(shown, responses, names)
    }


def _breakdowns(own: Sequence[Document], responses: Responses, names: dict[str, str]) -> dict[str, dict[str, float]]:
    found = {name: _parsed_shares(own, responses, lambda one, key=key: one.extra[key]) for name, key in names.items()}
    return found | {"Overall Performance": _parsed_shares(own, responses, lambda one: "Overall")}


def _parsed_shares(own: Sequence[Document], responses: Responses, key: Callable[[Document], str]) -> dict[str, float]:
    right: dict[str, int] = {}
    parsed: dict[str, int] = {}
    for one in own:
        said = parsers.videomme_regex(responses.get(one.id))
        parsed[key(one)] = parsed.get(key(one), 0) + bool(said)
        right[key(one)] = right.get(key(one), 0) + (said == one.gold)
    return {name: 100 * right[name] / parsed[name] if parsed[name] else 0.0 for name in parsed}


def strict(documents: Sequence[Document], responses: Responses) -> dict[str, float]:
    """{overall, short, medium, long, unparsed} in percent of all annotated questions."""
    by_duration = {duration: accuracy(own, responses, right) for duration, own in by_task(documents).items()}
    return {
        "overall": accuracy(documents, responses, right),
        **{duration: by_duration[duration] for duration in DURATIONS if duration in by_duration},
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


def read(path: Path, documents: Sequence[Document]) -> tuple[dict[str, str | None], set[str]]:
    """The official results file -> (responses, the videos that it marks as missing)."""
    known, responses, missing = {one.id for one in documents}, {}, set()
    for number, video in enumerate(read_json(path)):
        where = f"{path}: video {number}"
        if video.get("missing"):
            missing.add(str(field(video, "video_id", where)))
        for row in field(video, "questions", where):
            if (key := field(row, "question_id", where)) not in known:
                raise UserError(f"{where}: question {key} is not in this benchmark's files")
            responses[key] = row.get("response")
    return responses, missing


def write(path: Path, documents: Sequence[Document], responses: Responses) -> None:
    """The official results file; a video without any response is marked missing."""
    videos: dict[str, list[Document]] = {}
    for one in documents:
        videos.setdefault(one.group, []).append(one)
    keep = ("question_id", "task_type", "question", "options", "answer")
    rows = [
        {
            **{key: own[0].extra[key] for key in ("video_id", "duration", "domain", "sub_category")},
            "missing": not any(one.id in responses for one in own),
            "questions": [
                {key: one.extra[key] for key in keep} | {"response": responses.get(one.id) or ""} for one in own
            ],
        }
        for own in videos.values()
    ]
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
