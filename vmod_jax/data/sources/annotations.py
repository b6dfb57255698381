"""Reading annotation files as their data sets ship them: what is missing is named by file, entry and key, in one
line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmod_jax import errors
from vmod_jax.errors import UserError, is_number, is_text, parse_json, short

NUMBER = (int, float)
LONGEST = 1e9  # seconds: no video is that long, and a frame's number still a number
KINDS = {
    str: "text",
    (list, dict): "a list or an object",
    list: "a list",
    dict: "an object",
    NUMBER: "a number",
    bool: "true or false",
}


def read_json(path: Path) -> Any:
    """The file's value. Raises UserError where it cannot be read or is not JSON."""
    return errors.read_json(path, "check the path of the annotations")


def get(entry: Any, key: Any, kind: Any, where: str) -> Any:
    """entry[key], which must be there and of that kind; else UserError.

    Text is such as can be written, a number (of seconds) finite and none that no video can have.
    """
    if not isinstance(entry, dict) or key not in entry:
        raise UserError(f"{where}: no '{key}'")
    value = entry[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: '{key}' is {short(value)}, not {KINDS.get(kind, 'what is needed')}")
    if kind is NUMBER and not is_time(value):
        raise UserError(f"{where}: '{key}' is {short(value)}, which is no time of a video")
    if kind is str and not is_text(value):
        raise UserError(f"{where}: '{key}' is {short(value)}, which holds half a character")
    return value


def texts(entry: Any, key: str, kind: type[list] | type[dict], where: str) -> list[str]:
    """The values of entry[key], which must be a list or an object of texts; else UserError."""
    found = get(entry, key, kind, where)
    named = found if isinstance(found, dict) else dict(enumerate(found))
    return [get(named, name, str, f"{where}: '{key}'") for name in named]


def is_time(value: Any) -> bool:
    """Whether a value is a number of seconds that a video can have."""
    return is_number(value) and abs(value) <= LONGEST


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of a file that is one JSON list, or has one JSON object a line (.jsonl); read line by line."""
    if path.suffix != ".jsonl":
        found = read_json(path)
        if not isinstance(found, list):
            raise UserError(f"{path}: a list of records is needed")
        yield from ((f"{path.name}: record {number}", record) for number, record in enumerate(found))
        return
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path.name}: line {number}", parse_json(line, f"{path.name}: line {number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path of the annotations") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({short(error)})") from error
