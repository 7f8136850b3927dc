#!/usr/bin/env bash
# Try tools/slurm_*.sh on the SLURM of slurm_on_one_host.sh with a tiny model:
#   tests/cluster/slurm_on_one_host.sh FOLDER tests/cluster/try_slurm.sh FOLDER
# Training and testing by srun on two nodes; jobs that are told to stop by a signal, that
# are preempted by another partition, requeued by hand, near their time limit
# and cancelled. Takes about fifteen minutes, most of it waiting for SLURM. ONLY names
# some of: signal preempted requeued cancelled limit.
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$1"
export GPUS=2 GPUS_PER_NODE=1 CPUS_PER_TASK=1 GRES= OMP_NUM_THREADS=1
python - "$root" << 'PYTHON'
import sys

sys.path.insert(0, sys.argv[1] + '/tests')
from toy import write_config

write_config('short.py', epochs=2, world_size=2)
pause = dict(type='SignalOnce', marker='never', name='SIGTERM', iteration=-1)
write_config('long.py', [dict(pause, every=0.5)], epochs=10, world_size=2)
# Only the time limit ends the first attempt.
write_config('longer.py', [dict(pause, every=2)], epochs=10, world_size=2)
PYTHON

check() {
    echo "try_slurm.sh: $1: $([ "$2" = "$3" ] && echo ok || echo "FAILED, $2 is not $3")"
}
submit() {
    BATCH=1 SRUN_ARGS="--output=$1.log ${3:-}" \
        bash "$root/tools/slurm_train.sh" low "$1" "$2" "$1" | grep -o '[0-9]*$'
}
trains() {
    for _ in $(seq 120); do
        grep -qs 'Epoch(train) *\[3\]' "$1.log" && return
        sleep 0.5
    done
    echo "try_slurm.sh: $1 does not train" >&2
    return 1
}
# Without waiting for what SLURM does in cycles.
finished() {
    for _ in $(seq 600); do
        [ -n "$(squeue --noheader --jobs "$1" 2> /dev/null)" ] || return 0
        sleep 1
    done
    squeue
}

bash "$root/tools/slurm_train.sh" low short short.py short
check 'srun trains' "$(basename "$(cat short/last_checkpoint)")" epoch_2.pth
bash "$root/tools/slurm_test.sh" low short short.py short/epoch_2.pth --work-dir test |
    tee test.log
check 'srun tests' "$(grep -o 'count: [0-9]*' test.log | tail -n 1)" 'count: 16'

for how in signal preempted requeued; do
    [ -z "${ONLY:-}" ] || [[ " $ONLY " = *" $how "* ]] || continue
    job=$(submit "$how" long.py)
    trains "$how"
    case $how in
        signal) scancel --signal=TERM "$job" ;;
        preempted) srun --partition=high --ntasks=2 --nodes=2 sleep 1 ;;
        requeued) scontrol requeue "$job" ;;
    esac
    finished "$job"
    check "$how: stops" "$(grep -c 'Stopped by a signal' "$how.log")" 1
    check "$how: resumes" "$(grep -c 'resumed epoch: [2-9]' "$how.log")" 1
    check "$how: ends" "$(basename "$(cat "$how/last_checkpoint")")" epoch_10.pth
done

if [ -z "${ONLY:-}" ] || [[ " $ONLY " = *' cancelled '* ]]; then
    job=$(submit cancelled long.py)
    trains cancelled
    scancel "$job"
    finished "$job"
    check 'cancelled: stops' "$(grep -c 'Stopped by a signal' cancelled.log)" 1
    check 'cancelled: is not queued again' \
        "$(grep -c 'is queued again\|resumed' cancelled.log)" 0
fi
if [ -z "${ONLY:-}" ] || [[ " $ONLY " = *' limit '* ]]; then
    job=$(submit limit longer.py '--time=2 --signal=TERM@60')
    finished "$job"
    check 'limit: stops' "$(grep -q 'Stopped by a signal' limit.log && echo 1)" 1
    check 'limit: ends' "$(basename "$(cat limit/last_checkpoint)")" epoch_10.pth
fi
