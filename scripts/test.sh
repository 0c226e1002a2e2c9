#!/usr/bin/env bash
# Check the code: scripts, lint, formatting, types, tests.
#
#   bash scripts/test.sh                 everything but the slow tests
#   bash scripts/test.sh --all           the slow ones as well
#   bash scripts/test.sh PYTEST_ARG...   hand arguments on to pytest, for example tests/library/test_images.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
jointdit_setup dev

selection=(-m "not slow")
if [ "${1:-}" = --all ]; then
    selection=()
    shift
fi

shellcheck scripts/*.sh .ci/run
ruff check .
ruff format --check .
mypy
python -m pytest -q ${selection[@]+"${selection[@]}"} "$@"
