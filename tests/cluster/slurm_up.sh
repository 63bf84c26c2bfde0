# shellcheck shell=bash
# A Slurm of its own on this machine, of as many virtual nodes as wanted: munge, a controller, and a slurmd for each node, everything
# in one folder. Whoever sources this calls slurm_down in a trap, so that nothing outlives the test.
#
# TmpFS differs by node, or steps of two nodes meet in one folder; cred_expire is short, or a requeued job waits for two minutes.

slurm_up() { # folder number of nodes
    # What is shown if it does not come up.
    local folder=$1 num_nodes=$2 host port node log=$1/log/slurmd.n1.log
    host=$(hostname -s)
    # Away from other tests on the same machine.
    port=$((20000 + $$ % 4000 * 10))
    mkdir -p "$folder"/{state,spool,log,munge,tmp}
    chmod 755 "$folder"
    dd if=/dev/urandom bs=1 count=1024 of="$folder/munge/key" 2>/dev/null
    chmod 400 "$folder/munge/key"
    munged --force --num-threads=2 --key-file="$folder/munge/key" --socket="$folder/munge/sock" --pid-file="$folder/munge/pid" \
        --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed"
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
TmpFS=$folder/tmp/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=5
KillWait=10
ReturnToService=2
JobRequeue=1
MessageTimeout=5
TCPTimeout=2
NodeName=n[1-$num_nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + num_nodes))] CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -c
    for node in $(seq "$num_nodes"); do
        mkdir -p "$folder/spool/n$node" "$folder/tmp/n$node"
        slurmd -N "n$node"
    done
    wait_for 20 all_idle "$num_nodes"
}
all_idle() { [[ $(sinfo -h -p low -t idle -o %D) == "$1" ]]; }

# As if the power went: the node's daemon, its steps' and its tasks end at once. slurmd -N brings it back.
power_off() { # folder node
    local file process processes
    processes=("$(cat "$1/slurmd.$2.pid")")
    for process in $(pgrep -x slurmstepd || true); do
        if readlink /proc/"$process"/fd/* 2>/dev/null | grep -qx "$1/log/slurmd.$2.log"; then processes+=("$process"); fi
    done
    while read -r file; do
        if grep -qzsx "SLURM_CONF=$1/slurm.conf" "$file"; then processes+=("$(cut -d/ -f3 <<<"$file")"); fi
    done < <(grep -lzsx "SLURMD_NODENAME=$2" /proc/[0-9]*/environ || true)
    kill -9 "${processes[@]}"
}

slurm_down() { # folder
    local file process processes=()
    [[ ! -e $1/slurm.conf ]] || { SLURM_CONF=$1/slurm.conf timeout 5 scancel --user=root >/dev/null 2>&1 || true; }
    for file in "$1"/slurmd.*.pid "$1/slurmctld.pid" "$1/munge/pid"; do
        if process=$(cat "$file" 2>/dev/null); then processes+=("$process"); fi
    done
    # Steps have a daemon each, which has its node's log open.
    for process in $(pgrep -x slurmstepd || true); do
        if readlink /proc/"$process"/fd/* 2>/dev/null | grep -q "^$1/"; then processes+=("$process"); fi
    done
    # Tasks know which Slurm they are of, and of which job.
    while read -r file; do
        if grep -qzs '^SLURM_JOB_ID=' "$file"; then processes+=("$(cut -d/ -f3 <<<"$file")"); fi
    done < <(grep -lzs "^SLURM_CONF=$1/slurm.conf\$" /proc/[0-9]*/environ || true)
    ((${#processes[@]})) || return 0
    kill "${processes[@]}" 2>/dev/null || true
    for _ in $(seq 60); do
        kill -0 "${processes[@]}" 2>/dev/null || return 0
        sleep 0.05
    done
    kill -9 "${processes[@]}" 2>/dev/null || true
}
