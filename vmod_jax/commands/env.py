"""`vmod env`: versions, devices, caches and their sizes, where data lie, what is missing: what a bug report needs."""

import os
import platform
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from vmod_jax import caches, machine
from vmod_jax.errors import ArgumentParser, few


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("vmod env", description=__doc__)
    parser.add_argument("--clear-cache", action="store_true", help="delete the compiled programs, and nothing else")
    args = parser.parse_args(argv)
    if args.clear_cache:
        print(f"deleted {caches.clear_compiled_programs()} compiled programs in {caches.compiled_folder()}")
        return 0
    wrapped = textwrap.TextWrapper(100, subsequent_indent=" " * 11, break_on_hyphens=False, break_long_words=False)
    for title, lines in (
        ("machine", where()),
        ("versions", [", ".join(f"{name} {version}" for name, version in machine.describe_versions().items())]),
        ("extras", installed()),
        ("caches", kept()),
        ("data", data()),
        ("variables", [f"{name}={value}" for name, value in machine.describe_environment().items()] or ["none set"]),
    ):
        for line in lines:
            print(wrapped.fill(f"{title:<11}{line}"))
            title = ""
    return 0


def where() -> Iterator[str]:
    """The machine and its devices, or what keeps JAX from finding them."""
    try:
        here = machine.describe_machine()
        yield f"{machine.machine_line(here)} (x {len(here['devices'])})"
    except (RuntimeError, AssertionError) as error:  # a driver that does not fit, a plug-in that finds no device
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        yield f"jax finds no devices (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}): {reason}"
    yield f"{platform.platform()}, Python {platform.python_version()} ({sys.executable})"


def installed() -> Iterator[str]:
    """What is missing of the package's own requirements, and for which extra."""
    try:
        extras = ["", *machine.extras()]
    except metadata.PackageNotFoundError:
        yield "vmod_jax is not installed, only its source is there: pip install ."
        return
    for extra in extras:
        lacks = machine.missing(extra=extra)
        advice = f": pip install '.[{extra}]'" if extra else ": pip install ."
        yield f"{extra or 'base':<7}{f'lacks {few(lacks)}{advice}' if lacks else 'is there'}"


def kept() -> Iterator[str]:
    """Caches and their sizes. What is not made again by itself (VMOD_CACHE/NAME-...: generated data) is `data`'s."""
    off = os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("0", "false", "no", "off")
    compiled = sized("compiled programs", caches.compiled_folder())
    yield f"{compiled} (none are added: JAX_ENABLE_COMPILATION_CACHE)" if off else compiled
    for name in ("frames", "tokenizers"):
        yield sized(name, caches.cache_folder() / name)


def data() -> Iterator[str]:
    """Generated data sets; those of the user lie where the configuration says (data.root)."""
    known = {caches.compiled_folder(), *(caches.cache_folder() / name for name in ("frames", "tokenizers"))}
    folders = sorted(path for path in caches.cache_folder().glob("*/") if path not in known)
    for folder in folders[:5]:
        yield sized("generated", folder)
    if len(folders) > 5:
        yield f"and {len(folders) - 5} more in {caches.cache_folder()}"
    yield "other data sets: where a run's data.root says"
    for name in ("VMOD_DATA", "VMOD_GOLDENS"):
        if name in os.environ:
            yield f"{name}={os.environ[name]}"


def sized(name: str, folder: Path) -> str:
    files, size = caches.size_of(folder)
    return f"{name:<18}{size / 2**20:9.1f} MiB in {files} files  {folder}"
