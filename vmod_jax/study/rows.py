"""Tables of training runs: rows that differ in what is named and nothing else, with seeds, and what came out.

The base plays the part of the pretrained language model from which the paper starts; every row begins with its
parameters and trains for the same steps on the same streams. A row's seed is that of its routers and of the order of
its data. A row of another input (CLS only) has a base of its own, trained for the same steps.

Runs live in OUT/ROW/seed-N, so that a table that was stopped goes on, tables share rows and bases, and several
processes can share the work. Results are read from whatever has been scored there.
"""

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmod_jax.data.pipeline import make_buckets, open_streams
from vmod_jax.evaluation.benchmarks import evaluate
from vmod_jax.lm import LanguageModel, load
from vmod_jax.models.flops import linear_flops
from vmod_jax.training.config import Config, unknown_key
from vmod_jax.training.loop import train_to_the_end

# metric -> (heading, whether more is better, digits); the last two are of the row, not of the model's replies
METRICS = {
    "lm_ppl": ("LM-PPL ↓", False, 3),
    "time_diff": ("TimeDiff, s ↓", False, 3),
    "fluency": ("Fluency ↑", True, 3),
    "lm_correctness": ("LM-Correctness ↑", True, 3),
    "time_diff_strict": ("strict TimeDiff, s ↓", False, 3),
    "fluency_strict": ("strict Fluency ↑", True, 3),
    "flops": ("GFLOPs ↓", False, 3),
    "seconds": ("training, s ↓", False, 0),
}
Results = dict[str, dict[str, list[float]]]

# --- rows -------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of a table.

    changes: {dotted key of the configuration: value}; base: the row whose end it starts from, "" for none
    seeds: how many of them, from 0
    """

    changes: dict[str, Any]
    base: str = "base"
    seeds: int = 1


def bases(name: str, **changes: Any) -> dict[str, Row]:
    """Full computation from nothing, in three runs: what to say, then when, then both for longer.

    Weighed more from the start, *when* keeps *what* from being learned.
    """
    recipe = {"policy": "full", "optimizer.learning_rate": 2e-3, "steps": 2000, **changes}
    return {
        f"{name}_what": Row(recipe | {"data.stream_weight": 1.0}, base=""),
        f"{name}_when": Row(recipe, base=f"{name}_what"),
        name: Row(recipe | {"steps": 2500}, base=f"{name}_when"),
    }


BASES = bases("base")


def banner(text: str) -> None:
    print(f"\n=== {text} " + "=" * max(0, 90 - len(text)), flush=True)


def stream_flops(lm: LanguageModel, config: Any) -> int:
    """Linear FLOPs of one pass over the longest stream of the data, in the paper's convention (spec of `flops`)."""
    c = lm.config
    streams = open_streams(config.data, "train", config.model.vision.image_size)
    (bucket,) = make_buckets((), streams, lm.fmt, config.data.max_frames)
    return linear_flops(c.llama, c.kept, bucket.frames, c.tokens_per_frame, bucket.text, c.lora.rank)


# --- one row ----------------------------------------------------------------------------------------------------------


def row_config(config: Config, row: Row, out: Path, seed: int) -> Config:
    """The configuration of one run: what all rows share, what the row changes, its seed and the base it starts from."""
    config = config.copy_and_resolve_references()
    config.init_from = str(out / row.base / "seed-0") if row.base else ""
    config.seed = seed
    for key, value in row.changes.items():
        *path, name = key.split(".")
        section: Any = config
        for parent in path:
            section = section.get(parent, {})
        if name not in section:
            raise unknown_key(key)
        section[name] = value
    return config


def chain(every: dict[str, tuple[Config, Row]], name: str) -> list[str]:
    """The bases of a row, the nearest first."""
    base = every[name][1].base
    return [base, *chain(every, base)] if base else []


