#!/usr/bin/env bash
# Run a command of the project in its own virtual environment, which is made on the first call.
#   launch/local.sh zoo train configs/tarflow/digits.py
#   launch/local.sh pytest
# Only Python 3.11 to 3.14 with venv is needed: the newest one found is taken, and JAX's newest release with it.
# EXTRAS=dev,torch adds extras; PYTHON=python3.12 chooses the interpreter.
set -euo pipefail
if [ $# -eq 0 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0"
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}

extras=${EXTRAS:-dev}
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  extras=$extras,cuda
elif [ -e /dev/accel0 ] || [ -n "${TPU_WORKER_ID:-}" ] || [ -e /dev/vfio/0 ]; then
  extras=$extras,tpu
fi

# Installed once; again only when pyproject.toml, the extras or the place change.
stamp=$venv/.zoo-installed
want="$( (cat "$root/pyproject.toml"; echo "$extras $root") | cksum)"
if [ ! -x "$venv/bin/python" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
  echo "launch/local.sh: installing zoo[$extras] into $venv (once; takes a minute or two)" >&2
  if ! [ -x "$venv/bin/pip" ]; then
    python=${PYTHON:-$("$root/launch/pythons.sh")} # the newest comes first
    python=${python%%$'\n'*}
    if [ -z "$python" ]; then
      echo "launch/local.sh: no Python 3.11 to 3.14 with venv found; install one, or set PYTHON=/path/to/python3.13" >&2
      exit 2
    fi
    rm -rf "$venv" # a half-made one has no pip
    "$python" -m venv "$venv" >&2 || {
      echo "launch/local.sh: $python could not make a virtual environment in $venv; see the message above" >&2
      exit 2
    }
  fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "${root}[$extras]" >&2 || {
    echo "launch/local.sh: the installation failed; see the message above" >&2
    exit 2
  }
  echo "$want" >"$stamp"
fi
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
exec "$@"
