#!/usr/bin/env bash
# Runs a command on every worker of a Cloud TPU, from creating it to its end, and again after each pre-emption.
#
#   bash launch/tpu.sh run NAME --zone ZONE --type TYPE [OPTIONS] -- COMMAND
#   bash launch/tpu.sh delete NAME --zone ZONE
#
#   --type TYPE        accelerator: v5litepod-16, v5p-8, v6e-8, ...
#   --version RUNTIME  of the TPU VM (default: what Google names for the type)
#   --spot             may be pre-empted, and costs less
#   --slices N         so many slices of TYPE
#   --bucket BUCKET    mounts it on every worker at ~/bucket, which all of them see: put the workdir there
#   --delete           deletes the TPU when the command has ended well
#   --dry-run          prints every command, runs none
#
# For example, from a machine where `gcloud auth login` was done and compute/project is set:
#
#   bash launch/tpu.sh run pod --zone us-west4-a --type v5litepod-16 --spot --bucket my-bucket --delete -- \
#     vmod train --config configs/tiny.py --workdir '~/bucket/runs/tiny'
#
# NAME is a queued resource: it is used when it is there, else made and waited for. The committed code (git's HEAD) is
# copied to all workers and installed; COMMAND runs in its folder, the output comes back here. A run that ends with 75
# (saved, run me again), or whose TPU is gone, is started again, on a new TPU where need be, and goes on from its last
# checkpoint. Whatever else fails ends this script with one line that says so; the TPU then stays, and costs.
#
# BUCKET needs a hierarchical namespace, for only there does renaming a folder, which makes a checkpoint whole, happen
# at once: gcloud storage buckets create gs://BUCKET --location REGION --uniform-bucket-level-access \
#   --enable-hierarchical-namespace
set -euo pipefail
cd "$(dirname "$0")/.."

POLL=${VMOD_POLL:-30} # seconds between two looks at the TPU's state
AGAIN=75              # exit code: saved, run me again

usage() {
  echo "tpu.sh: $1; see the head of launch/tpu.sh" >&2
  exit 2
}

# fail MESSAGE [CODE]: one line, and how to end what still runs.
fail() {
  echo "tpu.sh: $1. $name may still run and cost; delete it: bash launch/tpu.sh delete $name --zone $zone" >&2
  exit "${2:-1}"
}

# Prints a command, and runs it unless this is a dry run.
call() {
  printf '+ ' >&2
  printf '%q ' "$@" >&2
  printf '\n' >&2
  if [ -z "$dry" ]; then "$@"; fi
}

tpus() { call gcloud compute tpus queued-resources "$@" --zone "$zone"; }

on_all() { tpus ssh "$name" --node all --worker all --command "$1"; }

# Sets `now` to the state of NAME (ACTIVE, SUSPENDED, ...), to nothing when there is none.
look() {
  now=$(tpus list --filter "name~/$name\$" --format 'value(state.state)') || fail "the state of $name could not be read"
}

remove() { tpus delete "$name" --force --quiet || fail "deleting $name failed"; }

# Sees to it that NAME is there and ready, with the code installed.
prepare() {
  local folder shape=(--node-id "$name")
  if [ "$slices" -gt 1 ]; then shape=(--node-count "$slices" --node-prefix "$name"); fi
  look
  case "$now" in
    FAILED | SUSPENDING | SUSPENDED) # a pre-empted one never comes back by itself
      remove
      now=
      ;;
  esac
  if [ -z "$now" ]; then
    tpus create "$name" --accelerator-type "$type" --runtime-version "$version" "${shape[@]}" ${spot:+--spot} ||
      fail "creating $name failed"
    look
  fi
  while [ -z "$dry" ] && [ "$now" != ACTIVE ]; do
    case "$now" in FAILED | SUSPENDING | SUSPENDED | DELETING) fail "$name is $now" ;; esac
    echo "$name: ${now:-not there yet}" >&2
    sleep "$POLL"
    look
  done
  folder=$(mktemp -d)
  call git archive --format tar.gz --output "$folder/vmod.tar.gz" HEAD || fail "packing the code failed"
  tpus scp "$folder/vmod.tar.gz" "$name:" --node all --worker all || fail "copying the code to $name failed"
  rm -rf "$folder"
  on_all "mkdir -p vmod && tar -xzf vmod.tar.gz -C vmod && bash vmod/launch/tpu_worker.sh install $bucket" ||
    fail "installing on $name failed"
}

# Whether NAME has gone: looked at a few times, for its state follows a lost connection after a while.
gone() {
  for _ in 1 2 3 4 5 6; do
    look
    if [ "$now" != ACTIVE ]; then return 0; fi
    sleep "$POLL"
  done
  return 1
}

run() {
  local code
  prepare
  while true; do
    code=0
    on_all "bash vmod/launch/tpu_worker.sh run $(printf '%q ' "$@")" || code=$?
    if [ "$code" = 0 ]; then break; fi
    if [ "$code" = "$AGAIN" ]; then look; else gone || fail "the command failed on $name with exit code $code" "$code"; fi
    if [ "$now" = ACTIVE ]; then
      echo "tpu.sh: the run was stopped and has saved; it goes on" >&2
    else
      echo "tpu.sh: $name was pre-empted (${now:-gone}); a new one is made, and the run goes on" >&2
      prepare
    fi
  done
  if [ -n "$delete" ]; then
    remove
  else
    echo "tpu.sh: done. $name still costs; delete it: bash launch/tpu.sh delete $name --zone $zone" >&2
  fi
}

action=${1:-} name=${2:-} zone='' type='' version='' spot='' slices=1 bucket='' delete='' dry='' now=''
if [ "$action" != run ] && [ "$action" != delete ]; then usage "say run or delete"; fi
if [ -z "$name" ] || [[ $name == -* ]]; then usage "say which TPU: $action NAME"; fi
shift 2
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  option=$1
  case "$option" in
    --zone | --type | --version | --slices | --bucket)
      if [ $# -lt 2 ]; then usage "$option needs a value"; fi
      printf -v "${option#--}" %s "$2"
      shift
      ;;
    --spot | --delete) printf -v "${option#--}" yes ;;
    --dry-run) dry=yes ;;
    *) usage "unknown option $option (the command comes after --)" ;;
  esac
  shift
done
if [ -z "$zone" ]; then usage "--zone is missing"; fi
if [ "$action" = delete ]; then
  remove
  exit
fi
if [ -z "$type" ]; then usage "--type is missing"; fi
if ! [[ $slices =~ ^[1-9][0-9]*$ ]]; then usage "--slices $slices is no number"; fi
if [ "${1:-}" != -- ] || [ $# -lt 2 ]; then usage "the command is missing: -- COMMAND"; fi
shift
case "$version$type" in
  v4-*) version=tpu-ubuntu2204-base ;;
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  "$type") usage "--version is missing: no runtime is known for --type $type" ;;
esac
trap 'fail "interrupted" 130' INT
trap 'fail "terminated" 143' TERM
run "$@"
