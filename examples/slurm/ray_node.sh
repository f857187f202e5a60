#!/bin/bash
# Ray on one node of the job: the head on the first, workers on the others.
set -euo pipefail
ray=("$PYTHON" -m ray.scripts.scripts)
start=(start --block --disable-usage-stats --num-gpus="$GPUS_PER_NODE" --num-cpus="${SLURM_CPUS_PER_TASK:-1}")
if [ "$SLURM_NODEID" = 0 ]; then
    exec "${ray[@]}" "${start[@]}" --head --port="$MASTER_PORT" --include-dashboard=false
fi
until "${ray[@]}" status --address "$MASTER_ADDR:$MASTER_PORT" > /dev/null 2>&1; do sleep 1; done
exec "${ray[@]}" "${start[@]}" --address="$MASTER_ADDR:$MASTER_PORT"
