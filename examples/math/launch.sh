#!/usr/bin/env bash
# Starts the trainer on this machine under torchrun, a process for each GPU; the run_*.sh scripts end here.
# Arguments: --config FILE [section.field=value ...]. Started again, a run goes on from its last checkpoint
# (--resume never: from the start).
#
#   GPUS_PER_NODE            default 8
#   NUM_NODES                machines, default 1. With more, start the same script on each of them, with
#   NODE_RANK, MASTER_ADDR   its number from 0, and the address of number 0
#   MASTER_PORT              default 29500, another one for a second run on the same machine
set -euo pipefail

if [ "${NUM_NODES:-1}" -gt 1 ]; then
    : "${NODE_RANK:?number of this machine, from 0}" "${MASTER_ADDR:?address of machine 0}"
fi
exec torchrun --nnodes "${NUM_NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${GPUS_PER_NODE:-8}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    -m apo_megatron.train --resume auto "$@"
