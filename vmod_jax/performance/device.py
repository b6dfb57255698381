"""`vmod bench device --minutes N`: all that is worth measuring on a borrowed device, in one command.

    vmod bench device --minutes 15 --out results

Parts run one after another in processes of their own, the most wanted first, each under its own limit and all together
under N minutes. A part's rows are in OUT/MACHINE/PART.json as soon as each is measured, what it prints in PART.log; the
same command again goes on with the parts that have not ended well. Nothing is downloaded: the machine needs jax for its
device, flax, optax and orbax-checkpoint, and, for the peer, torch, transformers and peft; "correctness" needs pytest
and the tests beside the package, and is a line that says so where they are not there.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from vmod_jax.errors import UserError, user_path
from vmod_jax.performance.harness import Rows, failed_row, print_table, row

LEAST = 20  # seconds: with less left no part is begun


class Part(NamedTuple):
    """arguments: of `vmod bench`, or of python where the first is "-m"; minutes: its limit; flags: more of XLA_FLAGS"""

    arguments: str
    minutes: float
    flags: str = ""


_TESTS = "-m pytest -q -p no:cacheprovider tests/test_device.py"
_WIDTHS = "--hidden 4096 --intermediate 14336 --heads 32 --kv-heads 8 --vocab 128256 --dtype bfloat16"
_STEP = f"train-step {_WIDTHS} --layers 8 --streams 10x600+2000 --rounds 3"
_STREAM = f"stream {_WIDTHS} --tokens 50"
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

# Llama-3-8B's widths, in order of worth.
PARTS = {
    "correctness": Part(_TESTS, 3, DETERMINISTIC),
    "attention": Part("attention --heads 32 --kv-heads 8 --width 128 --chunk 54 --dtype bfloat16", 2),
    "attention-60k": Part(
        "attention --heads 32 --kv-heads 8 --width 128 --chunk 54 --dtype bfloat16 --cache-only --sizes 61440", 2
    ),
    "stream-1200": Part(f"{_STREAM} --layers 8 --context 1200 --rounds 5", 4),
    "stream-120": Part(f"{_STREAM} --layers 8 --context 120 --rounds 5 --no-peer", 3),
    "stream-1200-32-layers": Part(f"{_STREAM} --layers 32 --context 1200 --rounds 5 --no-peer", 4),
    "step": Part(_STEP, 5),
    "step-deterministic": Part(f"{_STEP} --no-peer", 4, DETERMINISTIC),
    "step-32-layers": Part(f"train-step {_WIDTHS} --layers 32 --streams 10x600+2000 --rounds 3 --no-peer", 6),
}

# The same on small shapes, to try the command where there is no device.
_SMALL = "--hidden 32 --intermediate 48 --layers 2 --heads 4 --vocab 64 --features 12 --lora 4 --rounds 1 --no-peer"
QUICK = {
    "attention": Part("attention --sizes 40 --heads 4 --width 8 --rounds 1 --no-peer", 2),
    "stream": Part(f"stream {_SMALL} --tokens 5 --context 6 --at-once 3", 2),
    "step": Part(f"train-step {_SMALL} --streams 5x6+20", 2),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, required=True, metavar="N", help="for all parts together")
    parser.add_argument("--out", type=user_path, default=Path("results"), metavar="DIR", help="(%(default)s)")
    about = f"these alone, of {', '.join(PARTS)} (with --quick of {', '.join(QUICK)})"
    parser.add_argument("--parts", nargs="+", metavar="PART", help=about)


def run(args: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    """A row a part: its seconds over its limit, or why it failed."""
    deadline = time.monotonic() + 60 * args.minutes
    parts = QUICK if args.quick else PARTS
    if unknown := [name for name in args.parts or () if name not in parts]:
        raise UserError(f"there is no part {unknown[0]}: use {', '.join(parts)}")
    machine = _machine()
    folder = args.out / re.sub(r"[^a-z0-9]+", "-", machine["devices"][0].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    rows.path = rows.path or folder / "device.json"
    for name in args.parts or parts:
        ended = folder / f"{name}.ended"
        if ended.exists():
            print(f"{name}: is there already, {folder / name}.json", flush=True)
            rows.append(row(name, "device", *json.loads(ended.read_text())))
            continue
        limit = min(60 * parts[name].minutes, deadline - time.monotonic())
        if limit < LEAST:
            rows.append(failed_row(name, "device", TimeoutError(f"not begun: --minutes {args.minutes:g} are over")))
            continue
        print(f"{name}: at most {limit:.0f} s, {folder / name}.log", flush=True)
        began = time.monotonic()
        try:
            _run_part(parts[name], folder / name, limit)
        except Exception as error:  # whatever it is, the next part is wanted
            rows.append(failed_row(name, "device", error))
            continue
        seconds = [time.monotonic() - began, limit]
        ended.write_text(json.dumps(seconds))
        rows.append(row(name, "device", *seconds))
    print_table(rows, unit="s")
    return {"folder": str(folder)}


def _run_part(part: Part, path: Path, limit: float) -> None:
    """Runs a part to its end, its output in PATH.log and its rows in PATH.json; kills it at its limit."""
    words = part.arguments.split()
    command = [sys.executable, *words]
    if words[0] != "-m":
        command = [sys.executable, "-m", "vmod_jax", "bench", *words, "--json", f"{path}.json"]
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), part.flags)))
    with open(f"{path}.log", "w") as file:
        # A session of its own, so that what it has started ends with it.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | ({"XLA_FLAGS": flags} if flags else {}),
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"killed at its limit of {limit:.0f} s; rows until then are in its file") from None
            raise
    if code:
        last = (Path(f"{path}.log").read_text(errors="replace").strip().splitlines() or [""])[-1]
        raise RuntimeError(f"ended with {code}: {last}")


def _machine() -> dict[str, Any]:
    """`describe_machine`, asked in another process: this one must not hold the device that the parts need."""
    code = "import json; from vmod_jax.machine import describe_machine; print(json.dumps(describe_machine()))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if said.returncode:
        raise UserError(f"jax finds no device: {(said.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(said.stdout.splitlines()[-1])
