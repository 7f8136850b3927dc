#!/usr/bin/env bash
# Train under SLURM, one process for each GPU, as in the toolkits:
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR] [options of tools/train.py]
# with GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS and PY_ARGS.
# With BATCH=1 it is submitted by sbatch and queued again, to go on from what it has
# saved, when it is preempted or its time is over.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo 'usage: slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR]' \
        '[options of tools/train.py]' >&2
    exit 2
fi
job=("$1" "$2") config=$3
shift 3
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    set -- --work-dir "$@"
fi
exec bash "$(dirname "$0")/slurm_run.sh" train.py "${job[@]}" "$config" "$@"
