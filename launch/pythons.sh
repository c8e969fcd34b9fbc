#!/usr/bin/env bash
# The supported interpreters that start here and can make a virtual environment, the newest first, one of each version.
#   launch/pythons.sh
set -euo pipefail
shopt -s nullglob
for version in 3.14 3.13 3.12 3.11; do
  for candidate in "python$version" python3 python "${HOME:-}"/.pyenv/versions/"$version".*/bin/python /usr/local/bin/"python$version"; do
    # "Start": version managers leave shims that name a version and then refuse to run it.
    if "$candidate" -c "import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" >/dev/null 2>&1; then
      echo "$candidate"
      break
    fi
  done
done
