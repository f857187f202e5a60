# What the templates of this folder share. They source it; the checkout is the folder that sbatch was called in.
#
# Variables of the caller that change what it does:
#   PYTHON         interpreter with this package, on all nodes (.venv/bin/python where there is one, else python)
#   GPUS_PER_NODE  0: one rank a node, on CPUs (what --gpus-per-node says)
#   RANKS_PER_NODE ranks on each node (one for each GPU)
#   MASTER_ADDR    name or address of the first training node (its host name in Slurm)
#   MASTER_PORT    free there (follows from the number of the job)
#   INTERFACE      network interface for NCCL and gloo, such as ib0 or eth0 (they choose)
set -euo pipefail

# Sets and exports what node.sh reads; prints it once. $1: number of nodes in front that do not train.
prepare_job() {
    local first=${1:-0} default_python=python
    [ ! -x .venv/bin/python ] || default_python=.venv/bin/python
    export PYTHON=${PYTHON:-$default_python}
    mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    NUM_NODES=$((${#NODES[@]} - first))
    [ "$NUM_NODES" -gt 0 ] || fail "${#NODES[@]} node(s), of which $first serve: ask for more with --nodes"
    # May have a type in front, h100:8; asked for by --gres there is only the second.
    local requested=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
    GPUS_PER_NODE=${GPUS_PER_NODE:-${requested##*:}}
    RANKS_PER_NODE=${RANKS_PER_NODE:-$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))}
    MASTER_ADDR=${MASTER_ADDR:-${NODES[$first]}}
    MASTER_PORT=${MASTER_PORT:-$(port_of_this_job)}
    # A folder for each start of the job: what an earlier one left there (stopped, servers) means nothing now.
    LOG_DIR=$RUN_DIR/logs/job_$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    export NUM_NODES GPUS_PER_NODE RANKS_PER_NODE MASTER_ADDR MASTER_PORT LOG_DIR
    if [ -n "${INTERFACE:-}" ]; then
        export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
    fi
    # Since Slurm 22.05 srun takes no --cpus-per-task from sbatch: all ranks of a node would share one core.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    mkdir -p "$LOG_DIR"
    print_environment
}

# Between Ray's ports (up to 19,999) and the kernel's (from 32,768), and another one for each of 10,000 jobs in a row.
port_of_this_job() {
    local port=$((20000 + SLURM_JOB_ID % 10000))
    while (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((20000 + (port + 1000) % 10000)); done
    echo "$port"
}

# Only variables by name: the others may hold secrets.
print_environment() {
    echo "job $SLURM_JOB_ID ($SLURM_JOB_NAME), start ${SLURM_RESTART_COUNT:-0}, $(date -u +%FT%TZ)"
    echo "nodes: ${NODES[*]}; $NUM_NODES train with $RANKS_PER_NODE rank(s) each"
    echo "first training node: $MASTER_ADDR:$MASTER_PORT; run: $RUN_DIR; logs: $LOG_DIR"
    echo "python: $PYTHON; commit: $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"
    env | grep -E '^(NCCL|GLOO|TORCH|UCX|FI)_|^(CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS)=' | sort || true
}

random_key() {
    head -c 24 /dev/urandom | base64 | tr '+/' '-_'
}

fail() {
    echo "error: $*" >&2
    exit 2
}

# start_companion COMMAND...: what must live as long as the run does; the job ends with it.
start_companion() {
    (
        "$@" || true
        kill -USR2 $$ 2> /dev/null  # it may have ended first
    ) &
}

# run_until_stopped SIGNAL COMMAND...: wait for COMMAND, and send it SIGNAL when this script gets SIGUSR1 (time is
# nearly up, from --signal) or SIGTERM (scancel, preemption). Then end the job: requeued where SIGUSR1 stopped a
# run that is not complete.
run_until_stopped() {
    local signal=$1 code
    shift
    received='' woken='' companion_ended=''
    "$@" &
    main=$!
    trap "woken=1 received=USR1; kill -$signal $main || true" USR1
    trap "woken=1 received=\${received:-TERM}; kill -$signal $main || true" TERM
    trap "woken=1 companion_ended=1; kill -TERM $main || true" USR2
    while true; do  # a signal ends the wait, not the command
        woken='' code=0
        wait "$main" || code=$?
        [ -n "$woken" ] || break
    done
    if [ "$code" = 130 ]; then  # the command itself says so; for ranks node.sh does
        touch "$LOG_DIR/stopped"
        code=0
    fi
    [ -z "$companion_ended" ] || fail "what the run needs has ended before it: see $LOG_DIR"
    [ "$code" = 0 ] || exit "$code"
    [ -e "$LOG_DIR/stopped" ] || exit 0
    [ "$received" = USR1 ] || exit 130
    echo "stopped by SIGUSR1, the state is saved: job $SLURM_JOB_ID is requeued and goes on from there"
    scontrol requeue "$SLURM_JOB_ID"
}
