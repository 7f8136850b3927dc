#!/usr/bin/env bash
# Evaluate a checkpoint on N processes of this machine, GPU or CPU:
#   tools/dist_test.sh CONFIG CHECKPOINT N [options of tools/test.py]
# Several machines: run it on each, with NNODES, NODE_RANK, MASTER_ADDR and PORT.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo 'usage: dist_test.sh CONFIG CHECKPOINT N [options of tools/test.py]' >&2
    exit 2
fi
# A test has nothing to go on from.
export MAX_RESTARTS=0
exec bash "$(dirname "$0")/dist_run.sh" test.py "$3" "$1" "$2" "${@:4}"
