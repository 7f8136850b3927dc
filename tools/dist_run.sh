#!/usr/bin/env bash
# The common part of dist_train.sh and dist_test.sh:
#   tools/dist_run.sh SCRIPT N [arguments of the script]
set -euo pipefail
tools=$(cd "$(dirname "$0")" && pwd)
script=$1
n=$2
shift 2

if ! [[ $n =~ ^[1-9][0-9]*$ ]]; then
    echo "dist_run.sh: error: the number of processes must be 1 or more, but got '$n'" >&2
    exit 2
fi

export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"

# One process reads the configuration and looks for the data first, so that a
# mistake is said once and before anything starts.
LOCAL_WORLD_SIZE=$n python "$tools/$script" "$@" --check

# Without a GPU the processes share the cores, of which torchrun would give each just
# one, and the allocator is set up for them. What is set already stays.
if ! command -v nvidia-smi > /dev/null; then
    threads=$(($(getconf _NPROCESSORS_ONLN) / n))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    allocator=$(python -m convmlp_mm.launch)
    eval "$allocator"
fi

exec python -m torch.distributed.run \
    --nnodes "${NNODES:-1}" \
    --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" \
    --master_port "${PORT:-29500}" \
    --nproc_per_node "$n" \
    "$tools/$script" "$@" --launcher pytorch
