#!/usr/bin/env bash
# What `hadal launch slurm` writes, on a real Slurm of four virtual nodes: a run that loses a node, that is preempted in each of Slurm's
# ways, or that loses a rank, ends with the losses and the weights of one that was not interrupted, to the bit; other exit codes end
# the job; nothing is left. Prints how long each took.
#
#   HADAL=target/debug/hadal HADAL_TEST_MPI=FOLDER_OF_MPICH tests/cluster/slurm.sh     # SLOW=1 ends nodes without a word, too
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/cluster/common.sh
source tests/cluster/slurm_up.sh
[[ $(id -u) == 0 ]] || skip 'its Slurm is set up for root'
need slurmctld slurmd munged srun sbatch scontrol python3
need_mpi

folder=$(mktemp -d)
end() {
    slurm_down "$folder/slurm"
    rm -rf "$folder"
}
trap end EXIT
trap 'exit 130' INT TERM
began=$(now)
slurm_up "$folder/slurm" 4
echo "Slurm of 4 nodes: up in $(secs "$began")"

# What all runs have in common.
sets=(--set train.steps="${STEPS:-40}" --set eval=None --set sample=None --set 'telemetry.tensorboard=false' --set 'telemetry.trace_steps=None')
in_folder() { echo "--set=telemetry.dir=\"$folder/$1\""; }
train_as_threads() { # name, arguments of run...; the run's folder is printed
    "$hadal" run scenes/cluster.ron "${sets[@]}" "$(in_folder "$1")" "${@:2}" >"$folder/$1.log" 2>&1 || fail "$(cat "$folder/$1.log")"
    echo "$folder/$1/cluster"
}
began=$(now)
whole=$(train_as_threads whole)
echo "four ranks as threads, not interrupted: $(num_steps "$whole") steps in $(secs "$began")"

# Writes the file, and submits it from the folder that the job's log is to be in. The job's number is then in $job, its run in $run.
submit() { # name, arguments of launch...
    name=$1
    local file=$folder/$name/job.sbatch node
    shift
    # A node that was lost comes back by itself, or is asked to.
    for node in $(sinfo -h -p low -N -t down -o %N); do scontrol update nodename="$node" state=resume || true; done
    wait_for 30 all_idle 4
    mkdir -p "$folder/$name"
    "$hadal" launch slurm scenes/cluster.ron --cores-per-rank 1 "${sets[@]}" "$(in_folder "$name")" "$@" --out "$file" >/dev/null 2>&1
    (cd "$folder/$name" && sbatch --test-only job.sbatch) >/dev/null 2>&1 || fail "$name: sbatch --test-only refuses the file"
    job=$(cd "$folder/$name" && sbatch --parsable job.sbatch)
    log=$folder/$name/cluster-$job.log
    run=$folder/$name/cluster
}
state() { squeue -h -t all -j "$job" -o %T; }
is() { [[ $(state) == "$1" ]]; }
# How often the job began anew, and the code it ended with.
restarts() { scontrol show job "$job" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p'; }
exit_code() { scontrol show job "$job" | sed -n 's/.*ExitCode=\([0-9]*\):.*/\1/p'; }
has_started_again() { grep -q '^resumed from' "$log"; }
is_over() { [[ $(state) =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)$ ]]; }
# What the job's last state and exit code have to be.
ends() { # state code
    wait_for 300 is_over
    if ! is "$1" || [[ $(exit_code) != "$2" ]]; then fail "$name: expected $1 with $2, found $(state) with $(exit_code)"; fi
}
# After an interruption at $began: when it ran again, and that it ended as if nothing had been.
goes_on() { # restarts expected
    wait_for 60 has_started_again
    local again
    again=$(now)
    ends COMPLETED 0
    (($(restarts) >= $1)) || fail "$name: $(restarts) restarts, expected $1 or more"
    echo "$name: goes on after $(secs "$began" "$again"), $(restarts) restarts, ends after $(secs "$began"); $(sed -n 's/^resumed from .*\(step-[0-9]*\).*/from \1/p' "$log" | paste -sd,)"
    same_bits "$name" "$whole" "$run"
}
lose_node() { # which of the job's
    local lost
    lost=$(scontrol show hostnames "$(squeue -h -j "$job" -o %N)" | sed -n "$1p")
    began=$(now)
    scontrol update nodename="$lost" state=down reason=test
}

