#!/usr/bin/env bash
# Programs that the tests run and PyPI does not have: a PostgreSQL server, Chromium with its driver, promtool; and
# terraform and kubectl, which Debian does not have either.
# Installs what is missing where it may (root, Debian or Ubuntu), and otherwise says what to install.
set -euo pipefail

# The scanner of tests/infra has dependencies that ours do not go with: it has an environment of its own.
if [ ! -x .venv/scan/bin/checkov ]; then
    "${PYTHON:-python3}" -m venv .venv/scan
    .venv/scan/bin/python -m pip install --quiet --disable-pip-version-check --requirement infra/scanner.txt
fi

missing=()
command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing+=(postgresql)
command -v chromium >/dev/null || missing+=(chromium)
command -v chromedriver >/dev/null || missing+=(chromium-driver)
command -v promtool >/dev/null || missing+=(prometheus)
for program in terraform kubectl; do
    command -v "$program" >/dev/null ||
        echo "tests: $program is missing; tests/infra needs it (infra/README.md says which version)" >&2
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests: ${missing[*]} missing; install them (on Debian: sudo apt-get install ${missing[*]}) and run again" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
