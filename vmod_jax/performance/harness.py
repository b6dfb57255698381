"""How speed is measured and written down, the same for everything that `vmod bench` runs.

A row is in the file as soon as it is measured (`Rows`), and what fails is a row that says why.

The object: {machine, versions, environment, rows: [row(...)], ...}. `ratio` is candidate / baseline, lower is better,
and stands beside `formula_ratio`, what the closed form of `models/flops.py` lets one hope for.
"""

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vmod_jax.errors import UserError
from vmod_jax.machine import describe_environment, describe_machine, describe_versions, machine_line

log = logging.getLogger(__name__)

# --- timing -----------------------------------------------------------------------------------------------------------


def interleave(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 1,
    seconds: float = float("inf"),
    about: str = "rounds",
) -> dict[str, list[float]]:
    """Times functions in turn, one call of each a round, in alternating order: {name: seconds of each round}.

    The functions must have done all their work when they return (`jax.block_until_ready`). Only calls next to each
    other are comparable where clocks and neighbours change: compare them by `pair`. Rounds stop early, at an odd
    number, once `seconds` have gone by; `warm_up` calls of each come before and are not counted. On a terminal a bar
    named `about` shows how far it is.
    """
    for run in contenders.values():
        for _ in range(warm_up):
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    for turn in tqdm(range(rounds), about, leave=False, disable=None):
        if turn % 2 and time.perf_counter() - began > seconds:
            break
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - start)
    return times


def pair(candidate: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """{candidate, baseline, spread} of interleaved times: the round with the median ratio, and how ratios vary.

    spread: the distance between the quartiles of the rounds' ratios (0 for one round).
    """
    by_ratio = sorted(zip(candidate, baseline, strict=True), key=lambda both: both[0] / both[1])
    ratios = [a / b for a, b in by_ratio]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (0.0, 0.0, 0.0)
    middle = by_ratio[(len(by_ratio) - 1) // 2]
    return {"candidate": middle[0], "baseline": middle[1], "spread": high - low}


# --- what is written --------------------------------------------------------------------------------------------------


def row(name: str, kind: str, candidate: float, baseline: float, **more: Any) -> dict[str, Any]:
    """A row with every key a row has: what does not apply is None.

    kind: flops, forward, train_step, memory, peer...; `candidate` and `baseline` are in one unit, lower is better.
    more: formula_ratio, spread, dtype, remat, tokens_per_frame, frames, text_tokens, or keys of one benchmark's own.
    """
    measured = {"name": name, "kind": kind, "candidate": candidate, "baseline": baseline, "ratio": candidate / baseline}
    return measured | dict.fromkeys(_MAY_BE_NONE) | more


_MAY_BE_NONE = ("formula_ratio", "spread", "dtype", "remat", "tokens_per_frame", "frames", "text_tokens")


def failed_row(name: str, kind: str, error: Exception) -> dict[str, Any]:
    """A row in place of one that could not be measured: no figures, and `error`, the first line of why."""
    why = (str(error).strip().splitlines() or [""])[0]
    keys = ("candidate", "baseline", "ratio", *_MAY_BE_NONE)
    return {"name": name, "kind": kind} | dict.fromkeys(keys) | {"error": f"{type(error).__name__}: {why}"[:300]}


class Rows(list[dict[str, Any]]):
    """The rows of a benchmark, in a file (None: in none) with the machine as soon as each is added."""

    def __init__(self, path: Path | None = None):
        super().__init__()
        self.path = path

    def append(self, entry: dict[str, Any]) -> None:
        super().append(entry)
        self.write({})

    def extend(self, entries: Iterable[dict[str, Any]]) -> None:
        for entry in entries:
            self.append(entry)

    def write(self, more: dict[str, Any]) -> None:
        """The file as it is now, with `more` keys."""
        if self.path is not None:
            write_json(self.path, {"rows": [*self]} | more)

    @contextmanager
    def attempt(self, name: str, kind: str) -> Iterator[None]:
        """What is measured in here may fail (a device without room, say): then the row is its error, and more follow.

        What a user can mend still ends the benchmark.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # whatever a library or a driver throws
            self.append(failed_row(name, kind, error))
            log.warning("%s could not be measured: %s", name, self[-1]["error"])


def print_table(rows: Sequence[dict[str, Any]], unit: str) -> None:
    """Prints rows as aligned columns and, where times were taken, the machine."""
    width = max(len(entry["name"]) for entry in rows)
    print(f"{'':{width}}  {unit:>10}    baseline   ratio  formula  spread  dtype     remat")
    for entry in rows:
        if entry["ratio"] is None:
            print(f"{entry['name']:{width}}  {entry['error']}")
            continue
        formula, spread = (
            "" if entry[key] is None else f"{entry[key]:.3f}"  # what does not apply stays empty
            for key in ("formula_ratio", "spread")
        )
        line = (
            f"{entry['name']:{width}}  {entry['candidate']:10.4g}  {entry['baseline']:10.4g}  {entry['ratio']:6.3f}  "
            f"{formula:>7}  {spread:>6}  {entry['dtype'] or '':8}  {entry['remat'] or ''}"
        )
        print(line.rstrip())
    if any(entry["spread"] is not None for entry in rows):
        print(f"on {machine_line(describe_machine())}")


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes a benchmark's results with the machine, the versions and the environment they were got on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = {"machine": describe_machine(), "versions": describe_versions(), "environment": describe_environment()}
    part = path.with_name(path.name + ".part")  # who is cut off while writing has the file before
    part.write_text(json.dumps(where | results, indent=1) + "\n")
    part.replace(path)
