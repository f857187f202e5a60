#!/bin/bash
# One machine's ranks of a run, under torchrun. Slurm's templates start it on every node; without a scheduler give
# the same command on every machine, with another NODE_RANK:
#
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=first-machine examples/torchrun/node.sh apo_megatron.train --config run.yaml
#
# SIGUSR1 and SIGTERM ask the ranks to save their state and stop; torchrun alone would kill them 30 seconds after a
# SIGTERM, and die of a SIGUSR1. Exit code: that of torchrun; 0 also where the run stopped as asked, with the
# state saved: then there is a file LOG_DIR/stopped. Needs pgrep and pkill (procps).
set -uo pipefail
export PYTHON=${PYTHON:-python}
export LOG_DIR=${LOG_DIR:-logs}          # rank_00000.log, ...: what each rank prints; that of rank 0 is shown, too
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
RANKS_PER_NODE=${RANKS_PER_NODE:-gpu}    # a number; gpu: one for each GPU
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}    # the first machine, by a name or address that the others reach
MASTER_PORT=${MASTER_PORT:-29500}        # a free port there; another one for each run
EXIT_INTERRUPTED=130                     # what a rank ends with that was asked to stop and has saved its state

# One rank: torchrun calls this script again. Not stopped by SIGTERM before the rank itself has ended.
run_rank() {
    trap : TERM
    "$PYTHON" -u -m "$@" >> "$(printf '%s/rank_%05d.log' "$LOG_DIR" "$RANK")" 2>&1
    local code=$?
    if [ "$code" = "$EXIT_INTERRUPTED" ]; then  # not a failure: nothing for torchrun to tear down
        touch "$LOG_DIR/stopped"
        code=0
    fi
    exit "$code"
}

# To the ranks and nobody else: not to their reward workers and servers.
ask_ranks_to_stop() {
    local parents
    parents=$(pgrep -d, -P "$torchrun") && pkill -USR1 -P "$parents"
}

if [ "${1-}" = --rank ]; then
    shift
    run_rank "$@"
fi

stop_requested=
trap 'stop_requested=1' USR1 TERM
mkdir -p "$LOG_DIR"
rm -f "$LOG_DIR/stopped"
command=("$PYTHON" -m torch.distributed.run --nnodes "$NUM_NODES" --node-rank "$NODE_RANK"
    --nproc-per-node "$RANKS_PER_NODE" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
    --no-python "$0" --rank "$@")
# Ignored here and thus in a rank until it listens itself: one that is being started does not die of it.
(trap '' USR1; exec "${command[@]}") &
torchrun=$!
if [ "$NODE_RANK" = 0 ]; then
    touch "$LOG_DIR/rank_00000.log"
    (trap '' USR1 TERM; exec tail -n 0 -f --pid "$torchrun" "$LOG_DIR/rank_00000.log") &
    shown=$!
fi

while kill -0 "$torchrun" 2> /dev/null; do
    [ -z "$stop_requested" ] || ask_ranks_to_stop  # again and again: one may not listen yet
    sleep 1 &
    wait $!  # a signal ends it early
done
wait "$torchrun"
code=$?
[ -z "${shown-}" ] || wait "$shown"
exit "$code"
