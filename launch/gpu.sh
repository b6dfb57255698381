#!/usr/bin/env bash
# Runs a command on the GPUs of this machine, or of a Slurm allocation, and again each time it ends with 75 (saved, run
# me again).
#
#   bash launch/gpu.sh [--dry-run] COMMAND                           here: one process, all GPUs
#   bash launch/gpu.sh [--dry-run] --slurm [SBATCH OPTIONS] -- COMMAND   submits launch/slurm.sh, which calls this again
#
# For example: bash launch/gpu.sh --slurm --nodes=2 --time=4:00:00 -- vmod train --config configs/tiny.py --workdir runs/x
#
# Within an allocation the command runs by srun, a process a GPU; there the job itself is requeued (see slurm.sh). The
# checkout and the workdir must be in a folder that all nodes share. --dry-run prints every command and runs none.
set -euo pipefail
AGAIN=75 # exit code: saved, run me again

dry=''
if [ "${1:-}" = --dry-run ]; then
  dry=yes
  shift
fi
if [ $# = 0 ]; then
  echo "gpu.sh: the command is missing; see the head of launch/gpu.sh" >&2
  exit 2
fi

show() {
  printf '+ ' >&2
  printf '%q ' "$@" >&2
  printf '\n' >&2
}

# Prints a command, and runs it unless this is a dry run.
call() {
  show "$@"
  if [ -z "$dry" ]; then "$@"; fi
}

fail() {
  echo "gpu.sh: $1" >&2
  exit "$2"
}

if [ "$1" = --slurm ]; then
  shift
  options=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  if [ $# -lt 2 ]; then fail "the command is missing: --slurm [SBATCH OPTIONS] -- COMMAND" 2; fi
  cd "$(dirname "$0")/.."
  call sbatch "${options[@]}" launch/slurm.sh "${@:2}" || fail "the job was not submitted" $?
  exit
fi

# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh"
if [ -n "$dry" ]; then echo "+ environment cuda" >&2; else environment cuda; fi

if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; then
  code=0
  call srun "$@" || code=$? # of the tasks that end with 75 none may kill the others: JAX ends what hangs
  case "$code" in
    0 | "$AGAIN") exit "$code" ;;
    *) fail "the command failed in job $SLURM_JOB_ID with exit code $code; nothing of it runs any more" "$code" ;;
  esac
fi

show "$@"
if [ -n "$dry" ]; then exit; fi
stopped='' child=''
trap 'stopped=yes; kill -TERM $child' TERM INT
while true; do
  "$@" &
  child=$!
  code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ended `wait`, the command is still saving
    code=0
    wait "$child" || code=$?
  done
  if [ "$code" != "$AGAIN" ] || [ -n "$stopped" ]; then break; fi
  echo "gpu.sh: the run was stopped and has saved; it goes on" >&2
done
case "$code" in
  0) ;;
  "$AGAIN") fail "stopped and saved; the same command goes on" "$code" ;;
  *) fail "the command failed with exit code $code" "$code" ;;
esac
