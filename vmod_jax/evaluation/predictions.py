"""The file of predictions: a header, then a line a document, flushed as it comes; what a run that was killed goes on
with.

    {"format": 1, "benchmark", "split", "model", ...}
    {"id", "group", "task", "response", "gold"}                 in the order of the documents

Documents are answered in batches that depend on the documents alone, and a batch that was cut short is answered again
as a whole: however often a run is killed, the file ends the same to the byte.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from vmod_jax.errors import UserError
from vmod_jax.evaluation.documents import Document
from vmod_jax.evaluation.table import Respond
from vmod_jax.lm import LanguageModel


def predict(
    path: Path, header: Mapping[str, Any], documents: Sequence[Document], respond: Respond, size: int, final: bool
) -> dict[str, Any]:
    """Responses to all documents, by id; those that the file holds are taken from it, the others are added to it.

    final: whether the file is one of a finished run, which another header replaces. Raises UserError for an unfinished
    file of another run, naming the first key that differs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    there = _read(path, header, documents, final)
    done = len(there)
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(documents), initial=done, disable=None) as bar:
        if not done and not path.stat().st_size:
            _write(file, header)
        first = 0
        for batch in batches(documents, size):
            if first + len(batch) > done:
                for place, (document, response) in enumerate(zip(batch, respond(batch), strict=True), first):
                    if place >= done:
                        there[document.id] = response
                        _write(file, _line(document, response))
                        bar.update()
            first += len(batch)
    # What was answered now reads as what would be read again: JSON knows no tuples.
    return {name: json.loads(json.dumps(response)) for name, response in there.items()}


def batches(documents: Sequence[Document], size: int) -> Iterator[list[Document]]:
    """At most `size` documents at a time, in order; a group is not cut where it fits into one."""
    batch: list[Document] = []
    for _, run in groupby(documents, lambda document: document.group):
        group = list(run)
        if batch and len(batch) + len(group) > size:
            yield batch
            batch = []
        for document in group:
            if len(batch) == size:
                yield batch
                batch = []
            batch.append(document)
    if batch:
        yield batch


def fingerprint(lm: LanguageModel) -> str:
    """A hash of a model's configuration and of its weights' bytes."""
    digest = hashlib.sha256(lm.config.to_json().encode())
    for leaf in jax.tree.leaves(lm.params):
        digest.update(zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)).view(np.uint8).data).to_bytes(4, "big"))
    return digest.hexdigest()[:16]


def _read(path: Path, header: Mapping[str, Any], documents: Sequence[Document], final: bool) -> dict[str, Any]:
    """What the file holds already; a torn last line is cut off, a finished run's file of another header removed."""
    if not path.is_file():
        return {}
    whole = path.read_bytes()
    lines = whole[: whole.rfind(b"\n") + 1].splitlines()
    try:
        first, *rows = [json.loads(line) for line in lines] or [None]
    except ValueError as error:
        raise UserError(f"{path}: not a file of predictions ({error}); remove it to begin anew") from error
    differs = [key for key in header if not isinstance(first, dict) or first.get(key) != _plain(header[key])]
    if first is None or (differs and final):
        path.unlink()
        return {}
    if differs:
        was = first.get(differs[0]) if isinstance(first, dict) else None
        raise UserError(
            f"{path} is an unfinished run of another {differs[0]} ({was}, here {header[differs[0]]}): "
            "finish that one, or remove the file to begin anew"
        )
    if [row.get("id") for row in rows] != [document.id for document in documents[: len(rows)]]:
        raise UserError(f"{path} holds predictions for other documents: remove it to begin anew")
    os.truncate(path, sum(len(line) + 1 for line in lines))
    return {row["id"]: row["response"] for row in rows}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _line(document: Document, response: Any) -> dict[str, Any]:
    return {
        "id": document.id,
        "group": document.group,
        "task": document.task,
        "response": response,
        "gold": document.gold,
    }


def _write(file: Any, value: Mapping[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
    file.flush()
