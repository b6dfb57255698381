"""The table of benchmarks, and the one function that runs a row of it on a checkpoint.

A benchmark is a function (lm, config, split, threshold) -> Scored, one file a family.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vmod_jax import workdir as folder
from vmod_jax.errors import UserError
from vmod_jax.evaluation.narration import narration
from vmod_jax.evaluation.scorer import Scored
from vmod_jax.lm import LanguageModel, load
from vmod_jax.training import config as configuration

# name -> (lm, config, split, threshold) -> Scored
BENCHMARKS: dict[str, Callable[[LanguageModel, Any, str, float], Scored]] = {"narration": narration}


def evaluate(
    workdir: str | Path,
    config: Any = None,
    benchmark: str = "narration",
    split: str | None = None,
    threshold: float = 0.0,
    step: int | None = None,
) -> dict[str, Any]:
    """Scores a checkpoint and writes WORKDIR/eval/BENCHMARK.json, with the predictions beside it.

    config: whose `data` section says what to score on (default: the workdir's own); threshold: theta of the metrics,
    0 for argmax alone; split: default config.data.eval_split. Raises UserError for what does not fit.
    """
    if benchmark not in BENCHMARKS:
        raise UserError(f"unknown benchmark '{benchmark}': use one of {', '.join(BENCHMARKS)}")
    workdir = Path(workdir).expanduser()
    folder.read_model(workdir)  # is it a workdir at all?
    if config is None:
        stored = folder.read_config(workdir)
        if stored is None:
            raise UserError(f"{workdir} has no config.json (it was imported): say what to score on with --config")
        config = ConfigDict(stored)
    config = configuration.complete(config)
    split = str(split or config.data.eval_split)
    began = time.perf_counter()
    lm = load(workdir, step=step)
    scored = BENCHMARKS[benchmark](lm, config, split, threshold)
    result = {
        "metrics": scored.metrics,
        "baselines": scored.baselines,
        "samples": scored.samples,
        "seconds": time.perf_counter() - began,
        "split": split,
        "threshold": threshold,
    }
    out = workdir / "eval" / f"{benchmark}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    with out.with_name(f"{benchmark}_predictions.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in scored.predictions)
    return result


def print_scores(result: dict[str, Any]) -> None:
    """A small table: the model, then the blind baselines."""
    names = list(result["metrics"])
    print(" " * 16 + "".join(f"{name:>18}" for name in names))
    for name, metrics in {"model": result["metrics"], **result["baselines"]}.items():
        print(f"{name:<16}" + "".join(f"{metrics[key]:>18.3f}" for key in names))
