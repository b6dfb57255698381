#!/usr/bin/env bash
# Installs what is missing and checks everything: style, types, tests.
# usage: bash launch/test.sh [--all] [PYTEST OPTIONS]        --all: the slow tests too; --all -m slow: only those
#
# The conversions are tested against PyTorch. Where pip finds only PyTorch's CUDA build (some GB), the CPU build is at
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh"

environment dev,serve
environment torch || echo "PyTorch could not be installed: the tests that need it will be skipped."

ruff check .
ruff format --check .
pyright
exec pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
