"""`vmod table`: trains and scores the rows of a table under equal budgets, with seeds, and draws what came out.

A table is a file of configs/tables/: `get_config()`, what all rows share, and `ROWS = {name: {key: value}}`, what each
changes. Runs live in OUT/ROW/seed-N, so that a table that was stopped goes on, tables share rows and bases, and several
processes can share the work (--rows). Results are read from whatever has been scored there.
"""

import importlib.util
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vmod_jax.demo import banner, stream_flops, train_to_the_end
from vmod_jax.errors import ArgumentParser, UserError
from vmod_jax.evaluate import evaluate
from vmod_jax.lm import load
from vmod_jax.study.benchmark import Row
from vmod_jax.training.config import Config, unknown_key

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


# --- the command ------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> tuple[Config, dict[str, Row]]:
    """A file of configs/tables/. Raises UserError where it is not one."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give one of configs/tables/")
    spec = importlib.util.spec_from_file_location("table", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.get_config(), module.ROWS
    except AttributeError as error:
        raise UserError(f"{path} is no table ({error}): it needs get_config() and ROWS") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("vmod table", description=__doc__)
    parser.add_argument("tables", nargs="+", type=Path, metavar="FILE", help="of configs/tables/")
    parser.add_argument("--out", type=Path, default=Path("runs/tables"), help="where the runs live (%(default)s)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="these alone, with the bases they need")
    parser.add_argument("--seeds", nargs="+", type=int, help="these alone (default: as many as the table says)")
    parser.add_argument("--results", type=Path, help="where tables and plots go (default: OUT)")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    tables = {path.stem: read_table(path) for path in args.tables}
    every = {name: (config, row) for config, rows in tables.values() for name, row in rows.items()}
    if wrong := set(args.rows or ()) - every.keys():
        raise UserError(f"no row '{min(wrong)}' in {', '.join(map(str, args.tables))}: use one of {', '.join(every)}")
    for name in args.rows or every:
        config, row = every[name]
        for base in reversed(chain(every, name)):
            run_row(*every[base], args.out, base, 0)
        for seed in args.seeds or range(row.seeds):
            run_row(config, row, args.out, name, seed)
    results = collect(args.out, list(every))
    print("\n" + markdown(results))
    bases = {row.base for _, row in every.values()}
    shown = {
        title: {name: results[name] for name in rows if name in results and name not in bases}
        for title, (_, rows) in tables.items()
    }
    print(f"wrote {', '.join(map(str, write_results(results, shown, args.results or args.out)))}")
    name = "interleaved" if "interleaved" in results else next(iter(results))
    print(f"next: vmod routing --workdir {args.out}/{name}/seed-0, to see what its routers choose")
    return 0
