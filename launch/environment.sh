# shellcheck shell=bash
# Sourced by the other scripts: goes to the checkout's root, and `environment EXTRAS` makes and enters a virtual
# environment that holds the package (editable) and its dependencies at the locked versions. What is installed already
# is not installed again. The environment is .venv in the checkout; VMOD_VENV names another, to share it.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# The first Python that runs (a name on PATH may be an empty pyenv shim), has a lock and can make an environment.
find_python() {
  local name
  for name in python3.12 python3.13 python3.11 python3 python; do
    if "$name" -c '
import ensurepip, os, sys, venv
sys.exit(not os.path.exists("requirements/py%d%d.txt" % sys.version_info[:2]))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "No usable Python found: install Python 3.11, 3.12 or 3.13 with its venv module (python3.12 and python3.12-venv)." >&2
  return 2
}

# environment EXTRAS ("serve", "dev,serve", ...): exits when the installation fails.
environment() {
  local extras=$1 venv=${VMOD_VENV:-$PWD/.venv} python lock stamp state
  if ! "$venv/bin/python" -c '' 2>/dev/null; then
    python=$(find_python) || exit $?
    "$python" -m venv --clear "$venv"
  fi
  export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
  unset PYTHONHOME
  lock=requirements/$(python -c 'import sys; print("py%d%d.txt" % sys.version_info[:2])')
  if [ ! -f "$lock" ]; then
    echo "$venv holds a Python without a lock in requirements/: remove that folder and start again." >&2
    exit 2
  fi
  stamp=$venv/.vmod-$extras
  state="$PWD $(cat "$lock" pyproject.toml | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then return; fi
  echo "Installing vmod_jax[$extras] into $venv from $lock (a few minutes the first time)"
  rm -f "$stamp"
  python -m pip install --quiet --progress-bar off --disable-pip-version-check -c "$lock" -e ".[$extras]" || return
  echo "$state" >"$stamp"
}
