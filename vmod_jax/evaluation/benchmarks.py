"""The table of benchmarks, and the one function that runs a row of it on a checkpoint.

A row is documents, a way to respond to them, scores and constant answers: see `evaluation/table.py`. Nothing here knows
which benchmark it runs.
"""

import json
import time
from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vmod_jax import workdir as folder
from vmod_jax.errors import UserError, user_path
from vmod_jax.evaluation.documents import Document, Responses
from vmod_jax.evaluation.intervals import intervals
from vmod_jax.evaluation.judge import judged
from vmod_jax.evaluation.narration import NARRATION
from vmod_jax.evaluation.predictions import fingerprint, predict
from vmod_jax.evaluation.question_benchmarks import QUESTIONS
from vmod_jax.evaluation.step_benchmarks import STEPS
from vmod_jax.evaluation.table import Benchmark, Score, Task
from vmod_jax.lm import load
from vmod_jax.training import config as configuration

BENCHMARKS: dict[str, Benchmark] = {"narration": NARRATION, **STEPS, **QUESTIONS}


def evaluate(
    workdir: str | Path,
    config: Any = None,
    benchmark: str = "narration",
    split: str | None = None,
    threshold: float = 0.0,
    step: int | None = None,
    root: str | Path | None = None,
    limit: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores a checkpoint and writes WORKDIR/eval/BENCHMARK.json, with the predictions beside it.

    config: whose `data` section says what to score on (default: the workdir's own); root: in place of its data.root
    threshold: theta of narration's metrics, 0 for argmax alone; split: default the benchmark's, or
    config.data.eval_split limit: score on the first so many groups only; options: what a benchmark's own flags say
    A run that was killed goes on with what it has predicted. Raises UserError for what does not fit.
    """
    if benchmark not in BENCHMARKS:
        raise UserError(f"unknown benchmark '{benchmark}': use one of {', '.join(BENCHMARKS)}")
    row, workdir = BENCHMARKS[benchmark], user_path(workdir)
    folder.read_model(workdir)  # is it a workdir at all?
    if config is None:
        stored = folder.read_config(workdir)
        if stored is None and root is None:
            raise UserError(f"{workdir} has no config.json (it was imported): say what to score on with --config")
        config = ConfigDict(stored) if stored else configuration.defaults()
    config = configuration.complete(config)
    if root is not None:
        config.data.root = str(user_path(root))
    began = time.perf_counter()

    # --- documents ----------------------------------------------------------------------------------------------------
    lm = load(workdir, step=step, **{name: options[name] for name in ("grid",) if options.get(name)})
    task = Task(lm, config, str(split or row.split or config.data.eval_split), threshold, options)
    documents = _first_groups(row.documents(task), limit)
    if not documents:
        raise UserError(
            f"{benchmark}: nothing to score in the split '{task.split}'; is data.root the data set's folder?"
        )

    # --- predictions --------------------------------------------------------------------------------------------------
    out = workdir / "eval" / f"{benchmark}.json"
    header = {
        "format": 1, "benchmark": benchmark, "root": config.data.root, "split": task.split, "threshold": threshold,
        "limit": limit, "options": options, "model": fingerprint(task.lm),
    }  # fmt: skip
    respond = row.respond(task)
    path = out.with_name(f"{benchmark}.predictions.jsonl")
    responses = predict(path, header, documents, respond, row.batch, final=out.exists())

    # --- scores -------------------------------------------------------------------------------------------------------
    constants = row.constants(task, documents)
    score = lambda some: flat_scores(row.scores, some, responses)  # noqa: E731
    result = {
        "metrics": score(documents),
        "baselines": {name: flat_scores(row.scores, documents, said) for name, said in constants.items()},
        "intervals": intervals(documents, score),
        "samples": len(documents),
        "seconds": time.perf_counter() - began,
        "split": task.split,
        "threshold": threshold,
        **({} if limit is None else {"limit": limit}),
    }
    if options.get("judge"):
        kept = out.with_name(f"{benchmark}.judge.jsonl")
        result["judge"] = judged(options["judge"], options.get("judge_model"), documents, responses, kept)
    if row.write:
        row.write(documents, responses, out.parent)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def flat_scores(
    scores: Mapping[str, Score], documents: Sequence[Document], responses: Responses
) -> dict[str, float | None]:
    """All of a row's metrics side by side: {"strict": {"accuracy": 5.0}} is {"strict/accuracy": 5.0}."""
    return _flat({name: score(documents, responses) for name, score in scores.items()}, "")


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for name, value in tree.items():
        key = f"{prefix}/{name}" if prefix and name else prefix or name
        if isinstance(value, Mapping):
            out |= _flat(value, key)
        elif value is None or isinstance(value, Number):
            out[key] = value  # pyright: ignore[reportArgumentType]
    return out


def _first_groups(documents: Sequence[Document], limit: int | None) -> Sequence[Document]:
    """The documents of the first `limit` groups."""
    kept: set[str] = set()
    for document in documents if limit is not None else ():
        if len(kept) < (limit or 0):
            kept.add(document.group)
    return documents if limit is None else [document for document in documents if document.group in kept]


def print_scores(result: dict[str, Any]) -> None:
    """A small table: the model, its intervals, then the constant answers."""
    names = list(result["metrics"])
    number = lambda value: f"{'-' if value is None else f'{value:.3f}':>18}"  # noqa: E731
    print(" " * 16 + "".join(f"{name:>18}" for name in names))
    rows = {"model": result["metrics"]}
    for place, side in enumerate(("2.5%", "97.5%")):
        rows[side] = {name: span[place] for name, span in result["intervals"].items() if span}
    for name, metrics in (rows | result["baselines"]).items():
        print(f"{name:<16}" + "".join(number(metrics.get(key)) for key in names))
