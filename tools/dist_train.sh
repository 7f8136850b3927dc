#!/usr/bin/env bash
# Train on N processes of this machine, one for each GPU, or on the CPU by gloo:
#   tools/dist_train.sh CONFIG N [options of tools/train.py]
# Several machines: run it on each, with NNODES, NODE_RANK, MASTER_ADDR and PORT.
# If a process dies, all are started again from the last checkpoint, MAX_RESTARTS
# times (3 by default).
set -euo pipefail
if [ $# -lt 2 ]; then
    echo 'usage: dist_train.sh CONFIG N [options of tools/train.py]' >&2
    exit 2
fi
exec bash "$(dirname "$0")/dist_run.sh" train.py "$2" "$1" "${@:3}"
