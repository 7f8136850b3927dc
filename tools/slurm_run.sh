#!/usr/bin/env bash
# The common part of slurm_train.sh and slurm_test.sh:
#   tools/slurm_run.sh SCRIPT PARTITION JOB_NAME [arguments of the script]
set -euo pipefail
# With it, cd may go elsewhere, and says where.
unset CDPATH
tools=$(cd "$(dirname "$0")" && pwd)
script=$1 partition=$2 name=$3
shift 3

GPUS=${GPUS:-8} GPUS_PER_NODE=${GPUS_PER_NODE:-8} CPUS_PER_TASK=${CPUS_PER_TASK:-5}
for variable in GPUS GPUS_PER_NODE CPUS_PER_TASK; do
    if ! [[ ${!variable} =~ ^[1-9][0-9]*$ ]]; then
        echo "slurm_run.sh: error: $variable must be 1 or more, but is '${!variable}'" >&2
        exit 2
    fi
done
GPUS_PER_NODE=$((GPUS < GPUS_PER_NODE ? GPUS : GPUS_PER_NODE))
# As in the toolkits, these are split at spaces.
read -ra srun_args <<< "${SRUN_ARGS:-}"
read -ra py_args <<< "${PY_ARGS:-}"
# GRES= for partitions without GPUs.
gres=${GRES-gpu:$GPUS_PER_NODE}
resources=(
    --partition="$partition" --job-name="$name" ${gres:+--gres="$gres"}
    --ntasks="$GPUS" --ntasks-per-node="$GPUS_PER_NODE"
    --cpus-per-task="$CPUS_PER_TASK"
)
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${PORT:-}" ]; then
    if ! [[ $PORT =~ ^[0-9]{1,5}$ ]] || ((10#$PORT < 1 || 10#$PORT > 65535)); then
        echo "slurm_run.sh: error: PORT must be from 1 to 65535, but is '$PORT'" >&2
        exit 2
    fi
    export MASTER_PORT=$PORT
fi

if [ -n "${BATCH:-}" ] && [ -z "${SLURM_JOB_ID:-}" ]; then
    # The job runs this script again. Two minutes before the time limit, the processes
    # are asked to save; SRUN_ARGS may say otherwise.
    # The quotes are those of /bin/sh, which runs the line: printf %q makes some that
    # only bash knows.
    command=
    for word in bash "$tools/slurm_run.sh" "$script" "$partition" "$name" "$@"; do
        command+="'${word//\'/\'\\\'\'}' "
    done
    exec sbatch "${resources[@]}" --requeue --open-mode=append --signal=TERM@120 \
        "${srun_args[@]}" --wrap "$command"
elif [ -n "${BATCH:-}" ]; then
    # Queued again, by whatever, it goes on from what it has saved, else from a --resume
    # CHECKPOINT among the options.
    export CONVMLP_MM_ATTEMPT=${SLURM_RESTART_COUNT:-0}
    export CONVMLP_MM_LAUNCH_ID=slurm_$SLURM_JOB_ID
    # On the first machine, so that a mistake is said once.
    python "$tools/$script" "$@" "${py_args[@]}" --check
fi

# A process that saves must not be killed because another has ended; one that waits for a
# dead process must be, after a minute.
code=0
srun "${resources[@]}" --kill-on-bad-exit=0 --wait=60 "${srun_args[@]}" \
    python -u "$tools/$script" "$@" "${py_args[@]}" --launcher slurm || code=$?

# PREEMPTED of convmlp_mm/launch/process.py, and ended by SIGTERM before there was anything to
# save. A job that was cancelled is no longer running, nor is one that SLURM itself is
# about to queue again.
if [ -n "${BATCH:-}" ] && ((code == 85 || code == 143)) &&
    [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
    echo "slurm_run.sh: saved and stopped; job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
