#!/usr/bin/env bash
# Everything CI checks: style, types, tests. Arguments go to pytest, e.g. scripts/test.sh -k layout -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh dev

echo "[test] ruff check"
ruff check .
echo "[test] ruff format --check"
ruff format --check .
echo "[test] mypy"
mypy
echo "[test] pytest"
# Two workers: most tests keep one core busy. The last command, so that pytest's summary is the last line and its status
# is the script's.
python -m pytest -q -n 2 --dist worksteal "$@"
