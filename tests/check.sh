#!/usr/bin/env bash
# The one list of checks: make test, make check, pre-commit and CI all come here.
set -euo pipefail
cd "$(dirname "$0")/.."

ruff format --check .
ruff check .
[ "${1:-all}" = lint ] && exit 0

# JupyterLab and Matplotlib write their settings somewhere; let it be a place that goes.
settings=$(mktemp -d)
trap 'rm -rf "$settings"' EXIT
export IPYTHONDIR="$settings/ipython" MPLCONFIGDIR="$settings/matplotlib"

tests/chromium.sh
python -m pytest -q
python -m pytest -q --nbval notebooks --nbval-current-env --nbval-cell-timeout 300 \
  --nbval-sanitize-with tests/sanitize.cfg -p no:cacheprovider
