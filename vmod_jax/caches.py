"""Where things are kept that can be made again: decoded frames, generated data, compiled programs."""

import os
from pathlib import Path

from vmod_jax.errors import user_path

# What JAX reads when it is imported. All programs are kept: those of streams are small and quick to compile one by one,
# and many.
_KEEP = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def cache_folder() -> Path:
    """Where decoded frames and generated data are kept: VMOD_CACHE, else ~/.cache/vmod_jax."""
    return user_path(os.environ.get("VMOD_CACHE") or "~/.cache/vmod_jax")


def compiled_folder() -> Path:
    """Where compiled programs are kept: JAX_COMPILATION_CACHE_DIR, else a part of the cache folder."""
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_folder() / "compiled")


def keep_compiled_programs() -> None:
    """Lets JAX, which must not be imported yet, keep what it compiles in `compiled_folder()`, for this process and
    those that it starts. The user's own settings in the environment go first."""
    for name, value in {**_KEEP, "JAX_COMPILATION_CACHE_DIR": str(compiled_folder())}.items():
        os.environ.setdefault(name, value)


def clear_compiled_programs() -> int:
    """Deletes the compiled programs, and nothing else that lies in their folder: -> how many."""
    files = [path for pattern in ("*-cache", "*-atime") for path in compiled_folder().glob(pattern)]
    for path in files:
        path.unlink(missing_ok=True)  # another process may clear them, too
    return sum(path.name.endswith("-cache") for path in files)


def size_of(folder: Path) -> tuple[int, int]:
    """(files, bytes) in a folder and those in it."""
    sizes = [path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()]
    return len(sizes), sum(sizes)
