#!/usr/bin/env bash
#SBATCH --job-name=vmod
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=vmod-%j.log
#SBATCH --signal=TERM@120
# usage: sbatch [OPTIONS, which go before the ones above] launch/slurm.sh COMMAND        from the checkout
#
# One task a GPU. Two minutes before its time is up, or when it is pre-empted, the run gets SIGTERM, saves and ends with
# 75: then the job goes back into the queue, and on from its last checkpoint.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

code=0
bash launch/gpu.sh "$@" || code=$?
if [ "$code" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID" ||
    echo "slurm.sh: job $SLURM_JOB_ID could not be requeued: submit it again, it goes on from its last checkpoint" >&2
fi
exit "$code"
