#!/usr/bin/env bash
# Lint and the whole test suite, in an environment that is made first if need be.
#
#   tools/run_tests.sh [ARGUMENT OF PYTEST ...]    for example: -m 'not slow' -k wheel
#
# The choices of tools/setup.sh (STACK, PYTHON, ...) hold here too.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(bash tools/setup.sh tests analysis deploy)
PATH="$(dirname "$python"):$PATH"
export PATH

status=0
"$python" -m ruff check . || status=1
"$python" -m ruff format --check . || status=1
# One process for each of up to four cores, with one thread each: most of the time goes
# into starting tools.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$python" -m pytest -n "$((cores < 4 ? cores : 4))" --dist loadgroup "$@" || status=1
exit "$status"
