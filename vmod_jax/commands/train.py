"""`vmod train`: train a model, or go on with a run."""

import sys
from collections.abc import Sequence

from vmod_jax.training import processes
from vmod_jax.training.flags import parse
from vmod_jax.training.loop import train

USAGE = """usage: vmod train --config FILE --workdir DIR [--config.KEY=VALUE ...]

Trains into DIR, or goes on from its last checkpoint. FILE is one of configs/, as a path or a bare name ("tiny"); the
keys are explained in vmod_jax/training/config.py, as in --config.policy=full --config.optimizer.learning_rate=1e-3

On several hosts the same command runs in every process, with DIR in a folder that all of them see. On Cloud TPU and
under Slurm's srun they find each other; elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0),
JAX_NUM_PROCESSES and JAX_PROCESS_ID. launch/tpu.sh and launch/gpu.sh do all this.

exit codes: 0 done; 2 a mistake, said in one line; 75 stopped by SIGTERM (pre-emption), saved: run the same command
again; 130 stopped by SIGINT (Ctrl-C), saved"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code. UserErrors are the caller's to print."""
    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    config, workdir = parse(arguments)
    with processes.ended_by_sigterm():
        processes.join()
        return train(config, workdir).exit_code
