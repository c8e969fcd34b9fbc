#!/usr/bin/env bash
# Train on all NVIDIA GPUs of this machine; one process drives them.
#   launch/gpu.sh CONFIG [field=value ...] [--quiet]
#   launch/gpu.sh configs/tarflow/imagenet64.py data.path=/data/imagenet64
# A crash is tried again and goes on from the last checkpoint. SIGTERM and Ctrl-C save and end.
#   --retries N   at most so many times (10)
#   --dry-run     print what would run
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

parse "" "" "$@"
command=(env "EXTRAS=$(extras_for_train)" "$root/launch/local.sh" "${train[@]}")
if [ -n "$dry_run" ]; then
  step "${command[@]}"
  exit
fi
if ! command -v nvidia-smi >/dev/null 2>&1 || ! nvidia-smi -L >/dev/null 2>&1; then
  fail "no NVIDIA driver answers here (nvidia-smi -L); on a CPU, use launch/local.sh zoo train $config"
fi
trap stop TERM INT HUP
retry "${command[@]}"
exit "$code"