def run_row(config: Config, row: Row, out: Path, name: str, seed: int) -> None:
    """Trains and scores a row, or what is left of it."""
    workdir = out / name / f"seed-{seed}"
    if (workdir / "row.json").exists():
        return
    banner(f"{name}, seed {seed}")
    config = row_config(config, row, out, seed)
    began = (workdir / "checkpoints").exists()
    summary = train_to_the_end(config, workdir)
    scores = evaluate(workdir)
    result: dict[str, Any] = {key: scores["metrics"][key] for key in METRICS if key in scores["metrics"]}
    result["flops"] = stream_flops(load(workdir), config) / 1e9
    # A run that went on in another process knows the seconds of its second part only.
    result["seconds"] = None if began else summary.seconds - summary.compile_seconds
    result |= {"steps": config.steps, "baselines": scores["baselines"], "samples": scores["samples"]}
    (workdir / "row.json").write_text(json.dumps(result, indent=1) + "\n")
    # What is left is what a look at the model needs: the optimiser's state of a hundred runs is not.
    shutil.rmtree(workdir / "tensorboard", ignore_errors=True)


# --- all of them ------------------------------------------------------------------------------------------------------


def collect(out: Path, names: Sequence[str]) -> Results:
    """{row: {metric: [a value a seed]}} of the rows that have been scored, in the order of `names`."""
    results: Results = {}
    for name in names:
        files = sorted((out / name).glob("seed-*/row.json"), key=lambda file: int(file.parent.name[5:]))
        found = [json.loads(file.read_text()) for file in files]
        if found:
            results[name] = {metric: [one[metric] for one in found if one[metric] is not None] for metric in METRICS}
            results[name]["seeds"] = [int(file.parent.name[5:]) for file in files]
    return results


def markdown(results: Results) -> str:
    """A table of means and standard deviations (of the sample, where a row has two seeds or more)."""
    lines = ["| row | seeds | " + " | ".join(heading for heading, _, _ in METRICS.values()) + " |"]
    lines.append("|---" * (len(METRICS) + 2) + "|")
    for name, row in results.items():
        cells = [_cell(row[metric], digits) for metric, (_, _, digits) in METRICS.items()]
        lines.append(f"| {name} | {len(row['seeds'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean} ± {spread:.{digits}f}" if len(values) > 1 and max(values) != min(values) else mean


def plot(tables: dict[str, Results], cost: str, path: Path) -> None:
    """Fluency and TimeDiff against `cost` ("flops" or "seconds"), with error bars: a line of two panels a table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.3 * len(tables)), layout="constrained")
    for (title, results), panels in zip(tables.items(), figure.subplots(len(tables), 2, squeeze=False), strict=True):
        for axes, metric in zip(panels, ("fluency", "time_diff"), strict=True):
            for number, (name, row) in enumerate(results.items()):
                if row[cost] and row[metric]:
                    spread = np.std(row[metric], ddof=1) if len(row[metric]) > 1 else 0.0
                    style = {"fmt": "os^vD"[number % 5], "capsize": 3, "markersize": 5, "alpha": 0.8, "label": name}
                    axes.errorbar(np.mean(row[cost]), np.mean(row[metric]), yerr=spread, **style)
            axes.set_xlabel(METRICS[cost][0].removesuffix(" ↓"))
            axes.set_ylabel(METRICS[metric][0])
            axes.grid(alpha=0.3)
        panels[0].set_title(title, loc="left")
        panels[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    figure.savefig(path, dpi=110)


def write_results(results: Results, tables: dict[str, Results], to: Path) -> list[Path]:
    """policies.json and policies.md of all rows, and a plot for each cost, a line a table: -> the files."""
    to.mkdir(parents=True, exist_ok=True)
    files = [to / "policies.json", to / "policies.md", to / "quality-flops.png", to / "quality-seconds.png"]
    files[0].write_text(json.dumps(results, indent=1) + "\n")
    files[1].write_text(markdown(results))
    for cost, file in zip(("flops", "seconds"), files[2:], strict=True):
        plot(tables, cost, file)
    return files
