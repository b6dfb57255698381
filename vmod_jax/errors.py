"""The one exception for mistakes that a user can mend."""

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

NAMED = 3  # how many of many names an error gives


class UserError(Exception):
    """One line that says what is wrong and what to do; the command line prints it and exits with code 2."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with its complaints as UserErrors: one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def few(names: Sequence[str]) -> str:
    """ "a, b, c and 24 more": errors have a bounded length, however long the names that they came of."""
    more = len(names) - NAMED
    shown = ", ".join(name if len(name) <= 160 else f"{name[:150]}..." for name in names[:NAMED])
    return f"{shown} and {more} more" if more > 0 else shown


def short(value: Any) -> str:
    """A value as an error shows it: its repr, cut at 80 characters."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists in lists
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:70]}..."


def user_path(given: str | Path) -> Path:
    """A path that a user gives: `~` and `~name` are home folders. UserError for a user who has none.

    Every option, every key of a configuration and every function that takes a path from a user goes through it; doing
    it again changes nothing.
    """
    path = Path(os.path.expanduser(given))
    if not (path.parts and path.parts[0].startswith("~")):
        return path
    if str(given).startswith("~") and not path.exists():
        raise UserError(f"{short(str(given))}: no home folder of that user is known; write the path in full")
    return path.absolute()  # a name that begins so: nobody is to take it for a home later


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number that a float holds; true and false are none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond float's range
        return False


def is_text(value: Any) -> bool:
    """Whether a value of a JSON file is text that can be written: no half of a character (a lone surrogate) in it."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def read_json(path: str | Path, advice: str = "download it again") -> Any:
    """A JSON file's value; a byte order mark in front is skipped. Raises UserError, with `advice`, for a broken one."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {advice}") from None
    except RecursionError:
        raise UserError(f"{path} cannot be read (it is nested too deeply); {advice}") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: it is not a JSON file ({short(error)}); {advice}") from None


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of one record or line of a file; a byte order mark in front is skipped. Raises UserError, `where` in
    front, for a broken one."""
    try:
        return json.loads(text.removeprefix("\ufeff") if isinstance(text, str) else text)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({short(error)})") from None
