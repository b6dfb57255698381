#!/usr/bin/env bash
# Installs what is missing and checks everything: style, types, tests.
# usage: bash launch/test.sh [--with PYTHON] [--all] [PYTEST OPTIONS]
#   --all: the slow tests too; --all -m slow: only those
#   --with PYTHON: the tests alone, in one process, in that Python's environment as it is: nothing is installed
#
# The conversions are tested against PyTorch. Where pip finds only PyTorch's CUDA build (some GB), the CPU build is at
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh"

if [ "${1:-}" = --with ]; then
  [ $# -gt 1 ] || { echo "test.sh: --with needs a Python" >&2 && exit 2; }
  PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$2" -m pytest "${@:3}"
fi
environment dev,gguf,serve
environment torch || echo "PyTorch could not be installed: the tests that need it will be skipped."
case " $* " in *" --all "*)
  # XLA's compiler for TPUs, beside the environment: within it, every JAX program would look for a TPU.
  export VMOD_LIBTPU=$VIRTUAL_ENV/libtpu/libtpu/libtpu.so
  wanted=$(python -c 'from importlib.metadata import requires
print(*(need.split(";")[0] for need in requires("jax") if need.startswith("libtpu")))')
  [ -f "$VMOD_LIBTPU" ] || python -m pip install --quiet --disable-pip-version-check --no-deps \
    --target "$VIRTUAL_ENV/libtpu" "$wanted" || echo "No libtpu: the test that needs it will be skipped."
  ;;
esac

ruff check .
ruff format --check .
pyright
exec pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
