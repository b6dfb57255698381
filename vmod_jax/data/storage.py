"""Prepared streams on disk: TFDS `array_record` folders, written whole or not at all, read at random."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmod_jax.errors import UserError


@contextmanager
def replacing(out: str | Path, proof: str) -> Iterator[Path]:
    """A new folder beside `out` which takes its place when the block ends well, and is removed when it does not.

    An existing `out` is replaced only when it is empty or holds the file `proof`, which shows that we wrote it.
    """
    out = Path(out).resolve()
    if out.exists() and not (out / proof).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists and holds other files; choose another folder")
    new, old = out.with_name(f".{out.name}.unfinished"), out.with_name(f".{out.name}.old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)
