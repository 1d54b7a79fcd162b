#!/usr/bin/env bash
# Debian's chromium and fonts for tests/test_browser.py, installed where no chromium is on PATH.
set -euo pipefail
command -v chromium >/dev/null && exit 0

as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo -n)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() {
  "${as_root[@]}" apt-get -qq update &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends \
      chromium fonts-liberation fonts-dejavu-core
}
if ! install >"$log" 2>&1; then
  echo "chromium is missing and could not be installed ($(tail -n 1 "$log")); do it by hand: apt-get install chromium" >&2
  exit 1
fi
