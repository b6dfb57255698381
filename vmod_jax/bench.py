"""`vmod bench NAME`: benchmarks, each printed as a table and written as one JSON object.

The object: {machine, versions, rows: [row(...)], ...}. `ratio` is candidate / baseline, lower is better, and stands
beside `formula_ratio`, what the closed form of `models/flops.py` lets one hope for.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from vmod_jax.errors import ArgumentParser, UserError


class Benchmark(NamedTuple):
    """One entry of `BENCHMARKS`; `run` returns at least {"rows": [...]}, and whatever else belongs in the object."""

    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], dict[str, Any]]


def describe_machine() -> dict[str, Any]:
    """Where a number was measured: {cpu, cores, memory_gib, system, devices: [kind], python}."""
    import jax

    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on, as far as they are installed."""
    versions = {}
    for name in ("vmod_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "torch"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def row(name: str, kind: str, candidate: float, baseline: float, **more: Any) -> dict[str, Any]:
    """A row with every key a row has: what does not apply is None.

    kind: flops, forward, train_step, memory, peer...; `candidate` and `baseline` are in one unit, lower is better.
    more: formula_ratio, spread, dtype, remat, tokens_per_frame, frames, text_tokens, or keys of one benchmark's own.
    """
    keys = ("formula_ratio", "spread", "dtype", "remat", "tokens_per_frame", "frames", "text_tokens")
    measured = {"name": name, "kind": kind, "candidate": candidate, "baseline": baseline, "ratio": candidate / baseline}
    return measured | dict.fromkeys(keys) | more


# --- flops: the paper's FLOPs column ----------------------------------------------------------------------------------


def _flops_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf-config", type=Path, metavar="C", help="a Llama's config.json or its folder (Llama-3-8B)")
    parser.add_argument("--frames", type=int, default=600, help="frames of the stream (%(default)s)")
    parser.add_argument("--tokens", type=int, default=10, help="tokens a frame, CLS included (%(default)s)")
    parser.add_argument("--text", type=int, default=146, help="text tokens (%(default)s)")
    parser.add_argument("--lora", type=int, default=128, help="LoRA rank, 0 for none (%(default)s)")
    parser.add_argument("--keep", type=float, default=0.2, help="share of tokens that routed layers keep (%(default)s)")


def flops_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """TFLOPs of every named policy as the paper counts them (tables 1 and 3), computed, not measured.

    The rows' `formula_ratio` is that of a training step without rematerialisation, attention included.
    """
    from vmod_jax.models import flops
    from vmod_jax.models.depth import POLICIES, make_policy

    for option, least in (("frames", 0), ("tokens", 1), ("text", 0), ("lora", 0)):
        if getattr(args, option) < least:
            raise UserError(f"--{option} is {getattr(args, option)}: give a whole number of at least {least}")
    if args.frames == args.text == 0:
        raise UserError("--frames and --text are both 0: there is nothing to count")
    config = flops.LLAMA_3_8B if args.hf_config is None else _read_llama_config(args.hf_config)

    stream = (args.frames, args.tokens, args.text, args.lora)
    layers = config.num_hidden_layers
    kept = {name: flops.kept_counts(make_policy(name, layers, args.keep), args.tokens) for name in POLICIES}
    tflops = {name: flops.linear_flops(config, counts, *stream) / 1e12 for name, counts in kept.items()}
    rows = [
        row(
            name,
            "flops",
            tflops[name],
            tflops["full"],
            formula_ratio=flops.formula_ratio(config, counts, *stream),
            tokens_per_frame=args.tokens,
            frames=args.frames,
            text_tokens=args.text,
            kept_per_layer=counts,
        )
        for name, counts in kept.items()
    ]
    print(f"{layers} layers, {args.frames} frames x {args.tokens} tokens, {args.text} text tokens, LoRA {args.lora}")
    print_table(rows, unit="TFLOPs")
    return {"rows": rows, "policies": tflops}


def _read_llama_config(path: Path):
    from vmod_jax.models.llama import LlamaConfig

    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no file {path}: --hf-config takes a Hugging Face config.json or its folder") from None
    except ValueError:  # what is not UTF-8 is a ValueError too
        raise UserError(f"{path} is not JSON: --hf-config takes a Hugging Face config.json or its folder") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object: --hf-config takes a Hugging Face config.json or its folder")
    return LlamaConfig.from_hf_config(config)


# --- the command ------------------------------------------------------------------------------------------------------

BENCHMARKS = {
    "flops": Benchmark("the paper's FLOPs column for any model and policy", _flops_arguments, flops_benchmark),
}


def print_table(rows: Sequence[dict[str, Any]], unit: str) -> None:
    """Prints rows as aligned columns."""
    width = max(len(entry["name"]) for entry in rows)
    print(f"{'':{width}}  {unit:>10}  {'baseline':>10}  {'ratio':>6}  {'formula':>7}")
    for entry in rows:
        formula = "" if entry["formula_ratio"] is None else f"{entry['formula_ratio']:.3f}"
        print(
            f"{entry['name']:{width}}  {entry['candidate']:10.4g}  {entry['baseline']:10.4g}  "
            f"{entry['ratio']:6.3f}  {formula:>7}"
        )


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes a benchmark's results with the machine and the versions they were got on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {"machine": describe_machine(), "versions": describe_versions()} | results
    path.write_text(json.dumps(described, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """`vmod bench NAME [--json F] [--quick]` and the benchmark's own options. Raises UserError."""
    parser = ArgumentParser("vmod bench", description="Runs a benchmark and prints its table.")
    benchmarks = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, benchmark in BENCHMARKS.items():
        options = benchmarks.add_parser(name, help=benchmark.about, description=benchmark.about)
        options.add_argument("--json", type=Path, metavar="F", help="write the results to this file")
        options.add_argument("--quick", action="store_true", help="end within ten minutes on two cores")
        benchmark.add_arguments(options)
    args = parser.parse_args(argv)
    results = BENCHMARKS[args.name].run(args)
    if args.json is not None:
        write_json(args.json, results)