submit 'node-lost'
wait_for 60 has_steps "$run" 12
lose_node 2
goes_on 1

submit 'batch-node-lost'
wait_for 60 has_steps "$run" 12
lose_node 1
goes_on 1

submit 'told-to-give-way'
wait_for 60 has_steps "$run" 12
began=$(now)
scancel --signal=USR1 "$job"
goes_on 1
grep -q 'SIGTERM: stopping here, with a checkpoint' "$log" || fail "$name: no checkpoint was said"

# In the middle of a step, unless it comes between two.
submit 'preempted' --set watchdog.finish_step_secs=0
wait_for 60 has_steps "$run" 12
began=$(now)
other=$(sbatch --parsable --partition=high --nodes=4 --exclusive --output=/dev/null --wrap 'sleep 2')
goes_on 1
[[ $(squeue -h -t all -j "$other" -o %T) == COMPLETED ]] || fail "$name: the other job did not run"

submit 'rank-killed'
wait_for 60 has_steps "$run" 12
began=$(now)
victim=
for process in $(pgrep -x hadal); do
    variables=$(tr '\0' '\n' 2>/dev/null </proc/"$process"/environ || true)
    if grep -qx "SLURM_JOB_ID=$job" <<<"$variables" && grep -qx 'SLURM_PROCID=3' <<<"$variables"; then victim=$process; fi
done
kill -9 "$victim"
goes_on 1

submit 'node-spared' --spare-nodes 1
wait_for 60 has_steps "$run" 12
lose_node 2
goes_on 0
[[ $(restarts) == 0 ]] || fail "$name: the job went back into the queue"

# Slurm looks at limits of time every 30 s, and takes its time to notice that a node is gone, so only where it is asked for.
if [[ -n ${SLOW:-} ]]; then
    # The file's own --signal.
    short=$whole
    whole=$(train_as_threads long --set train.steps=200)
    submit 'time-is-up' --set train.steps=200 --time 1 --signal-secs 50
    began=$(now)
    goes_on 1
    whole=$short
    for spare in 0 1; do
        submit "node-without-power-$spare-spare" --spare-nodes "$spare"
        wait_for 60 has_steps "$run" 12
        lost=$(scontrol show hostnames "$(squeue -h -j "$job" -o %N)" | sed -n 2p)
        began=$(now)
        power_off "$folder/slurm" "$lost"
        goes_on 0
        slurmd -N "$lost"
    done
fi

# Nothing that another start would mend.
submit 'budget' --set train.max_train_secs=1
ends FAILED 6
[[ $(restarts) == 0 ]] || fail "$name: a job whose budget is used up began anew"
echo "$name: the job ends with 6"

submit 'diverged' --set 'schedule=Constant(lr: 1e30)'
ends FAILED 4
[[ $(restarts) == 0 ]] || fail "$name: a run that diverges began anew"
echo "$name: the job ends with 4"

# Whoever cancels means it.
submit 'cancelled'
wait_for 60 has_steps "$run" 5
scancel "$job"
wait_for 30 is CANCELLED
sleep 1
is CANCELLED || fail "$name: the job came back"
echo "$name: the job is gone"

# A batch step that has no srun is one process.
job=$(sbatch --parsable --nodes=2 --ntasks-per-node=2 --output="$folder/alone.log" --chdir="$PWD" \
    --wrap "'$hadal' run scenes/cluster.ron --set train.steps=15 --set checkpoint=None --set eval=None --set sample=None '$(in_folder alone)'")
name=alone log=$folder/alone.log
ends COMPLETED 0
has_steps "$folder/alone/cluster" 15
echo "$name: a batch script's own hadal is one process of four threads"
