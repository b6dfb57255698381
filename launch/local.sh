#!/usr/bin/env bash
# Installs what is missing and runs the main job: two policies trained on generated video streams, evaluated, streamed.
# usage: bash launch/local.sh [--out DIR]        (options go to `vmod demo`)
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh"

environment serve
exec vmod demo "$@"
