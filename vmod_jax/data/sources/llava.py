"""LLaVA's instruction data, and files like it: questions and answers about images, of many turns or one.

    [{"id", "image": path below the folder of images, or a list of them, or absent: text alone,
      "conversations": [{"from": "human" | "gpt", "value": text}, ...]}]

(blip_laion_cc_sbu_558k.json, llava_v1_5_mix665k.json: arXiv 2304.08485 and 2310.03744.) As a stream:

    the images named in a turn     one stream of as many frames, none learned, before the turn
    human                          user, without "<image>" and the blanks around
    gpt                            assistant, learned from "Assistant" to its eos; nothing else is learned
    plain                          the human turns and the system prompt left out: an image and its caption

As in LLaVA, "<image>" may stand anywhere in a turn, and what comes before the first human turn is left out. The file is
never held in memory: where its records begin and end is found once, and kept in the cache.
"""

import hashlib
import mmap
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vmod_jax.data import stills
from vmod_jax.data.conversation import Sample
from vmod_jax.errors import UserError, is_text, parse_json, short, user_path

IMAGE = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}
MISSING = ("refuse", "skip")
_SEPARATOR = "\n"  # between a sample's images
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{\]}]', re.DOTALL)


class Instructions(Sequence[Sample]):
    """A file's records as samples, each read when it is asked for; `video` names its images, a line each.

    images: the folder of images; plain: captions alone; missing: "refuse" records whose images are not there, or "skip"
    them; skipped: how many were. Raises UserError for a file or a record that is not in the form above, by its number
    and id.
    """

    def __init__(
        self,
        file: str | Path,
        images: str | Path,
        plain: bool = False,
        missing: str = "refuse",
        cache: Path | None = None,
    ):
        if missing not in MISSING:
            raise UserError(f"missing images: '{missing}' is unknown, use one of {', '.join(MISSING)}")
        self.file, self.images, self.plain = user_path(file), user_path(images), plain
        if not self.file.is_file():
            raise UserError(f"{self.file}: no such file; vmod downloads no data set")
        self._places = _indexed(self.file, cache)
        there = np.array([self._is_there(i) for i in range(len(self._places))], bool)
        if (lacking := int((~there).sum())) and missing == "refuse":
            first = int(np.flatnonzero(~there)[0])
            raise UserError(
                f"{self.file}: the images of {lacking} of {len(there)} records are not below {self.images} (the first: "
                f"record {first}); leave those records out with missing=skip"
            )
        self.skipped = lacking
        self._numbers = np.flatnonzero(there)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = int(self._numbers[index])
        record, where = self._record(number)
        return sample(record, self.plain, where)

    def frames(self, sample: Sample, size: int) -> np.ndarray:
        """The images of a sample: u8[F, size, size, 3]. (Of a text alone, which shows none, black ones.)"""
        paths = sample.video.split(_SEPARATOR) if sample.video else []
        shown = [stills.image(self.images / path, size) for path in paths[sample.start : sample.stop]]
        return np.stack(shown) if shown else np.zeros((sample.stop - sample.start, size, size, 3), np.uint8)

    def _record(self, number: int) -> tuple[dict, str]:
        """A record, and what to call it in a complaint."""
        start, stop = self._places[number]
        with self.file.open("rb") as file:
            file.seek(start)
            text = file.read(stop - start)
        record = parse_json(text, f"{self.file}: record {number}")
        return record, f"{self.file}: record {number} ({short(record.get('id'))})"

    def _is_there(self, number: int) -> bool:
        return all((self.images / path).is_file() for path in image_paths(*self._record(number)))


def image_paths(record: dict, where: str) -> list[str]:
    """The images of a record. Raises UserError where its key `image` is neither a path nor a list of them."""
    named = record.get("image") or []
    paths = [named] if isinstance(named, str) else named
    if not isinstance(paths, list) or not all(isinstance(path, str) and _SEPARATOR not in path for path in paths):
        raise UserError(f"{where}: 'image' must be a path or a list of paths")
    return paths


def sample(record: dict, plain: bool = False, where: str = "a record") -> Sample:
    """A record as a conversation about its images. Raises UserError, beginning with `where`, where it is none."""
    paths, turns = image_paths(record, where), _turns(record, where)
    conversation: list[dict] = [{"role": "system", "content": ""}] if plain else []
    for role, text in turns:
        if named := text.count(IMAGE):
            conversation.append({"role": "stream", "num_frames": named, "learn": False})
        if role == "assistant":
            conversation.append({"role": role, "content": text.strip(), "learn": True})
        elif not plain:
            conversation.append({"role": role, "content": text.replace(IMAGE, "").strip()})
    named = sum(text.count(IMAGE) for _, text in turns)
    if named != len(paths):
        raise UserError(f"{where} has {len(paths)} images and names {named} in its turns with {IMAGE}")
    return Sample(conversation, _SEPARATOR.join(paths), 0, len(paths))


def _turns(record: dict, where: str) -> list[tuple[str, str]]:
    """(role, text) of each turn, from the first human one on, the roles in alternation."""
    said = record.get("conversations")
    if not isinstance(said, list) or not said:
        raise UserError(f"{where} has no list 'conversations'")
    turns = []
    for turn in said:
        if not isinstance(turn, dict) or not is_text(turn.get("value")):
            raise UserError(f"{where}: a turn has no text 'value'")
        if not isinstance(turn.get("from"), str) or turn["from"] not in ROLES:
            raise UserError(
                f"{where}: a turn is from {short(turn.get('from'))}, which must be one of {', '.join(ROLES)}"
            )
        turns.append((ROLES[turn["from"]], turn["value"]))
    turns = turns if turns[0][0] == "user" else turns[1:]
    if not turns or turns[0][0] != "user" or any(a[0] == b[0] for a, b in pairwise(turns)):
        raise UserError(f"{where}: its turns must be human and gpt in alternation")
    if any(IMAGE in text for role, text in turns if role == "assistant"):
        raise UserError(f"{where}: a gpt turn holds {IMAGE}")
    return turns


# --- where records lie ------------------------------------------------------------------------------------------------


def _indexed(file: Path, cache: Path | None) -> np.ndarray:
    """i64[N, 2]: first and last + 1 byte of each record, found once where there is a folder to keep it in."""
    stat = file.stat()
    name = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    kept = cache / "records" / f"{file.stem}-{name}.i64" if cache else None
    if kept is not None and kept.is_file():
        return np.fromfile(kept, np.int64).reshape(-1, 2)
    places = np.array(list(_records(file)), np.int64).reshape(-1, 2)
    if not len(places):
        raise UserError(f"{file}: no list of records, or an empty one")
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        places.tofile(part)
        part.replace(kept)
    return places


def _records(file: Path) -> Iterator[tuple[int, int]]:
    """Where the objects of a JSON list begin and end, in bytes; what is inside of them is not looked at."""
    if not file.stat().st_size:
        return
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text:
        if text[:4096].removeprefix(BOM_UTF8).lstrip()[:1] != b"[":
            return
        depth = start = 0
        for found in _TOKENS.finditer(text):
            mark = found[0]
            if mark in (b"[", b"{"):
                start = found.start() if depth == 1 and mark == b"{" else start
                depth += 1
            elif mark in (b"]", b"}"):
                depth -= 1
                if depth == 1 and mark == b"}":
                    yield start, found.end()
            elif depth == 1:
                raise UserError(f"{file}: the list holds something else than records")
        if depth:
            raise UserError(f"{file}: the list of records is not closed: is the file complete?")
