"""A run on one or many processes: how they find each other, take turns, and agree on when to stop.

Every process runs the same command. `join`, before anything asks for a device, connects them where the environment says
that there are several:

    Cloud TPU          found by JAX, on one host or a pod, one slice or several
    Slurm              found by JAX, in tasks that srun started (one task a GPU)
    elsewhere          JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0, JAX_NUM_PROCESSES, JAX_PROCESS_ID

A process that dies takes the others with it: a collective fails, or JAX's coordination service misses its heartbeat,
and at the latest HEARTBEAT seconds later the others are ended (signal 6). All go on from the last checkpoint.
"""

import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from vmod_jax.errors import UserError

PREEMPTED = 75  # exit code after SIGTERM: saved, run the same command again (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # exit code after SIGINT: saved; nobody starts it again but the user

HEARTBEAT = 30  # seconds of silence after which a process counts as dead, and that an ended one waits for the others


def join() -> None:
    """Connects the processes of a run; does nothing in a run of one. Raises UserError when that cannot be done."""
    address, number, index = (
        os.environ.get(name) for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    )
    slurm = int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in os.environ
    platforms: Any = jax.config.values["jax_platforms"]  # JAX itself sets "tpu,cpu" where it finds TPU chips and libtpu
    if not (address or slurm or "tpu" in (platforms or "")) or jax.distributed.is_initialized():
        return
    given: dict[str, Any] = {}
    if address:
        if not (number and index and number.isdigit() and index.isdigit()):
            raise UserError("JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID too, to numbers")
        given = {"coordinator_address": address, "num_processes": int(number), "process_id": int(index)}
        given["cluster_detection_method"] = "deactivate"
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT)
    except ValueError as error:
        if address or slurm:
            raise UserError(f"the processes of this run cannot be connected: {error}") from error
        # a TPU whose host knows of no others: a run of one


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within it, until there is something to save, SIGTERM ends the process with PREEMPTED at once, and says so."""
    usual = signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))
    try:
        yield
    except SystemExit:
        print("stopped by SIGTERM, nothing to save: the same command goes on from here", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, usual)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The block runs in process 0, then in all others: what it makes in a shared folder is made once.

    Nobody goes on before all are through: collectives, unlike this, give up on who is late (on CPUs after 30 seconds).
    """
    if jax.process_index() > 0:
        meet()
    yield
    if jax.process_index() == 0:
        meet()
    meet()


_meetings = itertools.count()


def meet(hours: int = 24) -> None:
    """Waits, without a collective, until all processes are here."""
    if jax.process_count() > 1:
        barrier: Any = ocp.multihost.get_barrier_sync_fn()
        barrier(key=f"vmod_meeting_{next(_meetings)}", timeout_ms=hours * 3600 * 1000)


def seen_by_all(path: Path, wait: float = 60) -> None:
    """Raises UserError where a process does not find what another one wrote (network folders may take a while)."""
    end = time.monotonic() + wait
    while not path.exists():
        if time.monotonic() > end:
            raise UserError(f"process {jax.process_index()} does not see {path}: the workdir must be a shared folder")
        time.sleep(1)


class Interruptions:
    """Turns SIGTERM and SIGINT into the question whether to stop after this step. A context manager.

    One process: the first signal is noted, a second one acts as usual. Many: SIGTERM, which may reach only one of them,
    belongs to JAX's pre-emption service (from `join` on), which names a step to all; SIGINT is passed on to it.
    """

    def __init__(self, start: int = 0) -> None:
        """start: the step that the run goes on from, the same in every process."""
        self.caught: list[int] = []
        self.usual: dict[int, Any] = {}
        self.many = jax.distributed.is_initialized()
        # The service counts steps from 0 on; what it was told before now it may have set for any step up to here.
        self.agreed = self.many and any(multihost_utils.reached_preemption_sync_point(i + 1) for i in range(start))

    def stop(self, step: int) -> bool:
        """Whether to save and stop after `step`: the same answer in every process. To be asked once a step."""
        if self.many:
            self.agreed = multihost_utils.reached_preemption_sync_point(step) or self.agreed
            self.caught = self.caught or [signal.SIGTERM] * self.agreed
            return self.agreed
        return bool(self.caught)

    @property
    def exit_code(self) -> int:
        """What the command says to the one who started it."""
        return 0 if not self.caught else INTERRUPTED if signal.SIGINT in self.caught else PREEMPTED

    def _note(self, number: int, _: Any) -> None:
        self.caught.append(number)
        signal.signal(number, self.usual[number])
        if self.many:
            signal.raise_signal(signal.SIGTERM)

    def __enter__(self) -> "Interruptions":
        with contextlib.suppress(ValueError):  # not the main thread: nothing to catch
            for number in (signal.SIGINT,) if self.many else (signal.SIGINT, signal.SIGTERM):
                self.usual[number] = signal.getsignal(number)
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)
