#!/usr/bin/env bash
# The common part of dist_train.sh and dist_test.sh:
#   tools/dist_run.sh SCRIPT N [arguments of the script]
set -euo pipefail
# With it, cd may go elsewhere, and says where.
unset CDPATH
tools=$(cd "$(dirname "$0")" && pwd)
script=$1 n=$2
shift 2

fail() {
    echo "dist_run.sh: error: $1" >&2
    exit 2
}
[[ $n =~ ^[1-9][0-9]*$ ]] ||
    fail "the number of processes must be 1 or more, but got '$n'"
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} PORT=${PORT:-29500}
MAX_RESTARTS=${MAX_RESTARTS:-3}
for name in NNODES NODE_RANK PORT MAX_RESTARTS; do
    [[ ${!name} =~ ^[0-9]{1,9}$ ]] || fail "$name must be a number, but is '${!name}'"
    # A number that begins with 0 is not octal.
    printf -v "$name" %d "$((10#${!name}))"
done
((PORT >= 1 && PORT <= 65535)) || fail "PORT must be from 1 to 65535, but is $PORT"
((NODE_RANK < NNODES)) ||
    fail "NODE_RANK must be below NNODES, which is $NNODES, but is $NODE_RANK"
((NNODES == 1)) || [ -n "${MASTER_ADDR:-}" ] ||
    fail 'MASTER_ADDR must be an address of the machine with NODE_RANK 0'

export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"

# Without a GPU the processes share the cores, of which torchrun would give each just
# one. What is set already stays.
if ! command -v nvidia-smi > /dev/null; then
    threads=$(($(getconf _NPROCESSORS_ONLN) / n))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
fi

rendezvous=(--rdzv_backend one_machine)
if ((NNODES > 1)); then
    if [ -z "${RDZV_ID:-}" ]; then
        echo 'dist_run.sh: warning: RDZV_ID is not set: whoever reaches the port of' \
            'MASTER_ADDR can run code in this launch; set it to the same secret on' \
            'all machines' >&2
    fi
    rendezvous=(
        --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$PORT"
        --rdzv_id "${RDZV_ID:-convmlp_mm}" --rdzv_conf "is_host=$((NODE_RANK == 0))"
    )
fi
# What the first attempt has left in a store makes the second look for processes that
# are gone: the static rendezvous has one store for all attempts, and so has the dynamic
# one from torch 2.4 on without this variable.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Of a checkout, or of an installed package, which has its tools in .mim.
elastic=$tools/../convmlp_mm/launch/elastic.py
[ -f "$elastic" ] || elastic=$tools/../../launch/elastic.py
exec python "$elastic" "${rendezvous[@]}" \
    --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$n" \
    --max_restarts "$MAX_RESTARTS" --monitor_interval 0.2 \
    "$tools/$script" "$@" --launcher pytorch
