#!/usr/bin/env bash
# What launch/tpu.sh runs on each worker of a TPU.
#
#   install [BUCKET]   Python, the package and its dependencies; mounts the bucket at ~/bucket
#   run COMMAND        in the checkout; ends what an earlier run left behind (its connection may have been lost)
set -euo pipefail
export PATH="$HOME/.local/bin:$PATH"
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh"

action=$1 left=/dev/shm/vmod.pid # which a reboot forgets
shift
case "$action" in
  install)
    if ! find_python >/dev/null 2>&1; then # TPU images have Python 3.10
      python3 -m pip install --quiet --user uv
      uv python install 3.12
    fi
    environment tpu
    if [ -n "${1:-}" ] && ! mountpoint --quiet "$HOME/bucket"; then
      if ! command -v gcsfuse >/dev/null; then
        key=/usr/share/keyrings/cloud.google.asc
        curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
        echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
          sudo tee /etc/apt/sources.list.d/gcsfuse.list
        sudo apt-get update --quiet
        sudo apt-get install --quiet --yes gcsfuse
      fi
      mkdir -p "$HOME/bucket"
      gcsfuse --implicit-dirs --metadata-cache-ttl-secs 0 "$1" "$HOME/bucket" # 0: workers see each other's files at once
    fi
    ;;
  run)
    environment tpu
    if [ -f "$left" ] && kill -TERM "$(cat "$left")" 2>/dev/null; then
      timeout 120 tail --pid "$(cat "$left")" -f /dev/null || kill -KILL "$(cat "$left")"
    fi
    echo $$ >"$left"
    exec "$@"
    ;;
esac
