"""Runs that are killed lose nothing: `vmod train` in processes of its own, held against a run that nobody disturbed.

Twenty kills instead of five: VMOD_KILLS=20 pytest tests/test_survive.py --all -s
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vmod_jax.training.checkpoint import load_params
from vmod_jax.training.metrics import read_metrics
from vmod_jax.training.optimizer import flatten
from vmod_jax.training.processes import HEARTBEAT, PREEMPTED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TIMING = ("step_seconds", "tokens_per_second", "mfu")


class Run:
    """`vmod train` of configs/tiny.py into a folder: one process, or several on this machine, of `devices` each."""

    def __init__(self, folder, data, processes=1, devices=1, **changes):
        self.folder, self.processes = Path(folder), processes
        changes = {"data.max_frames": 16, "data.root": data, "data.val_videos": 4, "keep_checkpoints": 9} | changes
        self.command = [
            sys.executable,
            "-m",
            "vmod_jax",
            "train",
            f"--config={ROOT / 'configs' / 'tiny.py'}",
        ]
        self.command += [f"--workdir={folder}", *(f"--config.{name}={value}" for name, value in changes.items())]
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self):
        """The processes, started."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        started = []
        for index in range(self.processes):
            mine = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": f"{self.processes}"}
            mine = mine | {"JAX_PROCESS_ID": f"{index}"} if self.processes > 1 else {}
            with self.folder.with_suffix(f".{index}.log").open("a") as log:
                started.append(subprocess.Popen(self.command, env=self.environment | mine, stdout=log, stderr=log))
        return started

    def finish(self):
        """Runs until its end. Returns seconds."""
        began = time.monotonic()
        assert [process.wait(600) for process in self.start()] == [0] * self.processes, self.log()
        return time.monotonic() - began

    def log(self, index=0):
        return self.folder.with_suffix(f".{index}.log").read_text()

    def latest(self):
        """The last whole checkpoint, by its name alone."""
        steps = [int(path.name) for path in (self.folder / "checkpoints").glob("*") if path.name.isdigit()]
        return max(steps, default=0)

    def saving(self):
        return any((self.folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def until(condition, process, seconds=300):
    """Waits for it, or for the end of the process."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def lines(folder):
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(Path(folder) / "metrics.jsonl")]


def assert_same(folder, other):
    """Metrics (but for times) and parameters, to the bit."""
    assert lines(folder) == lines(other)
    expected, got = flatten(load_params(other)), flatten(load_params(folder))
    assert expected.keys() == got.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(got[path], x, err_msg=path)


def test_kills_at_random_moments(tmp_path):
    """SIGKILL, SIGKILL in a save and SIGTERM in turn, at moments that are drawn: so many steps further, and a while."""
    kills, rng = int(os.environ.get("VMOD_KILLS", 5)), random.Random(0)
    changes = {"steps": 30, "checkpoint_every": 3, "eval_every": 10}
    whole = Run(tmp_path / "whole", tmp_path / "data", **changes)
    whole.finish()

    table, turn = [], 0
    while len(table) < kills:
        turn += 1
        run = Run(tmp_path / f"killed{turn}", tmp_path / "data", **changes)
        while len(table) < kills:
            how = ("kill", "kill in a save", "term")[len(table) % 3]
            (process,), before, began, said = run.start(), run.latest(), time.monotonic(), len(run.log())
            wanted, in_a_save = before + rng.choice((0, 3, 6)), how == "kill in a save"
            until(lambda r=run, w=wanted, s=in_a_save: r.latest() >= w and (r.saving() or not s), process)
            if not in_a_save:
                time.sleep(rng.uniform(0, 4))
            saving = run.saving()
            process.send_signal(signal.SIGTERM if how == "term" else signal.SIGKILL)
            code = process.wait(120)
            if code == 0 or (code == -signal.SIGTERM and run.latest() == changes["steps"]):  # it was quicker
                break
            if how != "term":
                assert code == -signal.SIGKILL
            elif code == -signal.SIGTERM:  # SIGTERM's usual end: Python has not read the command yet
                assert len(run.log()) == said, run.log()
            else:
                assert code == PREEMPTED, run.log()
                assert "goes on from here" in run.log()[said:]
            table.append((how, time.monotonic() - began, "yes" if saving else "", before, run.latest(), code))
        run.finish()
        assert_same(run.folder, tmp_path / "whole")
        shutil.rmtree(run.folder)
    print(f"\n{'':>4}{'how':>16}{'after s':>9}{'saving':>8}{'from step':>11}{'to step':>9}{'exit':>6}")
    for number, (how, after, saving, before, latest, code) in enumerate(table, 1):
        print(f"{number:>4}{how:>16}{after:>9.1f}{saving:>8}{before:>11}{latest:>9}{code:>6}")
    print(f"{kills} kills of {turn} runs: metrics and parameters to the bit those of the undisturbed run")


def test_two_processes_of_which_one_is_killed(tmp_path):
    """2 x 4 devices: one is killed, both go on; SIGTERM to one stops both at one step; then one process alone."""
    changes = {"steps": 24, "checkpoint_every": 4, "mesh.fsdp": 4, "mesh.data": 2}
    shape = {"processes": 2, "devices": 4, **changes}
    whole = Run(tmp_path / "whole", tmp_path / "data", **shape)
    whole.finish()

    run = Run(tmp_path / "run", tmp_path / "data", **shape)
    first, second = run.start()
    until(lambda: run.latest() >= 4, first)
    second.kill()
    began = time.monotonic()
    code = first.wait(HEARTBEAT + 60)
    print(f"\nprocess 1 killed at {run.latest()}: process 0 ended {time.monotonic() - began:.1f} s later: {code}")
    assert code in (1, -signal.SIGABRT)  # its own error, or JAX's end of the run, whichever is first
    assert second.wait() == -signal.SIGKILL
    assert 4 <= run.latest() < 24

    before = run.latest()
    first, second = run.start()
    until(lambda: "going on from" in run.log(), first)
    second.terminate()
    assert (first.wait(120), second.wait(120)) == (PREEMPTED, PREEMPTED), run.log()
    assert before < run.latest() < 24
    print(f"SIGTERM to process 1 alone: both saved step {run.latest()} and ended")

    run.finish()
    assert_same(run.folder, whole.folder)

    # The checkpoint of step 8 by one process on another mesh: the next steps are the same, to rounding.
    for step in range(12, 25, 4):
        shutil.rmtree(whole.folder / "checkpoints" / f"{step}")
    expected = lines(whole.folder)[8:12]
    alone = Run(whole.folder, tmp_path / "data", 1, 4, **changes | {"mesh.fsdp": 1, "mesh.tensor": 2})
    alone.finish()
    pairs = list(zip(lines(whole.folder)[8:12], expected, strict=True))
    print("one process, data 2 x tensor 2, loss:", ", ".join(f"{a['loss'] / b['loss'] - 1:+.0e}" for a, b in pairs))
    for got, wanted in pairs:
        assert got["step"] == wanted["step"]
        np.testing.assert_allclose(got["loss"], wanted["loss"], rtol=1e-5, err_msg=f"step {got['step']}")
