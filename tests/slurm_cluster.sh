#!/bin/bash
# A real Slurm on one machine, for tests: a slurmctld and a slurmd for each node, in namespaces of their own (network,
# processes, host names, mounts), as root, without systemd.
#
#   slurm_cluster.sh up DIR NUM_NODES CPUS_PER_NODE     returns when all nodes are idle
#   slurm_cluster.sh exec DIR COMMAND...                inside, where sbatch and squeue work
#   slurm_cluster.sh down DIR                           ends every process of it
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
action=$1 folder=$(realpath -m "$2")
shift 2
conf=$folder/slurm.conf

configure() {
    local num_nodes=$1 cpus=$2 i
    mkdir -p "$folder"/{munge,state,spool,log,run}
    chmod 0700 "$folder/state"
    (umask 077; head -c 1024 /dev/urandom > "$folder/munge/key")
    echo "127.0.0.1 localhost controller" > "$folder/hosts"
    cat > "$conf" <<END
ClusterName=test
SlurmctldHost=controller(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket
SlurmctldPort=16817
SrunPortRange=16900-16999
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=3
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
NodeName=DEFAULT CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=8000
END
    for i in $(seq 0 $((num_nodes - 1))); do
        echo "127.0.0.$((i + 2)) node$i" >> "$folder/hosts"
        # Ports tell the nodes apart: with NoInAddrAny srun hangs inside a job.
        echo "NodeName=node$i NodeHostname=node$i NodeAddr=127.0.0.$((i + 2)) Port=$((16820 + i))" >> "$conf"
    done
    echo "CgroupAutomount=no" > "$folder/cgroup.conf"
}

start() { # NAME COMMAND...
    "${@:2}" < /dev/null > "$folder/log/$1.out" 2>&1 &
}

case $action in
up)
    configure "$1" "$2"
    setsid unshare --net --mount --uts --pid --fork --kill-child --mount-proc --propagation private \
        bash "$0" inside "$folder" "$1" < /dev/null > "$folder/log/inside.out" 2>&1 &
    outer=$!
    echo "$outer" > "$folder/run/outer"
    for _ in $(seq 100); do
        first=$(cat "/proc/$outer/task/$outer/children" 2> /dev/null || true)
        [ -z "$first" ] || break
        sleep .1
    done
    echo "${first% }" > "$folder/run/init"
    for _ in $(seq 300); do
        idle=$(timeout 5 bash "$0" exec "$folder" sinfo --noheader --states=idle --format=%D 2> /dev/null || true)
        [ "$idle" != "$1" ] || exit 0
        sleep .1
    done
    cat "$folder"/log/*.out >&2
    exit 1 ;;
inside) # process 1 of the new namespace; when it ends the kernel kills the others
    export SLURM_CONF=$conf
    hostname controller
    ip link set lo up
    # Without an address other than loopback glibc (AI_ADDRCONFIG) does not even resolve 127.0.0.1.
    ip link add network type dummy 2> /dev/null || ip link add network type bridge
    ip addr add 198.51.100.1/32 dev network
    ip link set network up
    mount --bind "$folder/hosts" /etc/hosts
    start munged munged --foreground --force --socket "$folder/munge/socket" --key-file "$folder/munge/key" \
        --pid-file "$folder/munge/pid" --log-file "$folder/log/munged.log" --seed-file "$folder/munge/seed"
    until munge --socket "$folder/munge/socket" --no-input > /dev/null 2>&1; do sleep .1; done
    start slurmctld slurmctld -D -i -f "$conf"
    for i in $(seq 0 $(($1 - 1))); do
        start "slurmd$i" unshare --uts sh -ec "hostname node$i; exec slurmd -D -N node$i -f '$conf'"
    done
    wait ;;
exec)
    exec nsenter --target "$(cat "$folder/run/init")" --net --pid --mount --uts --wd="$PWD" \
        env SLURM_CONF="$conf" "$@" ;;
down)
    kill -9 "$(cat "$folder/run/init")" || true
    for _ in $(seq 100); do
        kill -0 "$(cat "$folder/run/outer")" 2> /dev/null || exit 0
        sleep .1
    done
    exit 1 ;;
esac
