#!/usr/bin/env bash
# Evaluate a checkpoint under SLURM, one process for each GPU, as in the toolkits:
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]
# with GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS and PY_ARGS.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo 'usage: slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT' \
        '[options of tools/test.py]' >&2
    exit 2
fi
exec bash "$(dirname "$0")/slurm_run.sh" test.py "$@"
