"""Reading annotation files as their data sets ship them: what is missing is named by file, entry and key, in one
line."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmod_jax.errors import UserError

NUMBER = (int, float)
KINDS = {str: "text", list: "a list", dict: "an object", NUMBER: "a number", bool: "true or false"}


def read_json(path: Path) -> Any:
    """The file's value. Raises UserError where it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path of the annotations") from error
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error


def get(entry: Any, key: str, kind: Any, where: str) -> Any:
    """entry[key], which must be there, of that kind and, where it is a number, finite; else UserError."""
    if not isinstance(entry, dict) or key not in entry:
        raise UserError(f"{where}: no '{key}'")
    value = entry[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: '{key}' is {_short(value)}, not {KINDS.get(kind, 'what is needed')}")
    if kind is NUMBER and not math.isfinite(value):
        raise UserError(f"{where}: '{key}' is {value!r}")
    return value


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
                    yield f"{path.name}: line {number}", json.loads(line)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path of the annotations") from error
    except ValueError as error:
        raise UserError(f"{path.name}: line {number} is not JSON ({error})") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
