#!/usr/bin/env bash
# Makes the locks anew, one for each minor version of Python: requirements/py311.txt to py313.txt.
# usage: bash launch/lock.sh [--upgrade]        needs uv (pip install uv)
#
# A lock is a pip constraints file: it holds every package that the base and the extras below need on Linux (macOS needs
# no others), and `pip install -c LOCK '.[EXTRAS]'` installs only what is asked for. PyTorch itself,
# pinned in pyproject.toml, and its CUDA packages stay out, so that its CPU build can be taken where there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

for minor in 11 12 13; do
  lock=requirements/py3$minor.txt
  new=$(mktemp)
  pins=$(mktemp)
  if [ -f "$lock" ]; then cp "$lock" "$pins"; fi # uv keeps the versions it finds in its output file
  uv pip compile pyproject.toml --extra serve --extra gguf --extra docs --extra dev --extra torch \
    --python-version "3.$minor" --python-platform linux --no-python-downloads --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet \
    --output-file "$pins" "$@"
  {
    echo "# Python 3.$minor. Made by: bash launch/lock.sh    Used by: pip install -c $lock '.[EXTRAS]'"
    grep -vE '^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==' "$pins"
  } >"$new"
  cat "$new" >"$lock"
  rm "$new" "$pins"
  echo "$lock: $(grep -c == "$lock") packages"
done
