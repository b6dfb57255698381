"""What a run writes down: metrics.jsonl, TensorBoard and the progress bar."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

# Peak dense bf16 FLOP/s of one JAX device (data sheets of Google and NVIDIA), by a part of its `device_kind`; the first
# match counts. JAX calls v5e "TPU v5 lite", v5p "TPU v5" and v6e "TPU v6 lite".
PEAK_FLOPS = (
    ("TPU v6", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
)


def peak_flops(kind: str) -> float | None:
    """Of one device of this `device_kind`; None where it is not known (a CPU)."""
    return next((peak for name, peak in PEAK_FLOPS if name in kind), None)


def mfu(flops: float, seconds: float) -> float | None:
    """The share of all devices' peak that `flops` in `seconds` is; None where the peak is not known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else flops / seconds / (peak * jax.device_count())


class MetricsLog:
    """Appends to WORKDIR/metrics.jsonl and WORKDIR/tensorboard; a context manager; only the first process writes.

    A run that continues at `step` drops the lines past it: they belong to steps that will be done again. So each step
    has at most one line, whatever happened in between.
    """

    def __init__(self, workdir: Path, step: int, steps: int):
        self.writing = jax.process_index() == 0
        self.bar = tqdm(total=steps, initial=step, unit="step", desc="train", disable=not self.writing, mininterval=1.0)
        if not self.writing:
            return
        from tensorboardX import SummaryWriter

        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        part.replace(path)  # at once: a run killed here must not have lost what it logged
        self.file = path.open("a")
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line: {"step": step, **values}; the bar shows the losses."""
        if not self.writing:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in values.items() if "loss" in name}, refresh=False)

    def advance(self) -> None:
        self.bar.update()

    def flush(self) -> None:
        """Everything written so far is on disk: called before each checkpoint, which must never know more."""
        if self.writing:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.board.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writing:
            self.file.close()
            self.board.close()


class Trace:
    """A profile of the steps first ... last in a folder, made by the first process; a context manager."""

    def __init__(self, folder: Path, steps: Sequence[int]):
        self.folder, self.steps, self.running = folder, tuple(steps), False

    def before(self, step: int) -> None:
        if self.steps and step == self.steps[0] and jax.process_index() == 0:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, step: int, state: Any) -> None:
        """state: what the step made, which is waited for."""
        if self.running and step == self.steps[1]:
            jax.block_until_ready(state)
            self.__exit__()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
            print(f"profile of steps {self.steps[0]} to {self.steps[1]}: {self.folder} (for TensorBoard or xprof)")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl (none when there is no file); a last line cut by a crash is left out."""
    if not path.exists():
        return []
    complete = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in complete if line]
